"""Interrupted writing leaves the old file or none."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from helpers.checkpoints import equal_states, small_mlp
from torch import nn

import condlr_ext
from condlr_ext._files import whole_file, write_whole
from condlr_ext.errors import CheckpointError
from condlr_ext.io import checkpoint


def test_a_failure_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    condlr_ext.save(small_mlp(), path)
    old = path.read_bytes()

    def disk_full(descriptor):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk_full)
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
        import os, signal, torch, condlr_ext
        condlr_ext.save(torch.nn.Linear(3, 2), {str(path)!r})
        os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
        condlr_ext.save(torch.nn.Linear(3, 2), {str(path)!r})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=Path(condlr_ext.__file__).parents[2])
    assert done.returncode == -signal.SIGKILL
    condlr_ext.load(nn.Linear(3, 2), path)
    (left,) = set(os.listdir(tmp_path)) - {"m.safetensors"}
    other = tmp_path / left.replace("m.safetensors", "m")  # as a writer of the name "m" leaves it
    other.write_bytes(b"")
    condlr_ext.save(nn.Linear(3, 2), path)  # the next save removes what the killed one left
    assert set(os.listdir(tmp_path)) == {"m.safetensors", other.name}


def test_a_save_leaves_the_temporary_file_of_one_that_runs(tmp_path):
    path = tmp_path / "m.safetensors"
    with whole_file(path) as running:
        condlr_ext.save(small_mlp(), path)
        assert len(os.listdir(tmp_path)) == 2
        running.write(b"later")
    assert path.read_bytes() == b"later" and os.listdir(tmp_path) == ["m.safetensors"]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_the_umask_gives_the_mode(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        condlr_ext.save(small_mlp(), tmp_path / "m.safetensors")
        write_whole(tmp_path / "m.toml", b"")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {mode}


@pytest.mark.parametrize("name", ["a" * 250, "b" * 255, "κτ☃ \n", "a\udc80b", "τ" * 127])
def test_every_name_of_a_file_works(tmp_path, name):
    model, other = small_mlp(), small_mlp()
    condlr_ext.save(model, tmp_path / name)
    condlr_ext.load(other, tmp_path / name)
    assert equal_states(model.state_dict(), other.state_dict()) and len(os.listdir(tmp_path)) == 1


def test_names_that_cannot_be_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(os, "fsync", lambda _: pytest.fail("wrote"))
    for name in ("c" * 256, "a\0b", "a\ud800b", "loop", "pipe", ".", "absent/m"):
        with pytest.raises(OSError, match="save: cannot write"):
            condlr_ext.save(small_mlp(), tmp_path / name)
        with pytest.raises(CheckpointError, match="cannot read"):
            condlr_ext.load(small_mlp(), tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["loop", "pipe"]


def test_a_reader_never_sees_two_files(tmp_path):
    """While another process replaces the file by one of another size, header and data belong together."""
    path = tmp_path / "m.safetensors"
    script = f"""
        import torch, condlr_ext
        torch.set_num_threads(1)
        print("ready", flush=True)
        for i in range(1, 10**9):
            width = 1000 + 500 * (i % 2)
            condlr_ext.save(torch.nn.Sequential(torch.nn.Linear(width, 100)), {str(path)!r}, extra=width)
    """
    writer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        cwd=Path(condlr_ext.__file__).parents[2],
    )
    try:
        writer.stdout.readline()
        while not path.exists():
            time.sleep(0.01)
        found = [checkpoint.read(path) for _ in range(200)]
    finally:
        writer.kill()
        writer.wait()
    assert all(each.model["0.weight"].shape == (100, each.extra) for each in found)


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
