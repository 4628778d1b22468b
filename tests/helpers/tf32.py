"""What a low-rank layer computes in tf32: products of rounded float32 operands, summed exactly."""

import torch

# An intermediate product, summed over k terms in float32, is off by up to sqrt(k) 2**-24 and lands on the other side of a
# rounding, 2**-10 away, as often as 2**-13 sqrt(k); sqrt(2**-13 sqrt(k)) 2**-10 is below 2**-13 for two of them and k up
# to 4096. Operands that are cut would be at a distance of 2**-9.
TOLERANCE = 2.0**-13


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Return float32 numbers rounded to the 11 bits of tf32, ties away from zero, as cvt.rna.tf32 does."""
    return ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def product(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    return (rounded(A).double() @ rounded(B).double()).float()


def layer(X, U, S, V, b, G):
    """Return Y, P and the gradients of X, U, S, V, b as the kernels compute them from float32 tensors."""
    P, Q = product(X, V), product(G, U)
    Y, dX = product(product(P, S.mT), U.mT) + b, product(product(Q, S), V.mT)
    return Y, P, dX, product(product(G.mT, P), S.mT), product(Q.mT, P), product(product(X.mT, Q), S), G.sum(0)


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative distance in the Frobenius norm."""
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def gain(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the factor g that brings g exact closest to got: 1 where errors have no direction."""
    exact = exact.double()
    return ((got.double() * exact).sum() / exact.square().sum()).item()
