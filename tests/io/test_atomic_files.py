"""Interrupted writing leaves the old file or none."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from helpers.checkpoints import small_mlp
from torch import nn

import condlr_ext


def test_a_failure_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    condlr_ext.save(small_mlp(), path)
    old = path.read_bytes()

    def disk_full(tensors, filename, metadata=None):
        Path(filename).write_bytes(b"half of")
        raise OSError("no space left")

    import safetensors.torch

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", disk_full)
        with pytest.raises(OSError, match=r"save: cannot write .*m\.safetensors: no space left"):
            condlr_ext.save(small_mlp(), path)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["m.safetensors"]
    with pytest.raises(OSError, match="save: cannot write .*absent"):
        condlr_ext.save(small_mlp(), tmp_path / "absent" / "m.safetensors")
    with pytest.raises(ValueError, match="save: 0.U is on the meta device"):
        condlr_ext.save(small_mlp().to("meta"), path)
    assert path.read_bytes() == old


def test_a_killed_process_leaves_the_old_file(tmp_path):
    path = tmp_path / "m.safetensors"
    script = f"""
        import os, signal, pathlib, safetensors.torch, torch, condlr_ext
        condlr_ext.save(torch.nn.Linear(3, 2), {str(path)!r})
        def dies(tensors, filename, metadata=None):
            pathlib.Path(filename).write_bytes(b"half of")
            os.kill(os.getpid(), signal.SIGKILL)
        safetensors.torch.save_file = dies
        condlr_ext.save(torch.nn.Linear(3, 2), {str(path)!r})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=Path(condlr_ext.__file__).parents[2])
    assert done.returncode == -signal.SIGKILL
    condlr_ext.load(nn.Linear(3, 2), path)


def test_the_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events = []
    real = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda f: (events.append(os.path.basename(os.readlink(f"/proc/self/fd/{f}"))), real[0](f))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), real[1](a, b)))
    condlr_ext.save(small_mlp(), tmp_path / "m.safetensors")
    assert events[0].startswith(".m.safetensors.") and events[1:] == ["replace", tmp_path.name]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "latest").symlink_to(tmp_path / "m.safetensors")
    condlr_ext.save(small_mlp(), tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink() and not (tmp_path / "m.safetensors").is_symlink()
    condlr_ext.load(small_mlp(), tmp_path / "m.safetensors")
