"""Layers for kernelize: each has a forward alone and reads its options from the layer whose place it takes."""

from torch import Tensor, nn

from . import clip_spectrum, qr


class Orthonormalize(nn.Module):
    """A [*, m, n] -> an orthonormal basis of its columns, Q of its QR decomposition."""

    def forward(self, A: Tensor) -> Tensor:
        return qr(A)[0]


class ClipSpectrum(nn.Module):
    """A [*, m, n] -> A with kappa <= 1 + tau, for a layer with the attributes tau and band."""

    tau: float
    band: str

    def forward(self, A: Tensor) -> Tensor:
        return clip_spectrum(A, self.tau, self.band)
