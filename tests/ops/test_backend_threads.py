"""backend() is the choice of one thread, and gone when its blocks are left, in whatever order threads leave theirs."""

import threading

import pytest
import torch

import condlr_ext
from condlr_ext import linalg
from condlr_ext.ops import current_backend


def test_blocks_that_overlap_in_time_end_as_they_began():
    entered, left = threading.Barrier(2), threading.Event()
    seen = []

    def first():
        with condlr_ext.backend("reference"):
            entered.wait()
            seen.append(current_backend())
        left.set()

    def second():
        with condlr_ext.backend("cpu"):
            entered.wait()
            left.wait()
            seen.append(current_backend())
        seen.append(current_backend())

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert seen == ["reference", "cpu", "auto"] and current_backend() == "auto"


def test_one_object_in_many_threads():
    block = condlr_ext.backend("reference")

    def enter_often():
        for _ in range(300):
            with block, condlr_ext.backend("cpu"):
                pass
        assert current_backend() == "auto"

    threads = [threading.Thread(target=enter_often) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert current_backend() == "auto"


def test_a_thread_starts_with_the_default():
    with condlr_ext.backend("reference"):
        seen = []
        thread = threading.Thread(target=lambda: seen.append(current_backend()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_code_follows_the_choice():
    names = []

    def served(gm, inputs):
        names.append({node.target.name() for node in gm.graph.nodes if hasattr(node.target, "name")})
        return gm

    torch._dynamo.reset()
    compiled = torch.compile(lambda A: linalg.polar(A).Q, backend=served, fullgraph=True)
    A = torch.randn(4, 4)
    for backend in ("cpu", "reference", "cpu"):
        with condlr_ext.backend(backend):
            compiled(A)
    assert ["reference" in str(n) for n in names] == [False, True]
