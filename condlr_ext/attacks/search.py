"""What iterative attacks share: budgets laid out as one batch, calls of the model, the strongest point so far."""

import torch
from torch import Tensor, nn

from ..errors import NonFiniteError
from .balls import per_sample
from .checks import check_logits


def laid_out(x: Tensor, y: Tensor, budgets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(center [N, ...], labels [N], radius [N, 1, ...]) for N = budgets x samples, budgets outermost."""
    copies = max(1, budgets.numel())
    center = x.detach().repeat(copies, *[1] * (x.ndim - 1))
    return center, y.long().repeat(copies), per_sample(budgets.reshape(-1).repeat_interleave(len(x)), center)


def untouched(x: Tensor, budgets: Tensor) -> Tensor:
    """x for every budget: what an attack returns for a batch without samples."""
    return x.detach().expand(*budgets.shape, *x.shape).clone()


def gradient(function: str, value: Tensor, x: Tensor) -> Tensor:
    """Of the sum of value [N] with respect to x."""
    if not value.requires_grad:
        raise ValueError(f"{function}: the model's output carries no gradient to its input")
    return torch.autograd.grad(value.sum(), x)[0]


class Search:
    """Calls a frozen model and keeps each sample's strongest state: one that is misclassified, if any was, and of
    those (else of all) the one of highest loss. A state is any tuple of tensors [N, ...].

    Attributes:
        rows: which of the N samples points and states are of, all at first; see narrow.
    """

    def __init__(self, function: str, model: nn.Module, labels: Tensor, objective, loss: str, start, *state: Tensor):
        """Scores the clean input `start`, whose state is `state`; checks the model's logits."""
        self.function, self.model, self.labels, self.objective = function, model, labels, objective
        with torch.no_grad():
            self.start_logits = model(start)
            check_logits(function, self.start_logits, labels, loss)
            self.loss = objective(self.start_logits, labels)
        self.wrong = self.start_logits.argmax(1) != labels
        self.state = tuple(part.clone() for part in state)
        self.rows = slice(None)
        self.finite = torch.ones((), dtype=torch.bool, device=start.device)

    def visit(self, point: Tensor, *state: Tensor) -> tuple[Tensor, Tensor]:
        """The loss [N] at point and its gradient there; the state is kept where it is the strongest so far."""
        point = point.detach().requires_grad_()
        value, wrong = self._ask(point)
        grad, value = gradient(self.function, value, point), value.detach()
        self.finite &= torch.isfinite(grad).all()
        self._keep(value, wrong, state)
        return value, grad

    @torch.no_grad()
    def score(self, point: Tensor, *state: Tensor) -> None:
        """visit for a point that no step follows: without the gradient."""
        self._keep(*self._ask(point), state)

    def _ask(self, point: Tensor) -> tuple[Tensor, Tensor]:
        labels = self.labels[self.rows]
        logits = self.model(point)
        return self.objective(logits, labels), logits.argmax(1) != labels

    def _keep(self, value: Tensor, wrong: Tensor, state: tuple[Tensor, ...]) -> None:
        self.finite &= torch.isfinite(value).all()
        loss, was_wrong = self.loss[self.rows], self.wrong[self.rows]
        better = (wrong & ~was_wrong) | ((wrong == was_wrong) & (value > loss))
        for new, kept in zip(state, self.state, strict=True):
            kept[self.rows] = where(better, new, kept[self.rows])
        self.loss[self.rows], self.wrong[self.rows] = torch.where(better, value, loss), wrong | was_wrong

    def narrow(self) -> Tensor:
        """From here on only the samples that are classified right so far; their indices [M]. Waits for the device."""
        self.rows = (~self.wrong).nonzero()[:, 0]
        return self.rows

    def check_finite(self) -> None:
        """Raises if a loss or gradient so far was not finite; waits for the device."""
        if not self.finite:
            raise NonFiniteError(f"{self.function}: the loss or its gradient with respect to the input is not finite")

    def strongest(self) -> tuple[Tensor, ...]:
        self.check_finite()
        return self.state


def where(choose: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Per sample: new where choose [N], else old."""
    return torch.where(per_sample(choose, new), new, old)
