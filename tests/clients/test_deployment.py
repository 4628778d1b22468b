"""torchao and ONNX."""

import copy

import onnxruntime
import pytest
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import condlr_ext

X = torch.rand(8, 64, generator=torch.Generator().manual_seed(0))


def low_rank():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    condlr_ext.factorize(model, rank=32, exclude="4")
    return model.eval()


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_int8_after_fold():
    model = low_rank()
    expected = model(X)
    quantize_(folded := condlr_ext.fold(copy.deepcopy(model)), Int8WeightOnlyConfig())
    assert relative_error(folded(X), expected) < 0.02
    left = condlr_ext.nn.low_rank_layers(model)
    quantize_(model, Int8WeightOnlyConfig())  # goes by nn.Linear: only the last layer
    assert condlr_ext.nn.low_rank_layers(model) == left
    with pytest.raises(ValueError, match="before sharding or quantizing"):
        condlr_ext.factorize(folded, rank=4)


def test_onnx(tmp_path):
    model = low_rank()
    torch.onnx.export(model, (X,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    (ours,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"input": X.numpy()})
    torch.testing.assert_close(torch.from_numpy(ours), model(X).detach(), rtol=0, atol=1e-5)
