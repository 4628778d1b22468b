"""Batches of hostile matrices through svd, qr, polar, cond and clip_spectrum, checked in float64.

A matrix is compared at its own scale: divided by a power of two, which is exact, so that its largest entry is about one.
Limits are those of backward stable methods (helpers.matrices.backward_error), or what the docstrings promise; each is
widened by what rounding to the smallest denormal costs where a matrix, or what is kept of it, is that small.
"""

import math
from dataclasses import dataclass

import torch
from helpers.matrices import backward_error
from torch import Tensor

import condlr_ext
from condlr_ext import linalg, reference
from condlr_ext.errors import NonFiniteError

from .case import Case
from .families import batch, exponents, times_power_of_two

TAUS = (0.0, 1e-7, 0.1, 0.5, 1.0, 1e3, math.inf)
CAP_EXCESS = {torch.float32: 2e-6, torch.float64: 1e-12}
KAPPA_EXCESS = {torch.float32: 5e-6, torch.float64: 1e-12}
ENTRIES = 20_000  # of a batch


@dataclass
class Truth:
    """What a batch is compared with.

    Attributes:
        A: The batch [B, m, n].
        D: A at its own scale, float64.
        exponent: D = A 2**-exponent, [B].
        sigma: Singular values of D [B, k].
        norm: Frobenius norm of D [B].
        unit: The relative error allowed.
        denormal: The absolute error of D that rounding to the smallest denormal is, [B].
        about: What it is, for the texts of faults.
    """

    A: Tensor
    D: Tensor
    exponent: Tensor
    sigma: Tensor
    norm: Tensor
    unit: float
    denormal: Tensor
    about: str

    def at_scale(self, X: Tensor) -> Tensor:
        """Return a result of the size of A, [B, ...], divided as D is."""
        return times_power_of_two(X.double(), -self.exponent.view(-1, *[1] * (X.dim() - 1)))


def truth(A: Tensor, about: str) -> Truth:
    m, n = A.shape[1:]
    A64 = A.double()
    _, exponent = torch.frexp(A64.abs().amax((1, 2)))
    D = times_power_of_two(A64, -exponent.view(-1, 1, 1))
    denormal = times_power_of_two(torch.ones((), dtype=torch.float64), exponents(A.dtype)[0] - exponent)
    # a number far below the rest may be denormal at the scale at which the others are computed
    denormal = denormal.clamp_min(2.0 ** exponents(A.dtype)[0]) * math.sqrt(m * n)
    unit = 2 * backward_error(A.dtype, m, n)
    return Truth(A, D, exponent, torch.linalg.svdvals(D), D.norm(dim=(1, 2)), unit, denormal, about)


