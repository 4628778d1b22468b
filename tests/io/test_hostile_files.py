"""Files that are damaged, or say what is not true: each is a CheckpointError, or loads and can be trained on."""

import copy
import json
import random
import struct
import time

import pytest
import torch
from helpers.checkpoints import equal_states, make_optimizer, small_mlp, snapshot
from safetensors.torch import save_file

import condlr_ext
from condlr_ext.errors import CheckpointError, NonFiniteError, RankError
from condlr_ext.io.checkpoint import read
from condlr_ext.io.tensor_files import CHECKSUM

REFUSED = (CheckpointError, RankError, NonFiniteError)
KINDS = ["CondLRSGD", "CondLRAdamW", "SGD", "AdamW", "LBFGS"]


def trained(kind):
    model = small_mlp()
    optimizer = make_optimizer(kind, model)
    train(model, optimizer)
    return model, optimizer


def train(model, optimizer):
    x = torch.rand(6, 12)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)


@pytest.fixture(scope="module", params=KINDS)
def saved(request, tmp_path_factory):
    """Path, bytes, header, data, and a model and an optimizer to load into; without the checksum, as lies would be."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("hostile") / "m.safetensors"
    model, optimizer = trained(request.param)
    condlr_ext.save(model, path, optimizer, extra={"epoch": 3, "rng": torch.get_rng_state(), "best": (0.5, None)})
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    del header["__metadata__"][CHECKSUM]
    return path, packed(header, data), header, data, trained(request.param)


def attempt(path, content, target) -> str | None:
    """Return the error's text, after a look at the target, or None after further steps."""
    path.write_bytes(content)
    model, optimizer = target
    before = snapshot(model, optimizer)
    start = time.perf_counter()
    try:
        condlr_ext.load(model, path, optimizer)
    except REFUSED as error:
        text = str(error)
        assert equal_states(snapshot(model, optimizer), before), text
        assert "\n" not in text and str(path) in text
        return text
    finally:
        assert time.perf_counter() - start < 2
    train(model, optimizer)
    optimizer.load_state_dict(before["optimizer"])
    model.load_state_dict(before["model"])
    return None


