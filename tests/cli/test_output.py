"""What the command prints under any locale, and to closed streams; the environment and errors of the system."""

import ast
import io
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import condlr_ext
from condlr_ext.cli import commands, main
from condlr_ext.cli.output import ASCII
from condlr_ext.experiments.checkpoint import load_checkpoint

PACKAGE = Path(condlr_ext.__file__).parent
TRAIN = "train --run condlr:tau=0.1 --run vanilla --epochs 1 --attack-steps 1 --attacks fgsm --eps 0.1 --out".split()


def condlr(*argv, redirected="", **env):
    """Run the command in a process of its own, by a shell that may close its streams."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "PYTHONIO", "PYTHONUTF"))} | env
    line = f"{shlex.join([sys.executable, '-m', 'condlr_ext', *map(str, argv)])} {redirected}"
    return subprocess.run(["sh", "-c", line], env=env | {"PYTHONPATH": str(PACKAGE.parent)}, capture_output=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a training in an ASCII locale."""
    out = tmp_path_factory.mktemp("output") / "out"
    done = condlr(*TRAIN, out, LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    printed = done.stdout.decode("ascii")
    assert "max kappa" in printed and "CondLR tau=0.1" in printed and "||U^TU-I||" in printed
    assert "CondLR tau=0.1" in done.stderr.decode("ascii")  # the bar
    return out


def test_files_are_utf_8_whatever_the_locale(trained):
    assert "max κ" in (trained / "table.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_every_encoding_takes_the_output(trained, monkeypatch, encoding):
    path = str(trained / "condlr-tau0.1-budget0.27-seed0.safetensors")
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    for argv in (["--help"], ["train", "--help"]):
        with pytest.raises(SystemExit):
            main(argv)
    for argv in (["inspect", path], ["evaluate", path], ["info"]):
        assert main(argv) == 0
    assert main(["inspect", "κ-中.safetensors"]) == 2
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams.values() if not stream.flush())
    assert "kappa" in out and "\\u" not in out
    assert err.startswith("condlr: error: cannot read kappa-\\u4e2d.safetensors")


def test_every_letter_that_the_package_prints_has_ascii():
    missing = {}
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]  # documentation
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in texts:
                letters = {x for x in node.value if not x.isascii()} - set(ASCII)
                if letters:
                    missing[f"{path.name}:{node.lineno}"] = letters
    assert not missing


def test_closed_streams(tmp_path, monkeypatch):
    done = condlr(*TRAIN, tmp_path / "out", redirected="<&- >&- 2>&-")
    assert done.returncode == 0 and (tmp_path / "out" / "results.csv").is_file()
    done = condlr("info", redirected=">&-")
    assert done.returncode == 0 and not done.stderr
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["inspect", "absent"]) == 2


@pytest.mark.parametrize("name", ["CONDLR_EXT_BACKEND", "CONDLR_EXT_ISA"])
def test_errors_of_the_environment_name_the_variable(trained, tmp_path, name):
    if name == "CONDLR_EXT_ISA" and not condlr_ext.ops.COMPILED.host:
        pytest.skip("needs the compiled kernels")
    path = trained / "condlr-tau0.1-budget0.27-seed0.safetensors"
    for argv in (["inspect", path], [*TRAIN, tmp_path / "out"]):
        done = condlr(*argv, **{name: "foo"})
        assert done.returncode == 2 and done.stderr.count(b"\n") == 1
        assert name.encode() in done.stderr and b"'foo'" in done.stderr and b"safetensors" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_not_blamed_for_the_environment(trained, monkeypatch):
    monkeypatch.setattr(condlr_ext.ops._dispatch._choice, "name", "foo")
    path = trained / "condlr-tau0.1-budget0.27-seed0.safetensors"
    for load in (load_checkpoint, lambda file: condlr_ext.load(torch.nn.Linear(2, 2), file)):
        with pytest.raises(ValueError, match="^CONDLR_EXT_BACKEND must be one of"):
            load(path)


@pytest.mark.parametrize(
    "error, text",
    [
        (RuntimeError("cannot\n  allocate"), "cannot allocate"),
        (RecursionError("too deep"), "too deep"),
        (MemoryError(), "out of memory"),
        (OverflowError("too large"), "too large"),
    ],
)
def test_errors_of_the_system_are_one_line(monkeypatch, capsys, error, text):
    def fail(arguments):
        raise error

    monkeypatch.setattr(commands, "info", fail)
    assert main(["info"]) == 2
    assert capsys.readouterr().err == f"condlr: error: {text}\n"


def test_sizes_that_no_machine_has(trained, capsys, tmp_path):
    path = str(trained / "condlr-tau0.1-budget0.27-seed0.safetensors")
    assert main(["inspect", path, "--batch-size", "999999999999"]) == 0  # it allocates nothing
    capsys.readouterr()
    assert main(["evaluate", path, "--threads", "1000000000"]) == 2
    assert "--threads must be in 1..1024, got 1000000000" in capsys.readouterr().err
    deep = tmp_path / "deep.toml"
    deep.write_text("lr = " + "[" * 100_000, encoding="utf-8")
    assert main(["train", "--config", str(deep)]) == 2
    assert f"{deep} is no TOML file" in capsys.readouterr().err


def test_files_are_opened_with_an_encoding():
    """Without one, the locale decides what a file holds."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(call.func).rpartition(".")[2] if isinstance(call, ast.Call) else ""
            own = isinstance(call, ast.Call) and ast.unparse(call.func) == "read_text"  # _files.read_text: UTF-8
            if (
                own
                or name not in ("open", "read_text", "write_text")
                or any(k.arg == "encoding" for k in call.keywords)
            ):
                continue
            modes = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            if name != "open" or "a" in modes or "w" in modes or "r" in modes:
                found.append(f"{path.relative_to(PACKAGE)}:{call.lineno}: {ast.unparse(call)}")
    assert not found