def run(case: Case) -> None:
    dtype = torch.float32 if case.maybe(0.65) else torch.float64
    m, n = shape(case)
    B = max(1, min(256, ENTRIES // (m * n)))
    A, about = batch(case, B, m, n, dtype)
    backend = case.random.choice(["cpu"] * 6 + ["reference"] * 3 + ["auto"])
    about = f"{backend} {str(dtype)[6:]} {list(A.shape)}: {about}"
    case.counts["cores"] += B
    with condlr_ext.backend(backend):
        try:
            operations(case, truth(A, about))
        except NonFiniteError as error:
            beyond(case, truth(A, about), error)
            smaller = A * 2.0**-10  # all results are within the range then
            operations(case, truth(smaller, f"{about}, times 2^-10"))


def shape(case: Case) -> tuple[int, int]:
    size, side = case.random.random(), case.random.randint
    k = side(1, 16) if size < 0.5 else side(17, 64) if size < 0.96 else side(65, 300)
    if case.maybe(0.6):
        return k, k
    other = side(1, max(1, min(300, 4 * k)))
    return (k, other) if case.maybe(0.5) else (other, k)


def beyond(case: Case, t: Truth, error: NonFiniteError) -> None:
    """Check that an error about the range of a dtype was right: no result exceeds the largest singular value."""
    largest = times_power_of_two(t.sigma[:, 0], t.exponent).max()
    case.holds("refused a batch whose results are within the range", largest > torch.finfo(t.A.dtype).max * (1 - 1e-5), f"{error}; {t.about}")  # fmt: skip
    case.counts["batches beyond the range"] += 1


def operations(case: Case, t: Truth) -> None:
    check_svd(case, t)
    check_qr(case, t)
    check_polar(case, t)
    kappa = linalg.cond(t.A).double()
    case.at_most("cond", (1 / kappa - t.sigma[:, -1] / safe(t.sigma[:, 0])).abs(), t.unit, t.about)
    case.counts["svd, qr, polar, cond"] += 4 * len(t.A)
    for _ in range(2):
        check_clip(case, t)


def safe(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 1.0)


def gram_error(X: Tensor) -> Tensor:
    """Return the largest entry of |XᵀX - I|, [B]."""
    X = X.double()
    return (X.mT @ X - torch.eye(X.shape[-1], dtype=torch.float64)).abs().amax((1, 2))


def check_svd(case: Case, t: Truth) -> None:
    U, sigma, V = linalg.svd(t.A)
    case.at_most("svd: U orthonormal", gram_error(U), t.unit, t.about)
    case.at_most("svd: V orthonormal", gram_error(V), t.unit, t.about)
    case.holds("svd: sigma descends and is not negative", (sigma >= 0).all() and (sigma.diff() <= 0).all(), t.about)
    sigma, limit = t.at_scale(sigma), t.unit * t.norm + t.denormal
    case.at_most("svd: sigma", (sigma - t.sigma).abs().amax(1), limit, t.about)
    rest = U.double() * sigma.unsqueeze(1) @ V.double().mT - t.D
    case.at_most("svd: residual", rest.norm(dim=(1, 2)), limit, t.about)


def check_qr(case: Case, t: Truth) -> None:
    Q, R = linalg.qr(t.A)
    case.at_most("qr: Q orthonormal", gram_error(Q), t.unit, t.about)
    diagonal = R.diagonal(dim1=1, dim2=2)
    case.holds(
        "qr: R triangular, its diagonal not negative", (R.tril(-1) == 0).all() and (diagonal >= 0).all(), t.about
    )
    rest = (Q.double() @ t.at_scale(R) - t.D).norm(dim=1)  # by columns, each relative to its own length
    case.at_most("qr: residual", rest, t.unit * t.D.norm(dim=1) + t.denormal.unsqueeze(1), t.about)


def check_polar(case: Case, t: Truth) -> None:
    Q, H = linalg.polar(t.A)
    m, n = t.A.shape[1:]
    case.at_most("polar: Q orthonormal", gram_error(Q if m >= n else Q.mT), t.unit, t.about)
    case.holds("polar: H symmetric", torch.equal(H, H.mT), t.about)
    H = t.at_scale(H)
    limit = 2 * (t.unit * t.norm + t.denormal)
    case.at_most("polar: residual", (Q.double() @ H - t.D).norm(dim=(1, 2)), limit, t.about)
    case.at_most("polar: H semi-definite", -torch.linalg.eigvalsh(H)[:, 0], limit, t.about)


def check_clip(case: Case, t: Truth) -> None:
    tau, band = case.random.choice(TAUS), case.random.choice(reference.BANDS)
    cap = None
    if case.maybe(0.4):  # relative to one of the matrices
        one = case.random.randrange(len(t.A))
        relative = case.power(-3, 1) if case.maybe(0.7) else case.power(-25, 3)
        cap = float(times_power_of_two(t.sigma[one, 0] * relative, t.exponent[one])) or None
        cap = None if cap == math.inf else cap
    about = f"tau {tau}, {band}, cap {cap}; {t.about}"
    out = linalg.clip_spectrum(t.A, tau, band, cap)
    case.counts["clips"] += len(t.A)
    zero = (t.A == 0).all(-1).all(-1)
    case.holds("clip: a matrix of zeros stays", torch.equal(out[zero], t.A[zero]), about)
    caps = times_power_of_two(torch.tensor(math.inf if cap is None else cap, dtype=torch.float64), -t.exponent)
    check_clipped(case, t, out, tau, band, caps, about)

    sigma = torch.linalg.svdvals(t.at_scale(out))
    if band == "optimal" or sigma.shape[1] == 1:  # the projection: what is inside stays as it is, to the last bit
        wider = 2 * tau + 1e-3
        inside = (sigma[:, 0] <= sigma[:, -1] * (1 + tau) * (1 + 1e-4)) | zero
        again = linalg.clip_spectrum(out[inside], wider, band, None if cap is None else 2 * cap)
        case.holds("clip: a matrix inside its band stays", torch.equal(again, out[inside]), about)
    again = linalg.clip_spectrum(out, tau, band, cap)
    check_bounds(case, t, again, tau, caps, f"second clip, {about}")
    case.counts["second clips"] += len(t.A)


def check_clipped(case: Case, t: Truth, out: Tensor, tau, band, caps: Tensor, about: str) -> None:
    """Check the bounds, and that spectrum and distance are those of the clipped singular values."""
    sigma = check_bounds(case, t, out, tau, caps, about)
    lo, hi = reference.clip_edges(t.sigma, tau, band, caps)
    wanted = t.sigma.clamp(lo.unsqueeze(1), hi.unsqueeze(1))
    wanted[t.sigma[:, 0] == 0] = 0
    eps = torch.finfo(torch.float64).eps * 10 * math.sqrt(max(t.A.shape[1:]))  # of the singular values themselves
    size = wanted.norm(dim=1)
    limit = t.unit * size + eps * t.norm + t.denormal
    case.at_most("clip: spectrum", (sigma - wanted).norm(dim=1), limit, about)
    moved = (t.at_scale(out) - t.D).norm(dim=(1, 2)) - (wanted - t.sigma).norm(dim=1)
    case.at_most("clip: distance", moved, t.unit * torch.maximum(size, t.norm) + t.denormal, about)


def check_bounds(case: Case, t: Truth, out: Tensor, tau: float, caps: Tensor, about: str) -> Tensor:
    """Check cap and condition number; return the singular values of the result at scale."""
    dtype = out.dtype
    sigma = torch.linalg.svdvals(t.at_scale(out))
    case.at_most("clip: cap", sigma[:, 0] - caps, CAP_EXCESS[dtype] * caps + t.denormal, about)
    if tau <= 1e5 and sigma.shape[1] > 1:
        rounding = 4 * torch.finfo(torch.float64).eps * sigma[:, 0] * math.sqrt(max(out.shape[1:]))  # of svdvals
        least = (1 + tau) * (sigma[:, -1] + rounding + t.denormal)
        case.at_most("clip: kappa", sigma[:, 0] - least, KAPPA_EXCESS[dtype] * least, about)
    return sigma
