"""Shared by iterative attacks: one batch of all budgets, model calls, the strongest point of each sample so far."""

import torch
from torch import Tensor, nn

from .._checks import check_logits
from ..errors import NonFiniteError
from .balls import Ball, unsqueeze_like
from .losses import check_classes


def repeat_for_budgets(x: Tensor, y: Tensor, budgets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (center [N, ...], labels [N], radius [N, 1, ...]) with N = budgets * samples, budgets outermost."""
    copies = max(1, budgets.numel())
    center = x.detach().repeat(copies, *[1] * (x.ndim - 1))
    return center, y.repeat(copies), unsqueeze_like(budgets.reshape(-1).repeat_interleave(len(x)), center)


def repeat_like(values: Tensor, center: Tensor) -> Tensor:
    """Repeat values [B, ...] for every budget of center [E B, ...]."""
    return values.repeat(len(center) // len(values), *[1] * (values.ndim - 1))


def unperturbed(x: Tensor, budgets: Tensor) -> Tensor:
    """Return x for every budget, the result of an attack on a batch without entries."""
    return x.detach().expand(*budgets.shape, *x.shape).clone()


def sample_start(ball: Ball, x: Tensor, center: Tensor, radius: Tensor, generator) -> Tensor:
    """Return a random point of each ball, [N, ...], clipped to [0, 1]; in units of radius the same for every budget."""
    return (center + radius * repeat_like(ball.sample(x, generator), center)).clamp(0, 1)


def input_gradient(caller: str, loss: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of the sum of loss [N] with respect to x."""
    if not loss.requires_grad:
        raise ValueError(f"{caller}: the model's output carries no gradient to its input")
    return torch.autograd.grad(loss.sum(), x)[0]


def rivals(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the classes other than the label, [N, C - 1], those of highest logit first."""
    order = logits.argsort(1, descending=True)
    return order[order != labels[:, None]].view(len(order), -1)


class Search:
    """Calls a frozen model and keeps each sample's strongest state: a misclassified one if there is any, and of those
    (else of all) the one of highest loss. A state is any tuple of tensors [N, ...].

    Attributes:
        rows: Indices of the samples that points and states belong to; all at first, see drop_misclassified.
        objective: Function of logits, labels and extra, the loss of each sample.
        extra: Further arguments of it [N, ...], such as target classes.
    """

    def __init__(self, caller: str, model: nn.Module, labels: Tensor, objective, loss: str, clean: Tensor, *state):
        """Start from the clean input, whose state is `state`; check the model's logits for the loss of that name."""
        self.caller, self.model, self.labels, self.objective = caller, model, labels, objective
        with torch.no_grad():
            self.clean_logits = model(clean)
            check_logits(caller, self.clean_logits, labels)
            check_classes(caller, self.clean_logits, loss)
            self.loss = objective(self.clean_logits, labels)
        self.wrong = self.clean_logits.argmax(1) != labels
        self.state = tuple(part.clone() for part in state)
        self.rows, self.extra = slice(None), ()
        self.finite = torch.ones((), dtype=torch.bool, device=clean.device)

    def loss_and_gradient(self, point: Tensor, *state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss [N] at point and its gradient there; keep the state where it is the strongest so far."""
        point = point.detach().requires_grad_()
        loss, wrong = self._forward(point)
        grad, loss = input_gradient(self.caller, loss, point), loss.detach()
        self.finite &= torch.isfinite(grad).all()
        self._keep_stronger(loss, wrong, state)
        return loss, grad

    @torch.no_grad()
    def update(self, point: Tensor, *state: Tensor) -> None:
        """Update as loss_and_gradient does, without the gradient."""
        self._keep_stronger(*self._forward(point), state)

    def _forward(self, point: Tensor) -> tuple[Tensor, Tensor]:
        labels = self.labels[self.rows]
        logits = self.model(point)
        loss = self.objective(logits, labels, *(t[self.rows] for t in self.extra))
        return loss, logits.argmax(1) != labels

    def _keep_stronger(self, loss: Tensor, wrong: Tensor, state: tuple[Tensor, ...]) -> None:
        self.finite &= torch.isfinite(loss).all()
        best_loss, best_wrong = self.loss[self.rows], self.wrong[self.rows]
        stronger = (wrong & ~best_wrong) | ((wrong == best_wrong) & (loss > best_loss))
        for new, best in zip(state, self.state, strict=True):
            best[self.rows] = select_samples(stronger, new, best[self.rows])
        self.loss[self.rows], self.wrong[self.rows] = torch.where(stronger, loss, best_loss), wrong | best_wrong

    def drop_misclassified(self) -> Tensor:
        """Restrict the search to samples never misclassified so far; return their indices [M]. Waits for the device."""
        self.rows = (~self.wrong).nonzero()[:, 0]
        return self.rows

    def check_finite(self) -> None:
        """Raise NonFiniteError if a loss or gradient so far was not finite. Waits for the device."""
        if not self.finite:
            raise NonFiniteError(f"{self.caller}: the loss or its gradient with respect to the input is not finite")

    def strongest(self) -> tuple[Tensor, ...]:
        """Return the strongest state of every sample; raise NonFiniteError as check_finite."""
        self.check_finite()
        return self.state


def select_samples(choose: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Return the samples of new [N, ...] where choose [N] is True, else those of old."""
    return torch.where(unsqueeze_like(choose, new), new, old)