def test_truncations_are_refused(saved):
    path, content, _, _, target = saved
    for i in range(40):
        assert attempt(path, content[: len(content) * i // 40], target)
    assert attempt(path, content, target) is None


def test_flipped_bits(saved):
    path, content, _, data, target = saved
    chance = random.Random(0)
    header, refused = len(content) - len(data), 0
    places = [chance.randrange(header) for _ in range(200)] + [chance.randrange(len(content)) for _ in range(20)]
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << chance.randrange(8)
        refused += attempt(path, bytes(flipped), target) is not None
    assert refused > 100


def packed(header, data):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_lies_of_the_header(saved):
    path, content, header, data, target = saved
    for change in (
        {"shape": [1 << 40, 1 << 20]}, {"shape": [0, 5]}, {"shape": [-16, -5]}, {"shape": [16.0, 5]}, {"shape": [True]},
        {"shape": [1] * 100 + [16, 5]}, {"shape": "x"}, {"dtype": "I32"}, {"dtype": "F16"}, {"dtype": "F4"}, {"dtype": 3},
        {"data_offsets": [0, 10**12]}, {"data_offsets": [-4, 316]}, {"data_offsets": [320]}, {"data_offsets": None},
        {"more": 1},
    ):  # fmt: skip
        assert attempt(path, packed(header | {"0.U": header["0.U"] | change}, data), target), change
    overlapping = copy.deepcopy(header)
    overlapping["0.S"]["data_offsets"] = overlapping["2.S"]["data_offsets"]
    for bad in (overlapping, [header], "x", {"__metadata__": {}}, header | {"__metadata__": {"rank": 3}}):
        assert attempt(path, packed(bad, data), target)
    for start in (struct.pack("<Q", 1 << 63), struct.pack("<Q", 99_000_000), b"", b"PK\x03\x04" + b"\0" * 100):
        assert attempt(path, start + content[8:], target)
    assert attempt(path, packed([[]], data)[:8] + b"[" * 10**6, target)
    deep = b"[" * 200_000 + b"]" * 200_000
    assert "recursion" in attempt(path, struct.pack("<Q", len(deep)) + deep, target)


def test_lies_of_the_metadata(saved):
    path, _, header, data, target = saved

    def refused(**changes):
        lie = header | {"__metadata__": header["__metadata__"] | changes}
        assert attempt(path, packed(lie, data), target), changes

    for rank in (
        '{"0": 1000000000}', '{"0": 1e400}', '{"0": Infinity}', '{"0": NaN}', "[1]", "null", '{"0": 5.7}', '{"0": 5.0}',
        '{"0": "5"}', '{"0": true}', '{"0": -5}', '{"0": ' + "9" * 5000 + "}", '{"0": ' + "9" * 400 + "}",
    ):  # fmt: skip
        refused(rank=rank)
    for tau in (
        '{"0": ' + "9" * 400 + "}", '{"0": "0.1"}', '{"0": -1}', '{"0": NaN}', '{"0": {"$tensor": "0.U"}}', "[0.1]",
        '{"$tuple": []}', '{"0": true}', '{"1": 0.1}', '{"0": {"$float": "nan"}}',
    ):  # fmt: skip
        refused(tau=tau)
    for shared in ('{"a": "a"}', '[["a", "b"]]', '{"a": ["0.U"]}', '{"0.U": "0.V"}', '{"more": "0.U"}'):
        refused(shared=shared)
    state = header["__metadata__"]["state"]
    for extra in (
        "[" * 100_000 + "]" * 100_000, "[" * 900 + "]" * 900, '{"$tuple": [' * 300 + "1" + "]}" * 300,
        '{"$float": "abc"}', '{"$float": []}', '{"$tensor": "nope"}', '{"$tensor": []}', '{"$tensor": "0.U"}',
        '{"$dict": [[[], 1]]}', '{"$dict": [[1, 2, 3]]}', '{"$dict": [[1, 2], [1, 3]]}', '{"$counter": 5}', "1e999",
        '{"$other": 1}', '{"$tuple": [], "x": 1}', "null",  # null: the tensor of the random state is no one's
    ):  # fmt: skip
        refused(state=state[: state.index('"extra": ')] + f'"extra": {extra}}}')
    for bad in ("[]", "{}", "x", "[" * 100_000 + "]" * 100_000, '{"model": "x", "optimizer": null, "extra": null}'):
        refused(state=bad)
    refused(condlr_ext_format="2")


def test_lies_of_the_optimizer(saved):
    path, _, header, data, target = saved
    state = json.loads(header["__metadata__"]["state"])
    group = state["optimizer"]["state"]["param_groups"][0]
    entries = state["optimizer"]["state"]["state"]["$dict"]
    first, entry = entries[0]
    buffer = next(key for key, value in entry.items() if isinstance(value, dict))

    def lie(change):
        told = copy.deepcopy(state)
        change(told["optimizer"])
        metadata = header["__metadata__"] | {"state": json.dumps(told)}
        return attempt(path, packed(header | {"__metadata__": metadata}, data), target)

    assert lie(lambda o: None) is None
    for value in (5, "x", [], {"class": 7, "state": {}}, {"class": "x", "state": []}, {}):
        told = json.dumps(state | {"optimizer": value})
        metadata = header["__metadata__"] | {"state": told}
        assert attempt(path, packed(header | {"__metadata__": metadata}, data), target), value
    for names in (5, [[1]], ["0.U"], [["a"] * len(group["params"])]):
        assert lie(lambda o, names=names: o.update(names=names)), names
    for groups in (None, 5, [], [None], [{}], [{"params": None}], [group | {"params": [0]}], [group, group]):
        assert lie(lambda o, groups=groups: o["state"].update(param_groups=groups)), groups
    changes = {
        "params": ["x", [0.5] * len(group["params"]), [0] * len(group["params"])],
        "lr": ["0.1", None, [], -1.0, {"$float": "nan"}, {"$float": "inf"}, True, {}, 10**400],
        "betas": ["x", [0.9], [0.9, 2.0], [0.9, "y"], None, 0.9], "eps": ["x", -1.0, None],
        "momentum": ["x", -1.0, None], "nesterov": ["yes", 3, None], "weight_decay": ["0", -1.0, None],
        "tau": [-1.0, "x", None, {"$float": "nan"}], "band": [3, "midle", None], "sigma_max": ["x", -1.0, [], 0],
        "roles": [5, ["U"], ["U"] * len(group["params"])], "param_names": [5, ["a"], ["a"] * len(group["params"])],
        "max_iter": ["x", None], "history_size": ["x", None],
    }  # fmt: skip
    for key, values in changes.items():
        for value in values if key in group else ():
            assert lie(lambda o, k=key, v=value: o["state"]["param_groups"][0].update({k: v})), (key, value)
    assert lie(lambda o: o["state"]["param_groups"][0].pop("lr"))
    renamed = {("lq" if key == "lr" else key): value for key, value in group.items()}
    assert lie(lambda o: o["state"].update(param_groups=[renamed]))

    for value in (None, 5, "x", [], {"x": {}}):
        assert lie(lambda o, v=value: o["state"].update(state=v)), value
    for value in (5, "x", [], None):
        assert lie(lambda o, v=value: o["state"]["state"]["$dict"][0].__setitem__(1, v)), value
    assert lie(lambda o: o["state"]["state"]["$dict"][0].__setitem__(0, 99))
    assert lie(lambda o: o["state"]["state"]["$dict"][0].__setitem__(0, "0"))
    for value in ("x", 3, [], {"$tensor": "0.S"}, True):
        assert lie(lambda o, v=value: o["state"]["state"]["$dict"][0][1].update({buffer: v})), value
    if "step" in entry:
        for value in ("x", -3.0, {"$float": "nan"}, None, True):
            assert lie(lambda o, v=value: o["state"]["state"]["$dict"][0][1].update(step=v)), value


def test_a_buffer_of_another_parameter_or_type_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    for kind, key in (("CondLRSGD", "momentum_buffer"), ("CondLRAdamW", "exp_avg"), ("SGD", "momentum_buffer")):
        model, optimizer = trained(kind)
        p = model[0].U
        for bad in (torch.zeros(16), torch.zeros(16, 5, dtype=torch.int32), torch.zeros(16, 5, dtype=torch.complex64)):
            good = optimizer.state[p][key]
            optimizer.state[p][key] = bad
            condlr_ext.save(model, path, optimizer)
            optimizer.state[p][key] = good
            assert f"{key} of parameter '0.U' must be [16, 5] as the parameter is" in attempt(
                path, path.read_bytes(), (model, optimizer)
            )


def test_tensors_of_another_kind_are_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    model = small_mlp()
    model.register_buffer("count", torch.tensor(3))
    for name, value in (
        ("0.U", torch.ones(16, 5, dtype=torch.int32)), ("4.weight", torch.ones(4, 9, dtype=torch.complex64)),
        ("count", torch.tensor(3.5)), ("0.S", torch.ones(5, 5).to(torch.float8_e5m2)),
    ):  # fmt: skip
        condlr_ext.save(model, path)
        save_file(read(path).model | {name: value}, path)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(CheckpointError, match=name.split(".")[-1]):
            condlr_ext.load(model, path)
        assert equal_states(model.state_dict(), before)


@pytest.mark.parametrize("kind,option", [("AdamW", "amsgrad"), ("SGD", "momentum"), ("CondLRSGD", "nesterov")])
def test_options_that_a_file_lacks_keep_their_values(tmp_path, kind, option):
    path = tmp_path / "m.safetensors"
    model, optimizer = trained(kind)
    group = optimizer.param_groups[0]
    value = group.pop(option)
    condlr_ext.save(model, path, optimizer)
    group[option] = value
    condlr_ext.load(model, path, optimizer)
    assert optimizer.param_groups[0][option] == value
    assert attempt(path, path.read_bytes(), (model, optimizer)) is None
