"""Steps of random networks under hostile gradients and writes, on CondLRSGD, CondLRAdamW and a Projector.

After every step of a layer: all of it is finite, the bound and the cap hold, U and V are orthonormal; a layer whose
gradient is not finite is as it was, and counted; a step with lr = 0 changes nothing that is within its bound; the
compiled step is the reference's where the step is well conditioned.
"""

import copy
import math

import torch
from torch import Tensor, nn

import condlr_ext
from condlr_ext import reference
from condlr_ext.errors import NonFiniteError
from condlr_ext.nn import LowRankConv2d, LowRankLayer, LowRankLinear
from condlr_ext.optim import CondLRAdamW, CondLRSGD, Projector

from .case import Case
from .cores import CAP_EXCESS, KAPPA_EXCESS

ORTHONORMAL = {torch.float32: 2e-6, torch.float64: 1e-12}
POISON = ("nan", "inf", "minus inf")
GRADIENTS = ("model",) * 4 + POISON + ("zero", "1e30", "1e15", "1e-41", "none", "strided", "expanded", "sizes")
ORDINARY = ("model", "strided", "zero", "none", *POISON)
WRITES = ("scale U", "scale S", "random U", "random V", "dependent columns", "singular S", "zero S", "huge S", "tiny S")


def run(case: Case) -> None:
    dtype = torch.float32 if case.maybe(0.7) else torch.float64
    torch.manual_seed(case.random.getrandbits(32))
    torch.set_default_dtype(dtype)
    try:
        model, shape = network(case)
    finally:
        torch.set_default_dtype(torch.float32)
    with condlr_ext.backend(case.random.choice(["cpu", "cpu", "reference", "auto"])):
        trial = Trial(case, model, shape, dtype)
        trial.check(trial.about("start"))
        for number in range(case.random.randint(1, 12)):
            if not case.faults:
                trial.step(number)


def network(case: Case) -> tuple[nn.Sequential, tuple[int, ...]]:
    """Return a network of low-rank layers before a dense one, and the shape of a sample."""
    between, flag = case.random.randint, case.maybe
    layers, width = [], between(1, 40)
    shape = (width,)
    if flag(0.3):
        channels, filters, kernel = between(1, 4), between(1, 12), case.random.choice([1, 3])
        rank = between(1, min(filters, channels * kernel**2))
        layers += [LowRankConv2d(channels, filters, kernel, rank=rank, bias=flag(0.5)), nn.Flatten()]
        shape, width = (channels, 6, 6), filters * (7 - kernel) ** 2
    for _ in range(between(1, 4)):
        out = between(1, 60)
        rank = min(width, out) if flag(0.2) else between(1, min(width, out))
        layers.append(LowRankLinear(width, out, rank=rank, bias=flag(0.5)))
        layers += [nn.ReLU()] if flag(0.5) else []
        width = out
    return nn.Sequential(*layers, nn.Linear(width, 3)), shape


