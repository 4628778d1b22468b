"""torchao, ONNX, AOTInductor and TorchScript, and counters of FLOPs."""

import copy

import fvcore.nn
import onnxruntime
import ptflops
import pytest
import thop
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchao.quantization import Float8WeightOnlyConfig, Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

import condlr_ext

X = torch.rand(8, 64, generator=torch.Generator().manual_seed(0))
MACS = 64 * 32 + 32 * 128 + 128 * 32 + 32 * 128 + 128 * 10  # of a row through the folded model


def low_rank():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    condlr_ext.factorize(model, rank=32, exclude="4")
    return model.eval()


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


# the weights' rounding errors: 8 bits a row, 3 bits of mantissa, 4 bits in groups of 32
WEIGHT_ONLY = {
    "int8": (Int8WeightOnlyConfig, {}, 0.02),
    "float8": (Float8WeightOnlyConfig, {}, 0.08),
    "int4": (Int4WeightOnlyConfig, {"group_size": 32}, 0.3),
}


@pytest.mark.parametrize("kind", WEIGHT_ONLY)
def test_torchao_after_fold(kind):
    cls, options, tolerance = WEIGHT_ONLY[kind]
    model = low_rank()
    expected = model(X)
    folded = condlr_ext.fold(copy.deepcopy(model))
    try:
        quantize_(folded, cls(**options))
    except (ImportError, NotImplementedError, RuntimeError, AssertionError) as error:
        pytest.skip(f"torchao on this machine: {error}")
    error = relative_error(folded(X), expected)
    print(f"{kind} after fold: {error:.2e}")
    assert 0 < error < tolerance
    with pytest.raises(ValueError, match="before sharding or quantizing"):
        condlr_ext.factorize(folded, rank=4)


def test_torchao_goes_by_the_class_of_a_layer():
    model = low_rank()
    left = {name: layer.U for name, layer in condlr_ext.nn.low_rank_layers(model).items()}
    quantize_(model, Int8WeightOnlyConfig())
    assert all(model.get_submodule(name).U is U for name, U in left.items())
    assert type(model[4].weight).__name__ != "Parameter"


def test_the_error_of_quantized_factors_is_small():
    """U S and V in 8 bits a row, as after fold, against the whole weight in 8 bits a row."""
    model = low_rank()
    expected = model(X)
    errors = {}
    for name, twin in (("fold", condlr_ext.fold), ("to_dense", condlr_ext.to_dense)):
        quantize_(plain := twin(copy.deepcopy(model)), Int8WeightOnlyConfig())
        errors[name] = relative_error(plain(X), expected)
    print(errors)
    assert errors["fold"] < 3 * errors["to_dense"]


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "legacy"])
def test_onnx(tmp_path, dynamo):
    model = low_rank()
    expected = model(X).detach()
    model = model if dynamo else condlr_ext.fold(model)  # the old exporter does not know the layers' operations
    torch.onnx.export(model, (X,), tmp_path / "model.onnx", input_names=["input"], dynamo=dynamo, verbose=False)
    (ours,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"input": X.numpy()})
    torch.testing.assert_close(torch.from_numpy(ours), expected, rtol=0, atol=1e-5)


def test_aot_inductor(tmp_path):
    model = low_rank()
    program = torch.export.export(model, (X,))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    torch.testing.assert_close(torch._inductor.aoti_load_package(path)(X), model(X), rtol=0, atol=1e-5)


def test_torchscript():
    model = low_rank()
    torch.testing.assert_close(torch.jit.trace(model, X)(X), model(X))
    with pytest.raises(RuntimeError):
        torch.jit.script(model)
    torch.testing.assert_close(torch.jit.script(condlr_ext.fold(copy.deepcopy(model)))(X), model(X))


def test_counters():
    model = low_rank()
    folded = condlr_ext.fold(copy.deepcopy(model))
    products = len(X) * 128 * 32 * 2  # U S may be formed in the call
    for counted, low, high in ((folded, MACS * len(X), 0), (model, MACS * len(X), products)):
        with FlopCounterMode(display=False) as counter:
            counted(X)
        analysis = fvcore.nn.FlopCountAnalysis(counted, X).unsupported_ops_warnings(False)
        for macs in (counter.get_total_flops() / 2, analysis.total()):
            assert low <= macs <= low + high
    assert thop.profile(copy.deepcopy(folded), (X,), verbose=False)[0] == len(X) * MACS
    counted, _ = ptflops.get_model_complexity_info(folded, (64,), as_strings=False, print_per_layer_stat=False)
    assert MACS <= counted <= 1.1 * MACS  # biases and ReLU count
    assert thop.profile(copy.deepcopy(model), (X,), verbose=False)[0] == len(X) * 128 * 10  # goes by class: fold first
