"""The kernels of the layers in every type, as compiled for two architectures."""

import pytest
import torch
from helpers import tf32
from helpers.layer_kernels import PRECISIONS, ours, plain, precision
from helpers.ptx.driver import executing

# rows, n, m, r: nothing a tile divides; everything aligned, and loops longer than their stages; P read back from memory
SHAPES = {"odd": (33, 70, 50, 17), "long": (330, 400, 208, 16), "parts": (20, 96, 80, 136)}


@pytest.fixture(params=PRECISIONS)
def low(request):
    """Return a function of a shape: X, U, S, V, b and the gradient of Y."""
    with precision(request.param) as dtype:

        def tensors(rows, n, m, r):
            shapes = (rows, n), (m, r), (r, r), (n, r), (m,), (rows, m)
            return [torch.randn(s, dtype=torch.float64).to(dtype) for s in shapes]

        yield tensors


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sm", [80, 90])
def test_layers(sm, shape, low):
    """At most twice the error of plain PyTorch; in TF32 that of operands rounded to it."""
    low = low(*SHAPES[shape])
    with executing(sm):
        got = ours(*low)
    exact, rounds = [t.double() for t in low], torch.get_float32_matmul_precision() == "high"
    theirs = tf32.layer(*low) if rounds else plain(*low)
    moduli = plain(*(t.abs() for t in exact))
    eps = torch.finfo(low[0].dtype).eps
    for mine, other, true, modulus in zip(got, theirs, plain(*exact), moduli, strict=True):
        assert mine.dtype == low[0].dtype and mine.shape == true.shape
        allowed = 32 * eps if low[0].dtype == torch.float64 else 2 * eps
        error, limit = ((t.double() - true).norm().item() for t in (mine, other))
        assert error <= 2 * limit + allowed * modulus.norm().item()
        if rounds:
            assert tf32.distance(mine, other) <= tf32.TOLERANCE


def test_tensors_at_odd_addresses():
    """Nothing relies on an alignment that a tensor does not have."""

    def odd(t):
        room = torch.full((t.numel() + 9,), torch.nan, dtype=t.dtype)
        return room[3 : 3 + t.numel()].view(t.shape).copy_(t)

    X, U, S, V, b, G = (torch.randn(s) for s in ((20, 32), (48, 16), (16, 16), (32, 16), (48,), (20, 48)))
    with executing(90):
        got, same = ours(*map(odd, (X, U, S, V, b, G))), ours(X, U, S, V, b, G)
    for mine, other in zip(got, same, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)