class Trial:
    """A network, its optimizer and the options of both."""

    def __init__(self, case: Case, model: nn.Sequential, shape: tuple[int, ...], dtype: torch.dtype):
        self.case, self.model, self.shape, self.dtype = case, model, shape, dtype
        self.layers = [layer for layer in model if isinstance(layer, LowRankLayer)]
        choice = case.random.choice
        self.tau, self.band = choice([0.0, 1e-7, 0.1, 1.0, 1e3, math.inf]), choice(reference.BANDS)
        self.cap = case.power(-4, 2) if case.maybe(0.5) else None
        self.lr = case.power(-4, 6) if case.maybe(0.4) else 0.1
        self.kind = choice(["sgd", "sgd", "adamw", "projector"])
        constraint = {"tau": self.tau, "band": self.band, "sigma_max": self.cap}
        decay = choice([0.0, 1e-4, 0.1, 5.0])
        options = {"lr": self.lr, "weight_decay": decay, "maximize": case.maybe(0.1)}
        if self.kind == "adamw":
            self.lr = options["lr"] = min(self.lr, 1e3)
            options |= {"amsgrad": case.maybe(0.2), "betas": choice([(0.9, 0.999), (0.0, 0.0), (0.5, 0.5)])}
            self.optimizer = CondLRAdamW(model, **options, **constraint)
        else:
            momentum = choice([0.0, 0.3, 0.9])
            nesterov = momentum > 0 and case.maybe(0.3)
            options |= {"momentum": momentum, "nesterov": nesterov}
            options |= {"dampening": 0.0 if nesterov else choice([0.0, 0.1])}
            if self.kind == "sgd":
                self.optimizer = CondLRSGD(model, **options, **constraint)
            else:
                self.lr = options["lr"] = min(self.lr, 1.0)
                self.optimizer = torch.optim.SGD(model.parameters(), **options)
                self.tangent = case.maybe(0.5)
                Projector(model, **constraint, tangent=self.tangent).attach(self.optimizer)
        self.options = options
        self.written: set[LowRankLayer] = set()  # not yet put back on the constraint set
        self.ordinary = self.lr <= 1  # no hostile gradient or write so far
        case.counts["networks"] += 1
        case.counts[f"of {self.kind}"] += 1

    def step(self, number: int) -> None:
        case, layer = self.case, self.case.random.choice(self.layers)
        written = case.random.choice(WRITES) if self.kind != "projector" and case.maybe(0.15) else ""
        mode = case.random.choice(GRADIENTS)
        if self.kind == "projector" and mode in (*POISON, "1e30", "1e15"):
            mode = "model"  # the weights of a torch optimizer become what its gradients are
        self.gradients()
        spoil(case, layer, mode)
        if written:
            write(case, layer, written)
            self.written.add(layer)
        self.ordinary &= not written and mode in ORDINARY
        lr = 0.0 if case.maybe(0.15) else self.lr
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        about = self.about(f"step {number}: {mode} {written} lr {lr:g}")
        before = {each: snapshot(each) for each in self.layers}
        inside = {each for each in self.layers if self.is_inside(each)}
        twin = self.twin() if self.kind == "sgd" and self.ordinary else None
        skipped = self.skipped()
        try:
            self.optimizer.step()
        except ValueError as error:
            case.holds("no refusal without a reason", self.may_refuse(error), f"{error}; {about}")
            return self.reset()
        case.counts["steps"] += 1

        same = {each for each in self.layers if equal(snapshot(each), before[each])}
        count = self.skipped() - skipped
        case.holds("as many layers unchanged as counted", count <= len(same), about)
        if mode in POISON:
            case.holds(
                "a layer with a gradient that is not finite is unchanged and counted", layer in same and count, about
            )
        case.holds("no ordinary step is skipped", not count or not self.ordinary or mode in POISON, about)
        case.holds("lr = 0 changes nothing", lr or self.kind == "projector" or inside <= same, about)
        if not count:
            self.written -= {each for each in self.layers if each not in same and self.has_gradients(each)}
        self.check(about)
        if twin is not None and not case.faults:
            self.compare(twin, before, about)
        if not self.is_finite():
            self.reset()

    def gradients(self) -> None:
        """Set every gradient, from a backward pass where the outputs are finite."""
        self.optimizer.zero_grad()
        x = torch.randn(8, *self.shape, dtype=self.dtype, generator=self.case.torch) * self.case.power(-2, 2)
        y = self.model(x)
        if y.isfinite().all():
            nn.functional.cross_entropy(y, torch.arange(8) % 3).backward()
        for p in self.model.parameters():
            if p.grad is None or not p.grad.isfinite().all():
                p.grad = torch.zeros_like(p)

    def reset(self) -> None:
        """Start the layers again: what was written, or a dense weight that diverged, says nothing more."""
        with torch.no_grad():
            for module in self.model:
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
        self.optimizer.state.clear()
        self.written, self.ordinary = set(self.layers), self.lr <= 1  # on the constraint set after the next step

    def may_refuse(self, error: ValueError) -> bool:
        """Return whether a layer is frozen where something has written, or too large for the product of its factors."""
        if self.kind == "projector":
            sizes = [math.prod(X.detach().double().norm().item() for X in factors(each)) for each in self.layers]
            return isinstance(error, NonFiniteError) and not max(sizes) < torch.finfo(self.dtype).max / 1e3
        return "must be orthonormal where one of U, S, V is frozen" in str(error) and bool(self.written)

    def has_gradients(self, layer: LowRankLayer) -> bool:
        return all(X.grad is not None for X in factors(layer))

    def is_finite(self) -> bool:
        return all(p.isfinite().all() for p in self.model.parameters())

    def skipped(self) -> int:
        return 0 if self.kind == "projector" else int(self.optimizer.skipped)

    def is_inside(self, layer: LowRankLayer) -> bool:
        sigma = torch.linalg.svdvals(layer.S.detach().double())
        error = max(orthonormality(X) for X in (layer.U, layer.V))
        return reference.meets_bound(sigma, self.tau, self.cap) and error <= ORTHONORMAL[self.dtype] / 2

    def about(self, text: str) -> str:
        shapes = ", ".join(str(list(layer.U.shape)) for layer in self.layers)
        bound = f"tau {self.tau}, {self.band}, cap {self.cap}"
        return f"{text}; {self.kind} {str(self.dtype)[6:]} {self.options} {bound}; U {shapes}"

    def check(self, about: str) -> None:
        """Check all layers but those that were written to and not stepped since, with all of their gradients."""
        case, dtype = self.case, self.dtype
        for layer in self.layers:
            if layer in self.written:
                continue
            finite = all(p.isfinite().all() for p in layer.parameters())
            case.holds("a layer is finite", finite, about)
            if not finite:
                continue
            for role in "UV":
                case.at_most(f"{role} orthonormal", orthonormality(getattr(layer, role)), ORTHONORMAL[dtype], about)
            S = layer.S.detach().double()
            sigma = torch.linalg.svdvals(S)
            denormal = len(S) * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
            if self.cap is not None:
                case.at_most("cap", sigma[0] - self.cap, CAP_EXCESS[dtype] * self.cap + denormal, about)
            if self.tau <= 1e3 and S.any():
                least = (1 + self.tau) * (sigma[-1] + denormal + 1e-15 * len(S) ** 0.5 * sigma[0])
                case.at_most("kappa", sigma[0] - least, KAPPA_EXCESS[dtype] * least, about)
            case.counts["layers checked"] += 1

    # ---------------------------------------------------------------------------------- the reference's step

    def twin(self) -> tuple[nn.Sequential, CondLRSGD]:
        """Return a copy of the network, stepped by the other backend."""
        model = copy.deepcopy(self.model)
        for p, q in zip(model.parameters(), self.model.parameters(), strict=True):
            p.grad = None if q.grad is None else q.grad.clone()
        twin = CondLRSGD(model, **self.options, tau=self.tau, band=self.band, sigma_max=self.cap)
        for p, q in zip(model.parameters(), self.model.parameters(), strict=True):
            p.data.copy_(q)  # what the construction has moved
        twin.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))  # torch would share the buffers
        other = "cpu" if condlr_ext.ops.current_backend() == "reference" else "reference"
        with condlr_ext.backend(other):
            twin.step()
        return model, twin

    def compare(self, twin: tuple[nn.Sequential, CondLRSGD], before: dict, about: str) -> None:
        """Compare the weights W = U S Vᵀ; the limit grows with what amplifies rounding in this step."""
        layers = [layer for layer in twin[0] if isinstance(layer, LowRankLayer)]
        for layer, other in zip(self.layers, layers, strict=True):
            if not self.has_gradients(layer) or layer in self.written:
                continue
            amplification = self.amplification(layer, before[layer])
            limit = 100 * torch.finfo(self.dtype).eps * amplification
            if not limit < 1e-2:
                continue
            W, V = ((each.U @ each.S @ each.V.mT).detach().double() for each in (layer, other))
            self.case.at_most("equals the other backend", (W - V).norm() / V.norm().clamp_min(1e-300), limit, about)
            self.case.counts["layers compared"] += 1

    def amplification(self, layer: LowRankLayer, old: dict[str, Tensor]) -> float:
        """Return how much rounding grows: in (S Sᵀ)⁻¹, in the QR of a long step, in the clip of a singular core."""
        group = self.optimizer.param_groups[0]
        S = old["S"].double()
        sigma = torch.linalg.svdvals(S)
        if sigma[-1] == 0 or len(S) > 1 and math.isinf(self.tau):
            return math.inf
        directions = {}
        for role in "USV":
            buffer = self.optimizer.state[getattr(layer, role)].get("momentum_buffer")
            gradient = getattr(layer, role).grad.double()
            D = gradient.norm() if buffer is None else gradient.norm() + buffer.double().norm()
            directions[role] = float(D)
        length = group["lr"] * max(directions["U"], directions["V"]) / float(sigma[-1]) ** 2
        new = torch.linalg.svdvals(layer.S.detach().double())
        moved = group["lr"] * (directions["S"] + group["weight_decay"] * float(sigma.norm()))
        smallest = float(sigma[-1]) - moved  # of the core before its clip
        if smallest <= 0:
            return math.inf
        gram = float(sigma[0] / sigma[-1]) ** 2
        return (1 + length) ** 2 * gram * max(1.0, float(new[0]) / smallest) * (float(sigma[0]) + moved) / smallest


