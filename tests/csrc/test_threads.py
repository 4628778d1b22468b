"""Every compiled op, called from several Python threads at once, each of which has a team of OpenMP threads.

`make sanitize` runs this under ThreadSanitizer: the pool of scratch memory and the arrays of a call are what threads
share.
"""

import math
import threading
from functools import partial

import pytest
import torch
from helpers.op_arguments import hyper_table

import condlr_ext

compiled = torch.ops.condlr_ext
LAYERS = 7

pytestmark = pytest.mark.skipif(condlr_ext.ops.COMPILED.ops_path is None, reason="needs the compiled kernels")


def outputs_of_every_op(seed):
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    A = normal(LAYERS, 33, 20)
    outputs = [*compiled.svd(A), *compiled.qr(A), *compiled.polar(A), *compiled.clip_spectrum(A, 0.1, 0, math.inf)]
    params = []
    for _ in range(LAYERS):
        params += [compiled.qr(normal(30, 6))[0], torch.eye(6), compiled.qr(normal(40, 6))[0], normal(30)]
    grads, buffers = [[normal(p.shape) for p in params] for _ in range(2)]
    skipped = torch.zeros(LAYERS, dtype=torch.int64)
    compiled.step(params, grads, buffers, hyper_table(LAYERS), skipped)
    U, S, V, bias = params[:4]
    X = normal(5, 40)
    Y, P = compiled.low_rank_linear(X, U, S, V, bias)
    gradients = compiled.low_rank_linear_backward(normal(5, 30), X, P, U, S, V, [True] * 5)
    return [*outputs, *params, *buffers, skipped, Y, P, *gradients]


def test_calls_in_many_threads_give_the_results_of_one():
    expected = [outputs_of_every_op(seed) for seed in range(10)]
    start, wrong = threading.Barrier(3), []

    def repeat():
        try:
            torch.set_num_threads(4)  # of this thread's team
            start.wait()
            for seed, outputs in enumerate(expected):
                pairs = zip(outputs_of_every_op(seed), outputs, strict=True)
                wrong.extend(seed for a, b in pairs if not torch.equal(a, b))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=repeat) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []
