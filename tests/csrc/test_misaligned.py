"""Arrays and tensors that do not start at a multiple of their element size, as those of a buffer read at an offset.

x86 reads them all the same, UndefinedBehaviorSanitizer (`make sanitize`) does not.
"""

import math
import os

import numpy as np
import pytest
import torch
from helpers.op_arguments import hyper_table, layer_tensors

if os.environ.get("CONDLR_EXT_BUILD") == "none":
    pytest.skip("built without compiled parts", allow_module_level=True)
from helpers import host  # noqa: E402

compiled = torch.ops.condlr_ext


def misaligned(t):
    copy = torch.frombuffer(bytearray(t.nbytes + 1), dtype=t.dtype, offset=1, count=t.numel()).reshape(t.shape)
    assert copy.data_ptr() % t.element_size() != 0
    return copy.copy_(t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_arrays_of_the_core(dtype):
    A = torch.randn(9, 9, dtype=dtype)
    for call in (host.svd, host.qr, host.polar, host.eigh, lambda a: host.clip_spectrum(a, 0.1)):
        for ours, aligned in zip(call(misaligned(A).numpy()), call(A.numpy()), strict=True):
            np.testing.assert_array_equal(ours, aligned)
    grads = [np.ones_like(p) for p in map(np.asarray, layer_tensors(dtype))]
    hyper = hyper_table(1, momentum=0)[0]
    params = layer_tensors(dtype)
    ours = host.step_layer([misaligned(p).numpy() for p in params], grads, grads, misaligned(hyper).numpy())
    for a, b in zip(ours[0], host.step_layer([p.numpy() for p in params], grads, grads, hyper.numpy())[0], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_that_are_read(dtype):
    A = torch.randn(2, 9, 5, dtype=dtype)
    clip = (0.1, 0, math.inf)
    for op, rest in ((compiled.svd, ()), (compiled.qr, ()), (compiled.polar, ()), (compiled.clip_spectrum, clip)):
        for ours, aligned in zip(op(misaligned(A), *rest), op(A, *rest), strict=True):
            assert torch.equal(ours, aligned)
    tensors = [torch.randn(4, 5, dtype=dtype), *layer_tensors(dtype)]
    for ours, aligned in zip(
        compiled.low_rank_linear(*map(misaligned, tensors)), compiled.low_rank_linear(*tensors), strict=True
    ):
        assert torch.equal(ours, aligned)


def test_tensors_that_the_step_writes_are_refused():
    params = layer_tensors()
    grads = [torch.randn_like(p) for p in params]
    before = [p.clone() for p in params]
    counter = torch.zeros(1, dtype=torch.int64)
    for broken in (
        ([*params[:2], misaligned(params[2]), params[3]], grads, grads),
        (params, [*grads[:2], misaligned(grads[2]), grads[3]], grads),
        (params, grads, [*grads[:2], misaligned(grads[2]), grads[3]]),
    ):
        with pytest.raises(RuntimeError, match="of V must start at a multiple of its element size"):
            compiled.step(*broken, hyper_table(1), counter)
    assert all(map(torch.equal, params, before))
