"""The checksum of tensor files: no flipped bit is loaded, and files without one are read."""

import json
import random
import struct

import pytest
import torch
from helpers.checkpoints import make_optimizer, small_mlp
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import condlr_ext
from condlr_ext.errors import CheckpointError
from condlr_ext.io.tensor_files import CHECKSUM, read_tensors, write_tensors

TENSORS = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.tensor(3), "none": torch.empty(0, 2), "c": torch.ones(5).bool()}  # fmt: skip


def test_flipped_bits_are_noticed(tmp_path):
    path = tmp_path / "m.safetensors"
    write_tensors(path, TENSORS, {"format": "pt", "note": "käse"})
    content = path.read_bytes()
    tensors, metadata = read_tensors(path)
    assert all(torch.equal(tensors[name], t) for name, t in TENSORS.items())
    assert metadata == {"format": "pt", "note": "käse"}
    header = 8 + struct.unpack("<Q", content[:8])[0]
    key = range(place := content.index(CHECKSUM.encode()), place + len(CHECKSUM))
    for bit in range(0, 8 * len(content), 7):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            tensors, found = read_tensors(path)
        except CheckpointError as error:
            assert "\n" not in str(error)
            continue
        # in the header JSON has two ways to write an escape, and a key of another name is no checksum
        assert bit // 8 < header and (found == metadata or bit // 8 in key)
        assert tensors.keys() == TENSORS.keys() and all(torch.equal(tensors[name], t) for name, t in TENSORS.items())


def test_flips_in_the_tensors_of_checkpoints_and_loras_are_named(tmp_path):
    torch.manual_seed(0)
    path, model = tmp_path / "m.safetensors", small_mlp()
    condlr_ext.save(model, path, make_optimizer("CondLRAdamW", model))
    adapted = torch.nn.Sequential(torch.nn.Linear(8, 8))
    condlr_ext.add_adapters(adapted, 2)
    condlr_ext.save_lora(adapted, tmp_path / "lora")
    chance = random.Random(0)
    for file, load in (
        (path, lambda: condlr_ext.load(model, path)),
        (tmp_path / "lora" / "adapter_model.safetensors", lambda: condlr_ext.load_lora(adapted, tmp_path / "lora")),
    ):
        content = file.read_bytes()
        start = 8 + struct.unpack("<Q", content[:8])[0]
        for _ in range(20):
            flipped = bytearray(content)
            flipped[chance.randrange(start, len(content))] ^= 1 << chance.randrange(8)
            file.write_bytes(flipped)
            with pytest.raises(CheckpointError, match=f"cannot read {file}: its content is not what was written"):
                load()
        file.write_bytes(content)
        load()


def test_other_tools_read_and_rewrite(tmp_path):
    path = tmp_path / "m.safetensors"
    write_tensors(path, TENSORS, {"format": "pt"})
    assert all(torch.equal(t, TENSORS[name]) for name, t in load_file(path).items())
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(TENSORS | {"a": torch.zeros(3, 4)}, path, metadata)
    with pytest.raises(CheckpointError, match=f"leave {CHECKSUM} out of the metadata"):
        read_tensors(path)
    del metadata[CHECKSUM]
    save_file(TENSORS | {"a": torch.zeros(3, 4)}, path, metadata)
    assert not read_tensors(path)[0]["a"].any()


def test_the_order_in_the_header_does_not_matter(tmp_path):
    path = tmp_path / "m.safetensors"
    write_tensors(path, TENSORS, {"format": "pt"})
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = dict(reversed(json.loads(content[8 : 8 + length]).items()))
    text = json.dumps(header, indent=1).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    assert all(torch.equal(read_tensors(path)[0][name], t) for name, t in TENSORS.items())
