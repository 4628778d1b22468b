"""Families of hostile matrices: name -> function of (case, B, m, n) that returns [B, m, n] float64 of size about 1."""

import math

import torch
from torch import Tensor

from .case import Case

FAMILIES = {}


def family(make):
    FAMILIES[make.__name__] = make
    return make


def orthonormal(case: Case, B: int, m: int, k: int) -> Tensor:
    return torch.linalg.qr(case.normal(B, m, k))[0]


def spectral(spectrum):
    """A family with random singular vectors, given by its singular values: (case, B, k) -> [B, k]."""

    def make(case: Case, B: int, m: int, n: int) -> Tensor:
        k = min(m, n)
        return orthonormal(case, B, m, k) * spectrum(case, B, k).unsqueeze(1) @ orthonormal(case, B, n, k).mT

    FAMILIES[spectrum.__name__] = make
    return spectrum


def ramp(k: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    return torch.linspace(low, high, k, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------- by spectrum


@spectral
def graded_7(case, B, k):
    return (10.0 ** (-7 * ramp(k))).expand(B, k)


@spectral
def graded_30(case, B, k):
    return (10.0 ** (-30 * ramp(k))).expand(B, k)


@spectral
def clustered(case, B, k):
    return 1 + 1e-6 * case.normal(B, k).abs()


@spectral
def two_clusters(case, B, k):
    return torch.where(case.uniform(B, k) < 0.5, 1.0, 1e-5) * (1 + 1e-9 * case.normal(B, k))


@spectral
def repeated(case, B, k):
    return case.integers(1, 2, B, k)


@spectral
def with_zeros(case, B, k):
    return case.integers(0, 1, B, k) * (1 + case.uniform(B, 1))


@spectral
def three_sizes(case, B, k):
    return 1 + 3 * case.uniform(B, k)


@spectral
def at_the_edge(case, B, k):
    return ramp(k, 1.0, 1.1) * (1 + 1e-7 * case.normal(B, k))


@spectral
def one_large(case, B, k):
    sigma = torch.ones(B, k, dtype=torch.float64)
    sigma[:, 0] = 10 ** (8 * case.uniform(B))
    return sigma


@spectral
def one_small(case, B, k):
    sigma = torch.ones(B, k, dtype=torch.float64)
    sigma[:, -1] = 10 ** (-16 * case.uniform(B))
    return sigma


@spectral
def log_uniform(case, B, k):
    return 10 ** (-case.random.uniform(0, 20) * case.uniform(B, k))


# ----------------------------------------------------------------------------------------------- by entries


@family
def gaussian(case, B, m, n):
    return case.normal(B, m, n)


@family
def graded_columns(case, B, m, n):
    return case.normal(B, m, n) * 10.0 ** (-30 * ramp(n))


@family
def graded_both(case, B, m, n):
    return case.normal(B, m, n) * 10.0 ** (-15 * ramp(n)) * 10.0 ** (-15 * ramp(m)).unsqueeze(1)


@family
def low_rank(case, B, m, n):
    k = case.random.randint(1, max(1, min(m, n) // 2))
    return case.normal(B, m, k) @ case.normal(B, k, n)


@family
def equal_columns(case, B, m, n):
    return case.normal(B, m, n)[:, :, torch.arange(n) // 2]


@family
def zero(case, B, m, n):
    return torch.where(case.uniform(B, m, n) < 0.5, -0.0, 0.0).double()


@family
def one_entry(case, B, m, n):
    A = torch.zeros(B, m, n, dtype=torch.float64)
    A[:, case.random.randrange(m), case.random.randrange(n)] = case.normal(B)
    return A


@family
def integers(case, B, m, n):
    return case.integers(-3, 3, B, m, n)


@family
def bits(case, B, m, n):
    return case.integers(0, 1, B, m, n)


@family
def signs(case, B, m, n):
    return 2 * case.integers(0, 1, B, m, n) - 1


@family
def sparse(case, B, m, n):
    return case.normal(B, m, n) * (case.uniform(B, m, n) < 2 / n)


@family
def huge_column(case, B, m, n):
    A = case.normal(B, m, n)
    A[:, :, case.random.randrange(n)] *= case.power(4, 30)
    return A


@family
def huge_row(case, B, m, n):
    A = case.normal(B, m, n)
    A[:, case.random.randrange(m)] *= case.power(4, 30)
    return A


@family
def nearly_orthonormal(case, B, m, n):
    return orthonormal(case, B, max(m, n), min(m, n)).reshape(B, m, n) + case.power(-9, -3) * case.normal(B, m, n)


@family
def nearly_identity(case, B, m, n):
    return torch.eye(m, n, dtype=torch.float64) + case.power(-9, -3) * case.normal(B, m, n)


@family
def permutation(case, B, m, n):
    rows = case.uniform(B, max(m, n)).argsort(-1)[:, :m]
    return torch.eye(max(m, n), dtype=torch.float64)[rows][:, :, :n]


@family
def hilbert(case, B, m, n):
    i, j = torch.arange(m).double().unsqueeze(1), torch.arange(n).double()
    return (1 / (i + j + 1)).expand(B, m, n)


@family
def kahan(case, B, m, n):
    angle = 1.2 + 0.05 * case.normal(B, 1, 1)
    upper = torch.eye(m, n, dtype=torch.float64) - angle.cos() * torch.ones(m, n, dtype=torch.float64).triu(1)
    return angle.sin() ** torch.arange(m).double().unsqueeze(1) * upper


@family
def bidiagonal(case, B, m, n):
    return torch.eye(m, n, dtype=torch.float64) * case.normal(B, m, n) + case.normal(B, m, n).triu(1).tril(1)


@family
def triangle_of_ones(case, B, m, n):
    return torch.ones(m, n, dtype=torch.float64).tril().expand(B, m, n)


@family
def growing_triangle(case, B, m, n):
    return (torch.eye(m, n, dtype=torch.float64) - torch.ones(m, n, dtype=torch.float64).triu(1)).expand(B, m, n)


@family
def diagonal(case, B, m, n):
    sizes = 10 ** (-case.random.uniform(0, 30) * case.uniform(B, m, 1))
    return torch.eye(m, n, dtype=torch.float64) * sizes * (2 * case.integers(0, 1, B, m, 1) - 1)


# ---------------------------------------------------------------------------------------------------- scales


def times_power_of_two(A: Tensor, exponent) -> Tensor:
    """Return A 2**exponent, rounded once, also for exponents of which 2**exponent itself is no number."""
    exponent = torch.as_tensor(exponent)
    half = torch.div(exponent, 2, rounding_mode="trunc")
    return A * torch.exp2(half.double()) * torch.exp2((exponent - half).double())


def exponents(dtype: torch.dtype) -> tuple[int, int, int]:
    """Return the exponents of the smallest denormal, the smallest normal and the largest power of two."""
    info = torch.finfo(dtype)
    smallest = round(math.log2(info.tiny))
    return smallest + round(math.log2(info.eps)), smallest, round(math.log2(info.max)) - 1


def exponent_of(case: Case, dtype: torch.dtype) -> int:
    """Return how far from one a matrix is moved, often not at all, often to the end of the dtype's range."""
    denormal, normal, largest = exponents(dtype)
    kind = case.random.random()
    if kind < 0.5:
        return 0
    if kind < 0.7:
        return case.random.randint(normal // 2, largest // 2)
    if kind < 0.8:
        return case.random.randint(largest - 12, largest)
    if kind < 0.9:
        return case.random.randint(normal - 2, normal + 30)
    return case.random.randint(denormal, normal)


def batch(case: Case, B: int, m: int, n: int, dtype: torch.dtype) -> tuple[Tensor, str]:
    """Return [B, m, n] of one or several families and scales, finite in dtype, and what they are."""
    parts, names = [], []
    cuts = [B] if B < 3 or case.maybe(0.8) else [B // 3, B // 3, B - 2 * (B // 3)]
    for count in cuts:
        name, exponent = case.random.choice(list(FAMILIES)), exponent_of(case, dtype)
        A = times_power_of_two(FAMILIES[name](case, count, m, n), exponent)
        parts.append(A.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype))
        names.append(f"{name} 2^{exponent}")
    return torch.cat(parts), ", ".join(names)
