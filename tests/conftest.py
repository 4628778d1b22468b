"""Fixtures of all tests: seeds, poisoned uninitialized memory, backends, matrices of every kind."""

import os
import warnings

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # older torch asks for it, see seeded_and_poisoned
os.environ["CONDLR_EXT_TABLES"] = ""  # choices are those of the package, whatever was measured here
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's threads spin, and time out each other's slices

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a build without compiled parts says so once; test_build.py looks at it
    import condlr_ext
from helpers import kernels

if os.environ.get("TRITON_INTERPRET") == "1":
    from helpers import interpreted  # noqa: F401


def pytest_addoption(parser):
    text = "run the tests of the Triton kernels on their PTX, executed on the CPU"
    parser.addoption("--ptx", choices=["sm_80", "sm_90"], help=text)


def pytest_configure(config):
    if config.option.ptx:
        from helpers.ptx.driver import executing

        scope = executing(int(config.option.ptx.removeprefix("sm_")))
        config.ptx_run = scope.__enter__()
        config.add_cleanup(lambda: scope.__exit__(None, None, None))


@pytest.fixture(autouse=True)
def executed_kernels(request):
    """With --ptx: forget at the end of a test which tensors there were."""
    yield
    if request.config.option.ptx:
        request.config.ptx_run.forget()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """The tensors are tiny: a second thread adds only waiting. Tests about threads set their own number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def few_queries():
    """On tiny networks Square's thousands of queries cost more than all else, and a hundred find as much."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("condlr_ext.robustness.cascade.QUERIES", 100)
        patch.setattr("condlr_ext.robustness.cascade.ALL_QUERIES", 200)
        yield


@pytest.fixture(autouse=True)
def seeded_and_poisoned():
    """Fixed seed; torch fills memory from torch.empty with NaN, so a lane nobody wrote shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def no_figures(request, monkeypatch):
    """A study's figures take longer than its short training; tests that look at them are marked `figures`."""
    if not request.node.get_closest_marker("figures"):
        monkeypatch.setattr("condlr_ext.experiments.report._png", lambda draw, results: b"")


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Runs the test on each implementation."""
    reason = condlr_ext.ops.COMPILED.ops_reason
    if request.param == "cpu" and reason and os.environ.get("CONDLR_EXT_BUILD") == "none":
        pytest.skip(reason)
    with condlr_ext.backend(request.param):
        yield request.param


@pytest.fixture
def float32_convolutions():
    """Turn off tf32 in cuDNN's convolutions, on by default; torch's products do not use it."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def pytest_runtest_logfinish():
    """After an illegal access every call of CUDA fails: a worker of pytest-xdist goes and is replaced by another."""
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(70)


def pytest_collection_modifyitems(items):
    on_cpu = kernels.run_on_cpu()
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("interpreter"):
            assert item.path.parent.name == "kernels", "make test looks for these only there"
        if item.get_closest_marker("interpreter") and not on_cpu:
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1 or --ptx"))