def factors(layer: LowRankLayer) -> tuple[Tensor, Tensor, Tensor]:
    return layer.U, layer.S, layer.V


def snapshot(layer: LowRankLayer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in layer.named_parameters()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def orthonormality(X: Tensor) -> float:
    return reference.orthonormality_error(X.detach().double()).item()


@torch.no_grad()
def write(case: Case, layer: LowRankLayer, how: str) -> None:
    """Write to a layer as code outside of the optimizer may."""
    U, S, V = factors(layer)
    if how == "scale U":
        U.mul_(case.power(-3, 3))
    elif how == "scale S":
        S.mul_(case.power(-6, 6))
    elif how == "random U":
        U.copy_(case.normal(*U.shape))
    elif how == "random V":
        V.copy_(case.normal(*V.shape) * case.power(-3, 3))
    elif how == "dependent columns":
        V[:, -1] = V[:, 0]
    elif how == "singular S":
        S[:, case.random.randrange(len(S))] = 0
    elif how == "zero S":
        S.zero_()
    elif how == "huge S":
        S.copy_(case.normal(*S.shape) * case.power(6, 15))
    elif how == "tiny S":
        S.copy_(case.normal(*S.shape) * case.power(-30, -6))


def spoil(case: Case, layer: LowRankLayer, how: str) -> None:
    """Replace the gradients of a layer."""
    if how in POISON:
        p = case.random.choice(list(layer.parameters()))
        value = {"nan": math.nan, "inf": math.inf, "minus inf": -math.inf}[how]
        p.grad.view(-1)[case.random.randrange(p.numel())] = value
    elif how == "none":
        for p in case.random.sample(factors(layer), case.random.randint(1, 3)):
            p.grad = None
    elif how == "sizes":
        for p in factors(layer):
            p.grad = (case.normal(*p.shape) * case.power(-8, 8)).to(p.dtype)
    elif how != "model":
        for p in factors(layer):
            if how == "zero":
                p.grad.zero_()
            elif how == "strided":
                p.grad = p.grad.mT.contiguous().mT
            elif how == "expanded":
                p.grad = case.normal(p.shape[0], 1).to(p.dtype).expand(p.shape)
            else:
                p.grad = (case.normal(*p.shape) * float(how)).to(p.dtype)
