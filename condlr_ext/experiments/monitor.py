"""Condition numbers of the layers and orthonormality of their factors during training."""

import itertools

import torch
from torch import nn

from .. import reference
from ..linalg import cond, svd
from ..nn import LowRankLayer
from .inspect_layers import core, dense_layers, low_rank_layers, orthonormality_error


class Monitor:
    """Histories of one run.

    Entry k of a history in kappa is the state at record k: the first at the start, then one after each step, or after
    each epoch where a model is whole only then.

    Attributes:
        kappa: {low-rank layer: condition numbers}, exact to float64; Inf for a singular or non-finite layer.
        dense_kappa: {dense layer: condition numbers}, at each flush only, for one costs as much as many steps; without
            the classifier, which is dense in every run.
        orthonormality: Largest |UᵀU - I| or |VᵀV - I| entry so far, None without orthonormal factors.
    """

    def __init__(self, model: nn.Module):
        self._layers = low_rank_layers(model)
        self._dense = {} if self._layers else dense_layers(model)
        self.kappa = {name: [] for name in self._layers}
        self.dense_kappa = {name: [] for name in self._dense}
        self._cores = {name: [] for name in self._layers}
        self._errors = []

    def record(self) -> None:
        """Keep the present cores of the low-rank layers."""
        for name, layer in self._layers.items():
            self._cores[name].append(core(layer))
            if isinstance(layer, LowRankLayer):
                self._errors.append(orthonormality_error(layer))

    def flush(self) -> None:
        """Compute condition numbers of all cores recorded since the last flush, one batch per layer and rank."""
        for name, cores in self._cores.items():
            for _, alike in itertools.groupby(cores, key=torch.Tensor.size):
                batch = torch.stack(list(alike))
                finite = torch.isfinite(batch).all(-1).all(-1)
                self.kappa[name] += cond(torch.where(finite[:, None, None], batch, 0)).tolist()
            cores.clear()
        for name, layer in self._dense.items():
            self.dense_kappa[name].append(_gram_cond(core(layer)))
        if self._errors:
            self._errors = [torch.stack(self._errors).max()]

    def state(self) -> dict:
        """Return the state for `load`; the monitor must have been flushed."""
        error = self.orthonormality
        return {"kappa": self.kappa, "dense_kappa": self.dense_kappa, "orthonormality": error}

    def load(self, state: dict) -> None:
        """Go on from the state of a monitor of the same run; keep histories of layers that no longer exist."""
        self.kappa = {name: state["kappa"].get(name, []) for name in self._layers} | state["kappa"]
        self.dense_kappa = {name: state["dense_kappa"].get(name, []) for name in self._dense} | state["dense_kappa"]
        if state["orthonormality"] is not None:
            self._errors = [torch.tensor(state["orthonormality"], dtype=torch.float64, device="cpu")]

    @property
    def orthonormality(self) -> float | None:
        return float(max(self._errors)) if self._errors else None

    @property
    def ranks(self) -> dict[str, int]:
        """Present rank of every low-rank layer."""
        return {name: min(core(layer).shape) for name, layer in self._layers.items()}

    @property
    def last_kappa(self) -> float | None:
        """Largest last entry over the layers."""
        return max((values[-1] for values in self._histories() if values), default=None)

    def _histories(self) -> tuple[list[float], ...]:
        return *self.kappa.values(), *self.dense_kappa.values()

    def summary(self) -> dict:
        """Return the entries about the layers in a record of results.

        Returns:
            dict: ranks, spectra {layer: singular values, None if not finite}, kappa and dense_kappa, max_kappa (the
            largest entry of both), orthonormality.
        """
        cores = {name: core(layer) for name, layer in (self._layers or self._dense).items()}
        return {
            "ranks": self.ranks,
            "spectra": {name: svd(C).sigma.tolist() if torch.isfinite(C).all() else None for name, C in cores.items()},
            "kappa": self.kappa,
            "dense_kappa": self.dense_kappa,
            "max_kappa": max((max(values) for values in self._histories() if values), default=None),
            "orthonormality": self.orthonormality,
        }


def _gram_cond(W: torch.Tensor) -> float:
    """Return kappa of a dense weight by the eigenvalues of its smaller Gram matrix, good to 1e-16 kappa² in float64."""
    if not torch.isfinite(W).all():
        return float("inf")
    W = W / reference.magnitude(W)
    eigenvalues = torch.linalg.eigvalsh(W.mT @ W if W.shape[0] >= W.shape[1] else W @ W.mT)
    smallest, largest = eigenvalues[0].item(), eigenvalues[-1].item()
    return (largest / smallest) ** 0.5 if smallest > 0 else float("inf")
