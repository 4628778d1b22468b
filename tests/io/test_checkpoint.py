"""Checkpoints: contents, metadata, and errors that change nothing."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import equal_states, make_optimizer, small_mlp, snapshot, steps
from helpers.models import MODELS, example_input
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import condlr_ext
from condlr_ext.errors import CheckpointError, NonFiniteError, RankError
from condlr_ext.io import checkpoint
from condlr_ext.io.tensor_files import CHECKSUM, DTYPES


def test_metadata_are_strings_other_tools_can_read(tmp_path):
    model = small_mlp()
    groups = condlr_ext.optim.param_groups(model, cores={"tau": 0.5})
    groups[1]["tau"] = float("inf")  # the cores' group
    optimizer = condlr_ext.optim.CondLRSGD(groups, 0.1, tau=0.2)
    condlr_ext.save(model, tmp_path / "m.safetensors", optimizer)
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        text = file.metadata()
    assert all(type(v) is str for v in text.values())
    assert json.loads(text["rank"]) == {"0": 5, "2": 3} and text["condlr_ext"] == condlr_ext.__version__
    assert json.loads(text["tau"]) == {"0": {"$float": "inf"}, "2": {"$float": "inf"}} and text["format"] == "pt"
    found = checkpoint.read(tmp_path / "m.safetensors")
    assert found.rank == {"0": 5, "2": 3} and found.tau == {"0": float("inf"), "2": float("inf")}
    assert found.version == condlr_ext.__version__ and found.optimizer_class == "CondLRSGD"
    assert "rank={'0': 5, '2': 3}" in repr(found) and "tensor(" not in repr(found)

    condlr_ext.save(model, tmp_path / "m.safetensors", tau={"2": 0.25})
    assert checkpoint.read(tmp_path / "m.safetensors").tau == {"2": 0.25}
    # the tensors have the names of the state_dict: any reader can use them
    small_mlp().load_state_dict(load_file(tmp_path / "m.safetensors"))


@pytest.mark.parametrize("name", ["resnet", "vit", "encoder"])
def test_real_models_come_back_into_dense_ones(tmp_path, name):
    model = MODELS[name]().train()
    x = example_input(name)
    report = condlr_ext.factorize(model, budget=0.4)
    model(x)  # running statistics move
    condlr_ext.save(model.eval(), tmp_path / "m.safetensors", tau=0.1, extra={"epoch": 7})

    plain = MODELS[name]().eval()
    before = torch.get_rng_state()
    found = condlr_ext.load(plain, str(tmp_path / "m.safetensors"))
    assert torch.equal(torch.get_rng_state(), before)
    assert found.extra == {"epoch": 7} and found.rank == {layer.name: layer.rank for layer in report.layers}
    assert equal_states(plain.state_dict(), model.state_dict()) and torch.equal(plain(x), model(x))


def tied():
    model = nn.ModuleDict({"wte": nn.Embedding(20, 8), "mid": nn.Linear(8, 8), "lm_head": nn.Linear(8, 20, bias=False)})
    model["lm_head"].weight = model["wte"].weight
    return model


def test_tied_strided_and_odd_tensors(tmp_path):
    model = tied()
    condlr_ext.factorize(model, rank=3, include="mid")
    base = torch.arange(12.0)
    buffers = {
        "transposed": torch.randn(3, 5).mT, "part": base[2:7], "other_part": base[4:9], "every_second": base[::2],
        "scalar": torch.tensor(3), "empty": torch.empty(0, 4), "brief": torch.randn(3).bfloat16(),
        "flags": torch.tensor([True, False]), "spread": torch.ones(1).expand(4), "none": None,
    }  # fmt: skip
    for name, value in buffers.items():
        model.register_buffer(name, value)
    path = tmp_path / "m.safetensors"
    condlr_ext.save(model, path)
    stored = load_file(path)
    assert ("lm_head.weight" in stored) + ("wte.weight" in stored) == 1

    other, untied = tied(), tied()
    untied["lm_head"].weight = nn.Parameter(torch.zeros(20, 8))
    for target in (other, untied):
        for name, value in buffers.items():
            target.register_buffer(name, None if value is None else torch.zeros(value.shape, dtype=value.dtype))
    condlr_ext.load(other, path)
    assert other["lm_head"].weight is other["wte"].weight
    assert equal_states(other.state_dict(), model.state_dict())
    condlr_ext.load(untied, path)
    assert untied["lm_head"].weight is not untied["wte"].weight
    assert equal_states(untied.state_dict(), model.state_dict())


def test_extra_comes_back_as_it_was(tmp_path):
    optimizer = torch.optim.SGD(small_mlp().parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 2, 5])
    extra = {
        "tensors": [torch.get_rng_state(), torch.randn(2, 3).mT], "tuple": (1, (2.5, None)), "int": 2**70, "float": 0.1,
        "huge": float("inf"), "least": -float("inf"), "bool": True, "keys": {1: "a", (2, 3): {"$tensor": "no tensor"}},
        "empty": [{}, [], ()], "schedule": schedule.state_dict(), "": "no name", "$tuple": ["not a tuple"],
        "dotted.name": {"a.b": torch.ones(1)}, "dotted": {"name.a.b": torch.zeros(1)},
    }  # fmt: skip
    assert isinstance(extra["schedule"]["milestones"], Counter)
    condlr_ext.save(small_mlp(), tmp_path / "m.safetensors", extra=extra)
    assert equal_states(checkpoint.read(tmp_path / "m.safetensors").extra, extra)
    condlr_ext.save(small_mlp(), tmp_path / "m.safetensors", extra={"nan": float("nan")})
    nan = checkpoint.read(tmp_path / "m.safetensors").extra["nan"]
    assert nan != nan
    with pytest.raises(TypeError, match=r"extra\.when\.1 must be a tensor, number, string.*, got set"):
        condlr_ext.save(small_mlp(), tmp_path / "m.safetensors", extra={"when": [1, {1}]})


def test_state_of_modules_that_is_no_tensor(tmp_path):
    class Counting(nn.Linear):
        seen = (0, "none")

        def get_extra_state(self):
            return {"seen": self.seen}

        def set_extra_state(self, state):
            self.seen = state["seen"]

    model, other = nn.Sequential(Counting(3, 2)), nn.Sequential(Counting(3, 2))
    model[0].seen = (41, "all")
    condlr_ext.save(model, tmp_path / "m.safetensors")
    condlr_ext.load(other, tmp_path / "m.safetensors")
    assert other[0].seen == (41, "all")


class Filter(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.register_buffer("h", h)
        self.register_buffer("adjoint", h.conj())
        self.register_buffer("again", self.adjoint)
        self.register_buffer("negative", h.conj().imag)
        self.register_buffer("imaginary", h.imag)


def test_views_by_conjugation_and_negation_are_stored_as_what_they_are(tmp_path):
    h = torch.randn(5, dtype=torch.complex64)
    model, other = Filter(h), Filter(torch.zeros(5, dtype=torch.complex64))
    assert model.adjoint.is_conj() and model.negative.is_neg()
    other.adjoint, other.again, other.negative = (torch.zeros_like(t) for t in (h, h, h.imag))
    condlr_ext.save(model, tmp_path / "m.safetensors")
    condlr_ext.load(other, tmp_path / "m.safetensors")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    assert "again" not in load_file(tmp_path / "m.safetensors")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_comes_back(tmp_path, dtype):
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    value = torch.randint(1, 100, (3, 8 * dtype.itemsize), dtype=torch.uint8).view(dtype)
    if dtype == torch.bool:
        value = torch.tensor([True, False])
    model.register_buffer("freqs", value)
    other.register_buffer("freqs", torch.zeros(value.shape).to(dtype))
    condlr_ext.save(model, tmp_path / "m.safetensors")
    condlr_ext.load(other, tmp_path / "m.safetensors")
    stored = load_file(tmp_path / "m.safetensors")["freqs"]  # as others read it
    for t in (other.freqs, stored):
        assert t.dtype == dtype and torch.equal(t.view(torch.uint8), value.view(torch.uint8))


class Standing(torch.Tensor):
    """Stands for other tensors and has no memory of its own."""

    @staticmethod
    def __new__(cls, t):
        return torch.Tensor._make_wrapper_subclass(cls, t.shape, dtype=t.dtype)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return args[0]


MISSING = {
    "complex128": lambda: torch.ones(3, dtype=torch.complex128),
    "complex32": lambda: torch.ones(3).to(torch.complex32),
    "uint4": lambda: torch.zeros(3, dtype=torch.uint8).view(torch.uint4),
    "float4": lambda: torch.zeros(3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(3)]),
    "wrapper": lambda: Standing(torch.ones(3)),
}


@pytest.mark.parametrize("make", MISSING.values(), ids=MISSING)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_the_format_lacks_is_named(tmp_path, make):
    model, value = nn.Linear(2, 2), make()
    with pytest.raises(TypeError, match="save: extra.freqs must "):
        condlr_ext.save(model, tmp_path / "m.safetensors", extra={"freqs": value})
    model.register_buffer("freqs", value)
    with pytest.raises(TypeError, match="save: freqs must "):
        condlr_ext.save(model, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_has_no_value_is_named(tmp_path):
    with pytest.raises(ValueError, match="save: weight is not initialized and has no values"):
        condlr_ext.save(nn.LazyLinear(3), tmp_path / "m.safetensors")


def test_extra_has_a_depth_that_can_be_read_again(tmp_path):
    deep = value = []
    for _ in range(99):
        value.append([])
        value = value[0]
    condlr_ext.save(nn.Linear(2, 2), tmp_path / "m.safetensors", extra=deep)
    assert checkpoint.read(tmp_path / "m.safetensors").extra == deep
    value.append([[]])
    with pytest.raises(TypeError, match="save: extra.0.0.0.* must be nested at most 100 deep"):
        condlr_ext.save(nn.Linear(2, 2), tmp_path / "m.safetensors", extra=deep)
    deep.append(deep)  # holds itself
    with pytest.raises(TypeError, match="nested at most 100 deep"):
        condlr_ext.save(nn.Linear(2, 2), tmp_path / "m.safetensors", extra=deep)


def test_files_that_other_tools_wrote(tmp_path):
    """A state_dict alone, without the further names of tied parameters, as save_pretrained writes it."""
    model, other = tied(), tied()
    condlr_ext.factorize(model, rank=3, include="mid")
    tensors = {name: t for name, t in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, tmp_path / "m.safetensors", {"format": "pt"})
    found = condlr_ext.load(other, tmp_path / "m.safetensors")
    assert found.rank == {"mid": 3} and found.extra is None
    assert equal_states(other.state_dict(), model.state_dict()) and other["lm_head"].weight is other["wte"].weight
    untied = tied()
    untied["lm_head"].weight = nn.Parameter(torch.zeros(20, 8))
    fails(tmp_path / "m.safetensors", untied, match="it lacks lm_head.weight")
    condlr_ext.factorize(untied, rank=2, include="mid")
    fails(tmp_path / "m.safetensors", untied, match="rank 2 in the model and rank 3 in the file", error=RankError)


def test_the_tensors_of_an_optimizer_have_a_dot(tmp_path):
    model = small_mlp()
    optimizer = make_optimizer("CondLRAdamW", model)
    steps(model, optimizer, [torch.rand(6, 12)])
    condlr_ext.save(model, tmp_path / "m.safetensors", optimizer, extra={"rng": torch.get_rng_state()})
    stored = load_file(tmp_path / "m.safetensors")
    small_mlp().load_state_dict({name: t for name, t in stored.items() if not name.startswith(".")})


@pytest.mark.parametrize("named", [True, False])
def test_the_state_of_parameters_in_another_order(tmp_path, named):
    def parameters(model):
        return list(model.named_parameters() if named else model.parameters())

    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    optimizer = torch.optim.SGD(parameters(model), 0.1, momentum=0.9)
    steps(model, optimizer, [torch.rand(4, 6)])
    condlr_ext.save(model, tmp_path / "m.safetensors", optimizer)
    turned = torch.optim.SGD(parameters(model)[2:] + parameters(model)[:2], 0.1, momentum=0.9)
    fails(tmp_path / "m.safetensors", model, turned, match="state of parameter '0.weight' where .* has '1.weight'")
    straight = torch.optim.SGD(parameters(model), 0.1, momentum=0.9)
    condlr_ext.load(model, tmp_path / "m.safetensors", straight)
    assert equal_states(straight.state_dict(), optimizer.state_dict())


def test_wrappers_leave_no_trace(tmp_path):
    model = small_mlp()
    compiled = torch.compile(model, backend="eager")
    condlr_ext.save(compiled, tmp_path / "m.safetensors")
    other = small_mlp(None)
    condlr_ext.load(nn.DataParallel(other), tmp_path / "m.safetensors")
    assert equal_states(other.state_dict(), model.state_dict())


@pytest.fixture
def saved(tmp_path):
    model = small_mlp()
    optimizer = make_optimizer("CondLRSGD", model)
    steps(model, optimizer, [torch.rand(6, 12)])
    path = tmp_path / "m.safetensors"
    condlr_ext.save(model, path, optimizer)
    return path


def fails(path, model, optimizer=None, match="", error=CheckpointError, **options):
    before = snapshot(model, optimizer)
    with pytest.raises(error, match=match) as caught:
        condlr_ext.load(model, path, optimizer, **options)
    assert "\n" not in str(caught.value)
    assert equal_states(snapshot(model, optimizer), before)


def test_other_ranks_and_taus_are_named(saved):
    fails(saved, small_mlp((5, 2)), match="layer '2' has rank 2 in the model and rank 3 in the file", error=RankError)
    dense_in_file = small_mlp()
    condlr_ext.factorize(dense_in_file, rank={"4": 2})
    fails(saved, dense_in_file, match="layer '4' has rank 2 in the model and is dense in the file", error=RankError)
    for tau, text in ((0.1, "tau 0.1"), (float("inf"), "tau inf")):
        model = small_mlp()
        message = f"layer '0' has {text} in the optimizer and tau 0.2 in the file"
        fails(saved, model, make_optimizer("CondLRSGD", model, tau), match=message)
    fails(saved, small_mlp(), match="layer '2' has tau 0.3 .* tau 0.2 in the file", tau={"2": 0.3})
    model = small_mlp()
    fails(
        saved,
        model,
        make_optimizer("CondLRSGD", model, 0.2),
        "'0' has tau 0.2 in the optimizer, tau=0.1",
        ValueError,
        tau=0.1,
    )
    fails(saved, model, None, "tau names '4', which is no low-rank layer", ValueError, tau={"4": 0.1})


def test_models_and_optimizers_that_do_not_fit(saved):
    wide = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 9), nn.ReLU(), nn.Linear(9, 4), nn.Linear(4, 4))
    fails(saved, wide, match=r"it lacks 5\.bias, 5\.weight")
    fails(saved, wide[:4], match=r"the model has no 4\.bias, 4\.weight")
    other = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 9), nn.ReLU(), nn.Linear(9, 5))
    fails(saved, other, match=r"4\.(weight|bias) is \[4(, 9)?\] in it and \[5(, 9)?\] in the model")
    small = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 4))
    fails(saved, small, match=r"layer 0: rank must be in 1\.\.min\(m, n\) = 4 for a 4 x 4 weight, got 5")
    fails(saved, nn.ReLU(), match="rank names layers that are not there or not eligible: 0, 2|no layer|matches no")
    with pytest.raises(CheckpointError, match="the model is on the meta device; call model.to_empty"):
        condlr_ext.load(small_mlp().to("meta"), saved)

    dense = small_mlp(None)
    fails(saved, dense, torch.optim.SGD(dense.parameters(), 0.1), match="layer '0' is still dense.*make the optimizer")
    model = small_mlp()
    fails(saved, model, torch.optim.SGD(model.parameters(), 0.1), match="of CondLRSGD, the optimizer is SGD")
    groups = condlr_ext.optim.param_groups(model)
    fails(saved, model, condlr_ext.optim.CondLRSGD(groups, 0.1, tau=0.2), match=r"groups of \[10\] .* has \[4, 2, 4\]")
    names = list(model.named_parameters())
    turned = condlr_ext.optim.CondLRSGD([*names[4:], *names[:4]], 0.1, tau=0.2)
    fails(saved, model, turned, match=r"the state of parameter '0.U' where the optimizer has '2.U'")
    condlr_ext.save(model, saved)
    fails(saved, model, make_optimizer("CondLRSGD", model), match="holds no optimizer state")


def test_damaged_and_foreign_files(saved, tmp_path):
    good = saved.read_bytes()
    with safe_open(saved, "pt") as file:
        text = {key: value for key, value in file.metadata().items() if key != CHECKSUM}
    tensors = load_file(saved)
    fails(tmp_path / "absent.safetensors", small_mlp(), match="cannot read .*absent")
    fails(tmp_path, small_mlp(), match="cannot read")
    path = tmp_path / "bad.safetensors"
    for content in (b"", b"text", good[:100], good[:-4], good + b"0", b"\x00" + good[1:]):
        path.write_bytes(content)
        fails(path, small_mlp(), match="cannot read .*bad")
    torch.save(small_mlp().state_dict(), path)
    fails(path, small_mlp(), match="cannot read .*bad")
    save_file(tensors, path, {key: value for key, value in text.items() if key != "condlr_ext"})
    fails(path, small_mlp(), match="was not written by condlr_ext.save: its metadata lacks condlr_ext")
    save_file(tensors, path, text | {"condlr_ext_format": "2"})
    fails(path, small_mlp(), match="has format 2 of condlr_ext .*, this version reads 1")
    for change in (
        {"rank": "no json"}, {"rank": '{"0": "five"}'}, {"rank": "[5, 3]"}, {"tau": '{"0": "x"}'}, {"tau": "3"},
        {"shared": '{"0.V": "gone"}'}, {"state": "{}"}, {"state": '{"model": {}, "extra": {"$tensor": "gone"}, "optimizer": null}'},
        {"state": '{"model": {}, "extra": null, "optimizer": {"state": {}}}'},
    ):  # fmt: skip
        save_file(tensors, path, text | change)
        fails(path, small_mlp(), match="bad.safetensors has damaged metadata: ")
    save_file(tensors, path, text | {"rank": '{"0": 5, "2": 3, "9": 3}'})
    fails(path, small_mlp(), match="9")
    spoilt = tensors | {"2.S": torch.full((3, 3), torch.nan)}
    save_file(spoilt, path, text)
    fails(path, small_mlp(), match="S of layer '2' must be finite, got NaN or Inf", error=NonFiniteError)
    save_file(tensors | {"2.bias": tensors["2.bias"].double() + 1e300}, path, text)
    fails(path, small_mlp(), match="2.bias is beyond the range of torch.float32, that of the model")


def test_the_package_imports_nothing_that_is_optional_or_takes_seconds():
    late = {"safetensors", "sklearn", "matplotlib", "triton", "torch._dynamo", "torch.distributed.tensor"}
    code = f"import sys, condlr_ext; assert not {late} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(condlr_ext.__file__).parents[2], check=True)
