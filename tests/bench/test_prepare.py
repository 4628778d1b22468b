"""Before a run on a GPU: what this machine lacks, the build, the tests marked gpu."""

import importlib
import time

import pytest

from bench import prepare


@pytest.mark.parametrize("package", ["torch", "triton", "numpy"])
def test_a_missing_package_is_named(monkeypatch, package):
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: None if name == package else name)
    with pytest.raises(ValueError, match=f"^{package} is not installed"):
        prepare.check()


@pytest.mark.parametrize("package, version", [("torch", "2.9.1+cu128"), ("triton", "3.5.1")])
def test_an_old_package_is_named(monkeypatch, package, version):
    monkeypatch.setattr(importlib.import_module(package), "__version__", version)
    with pytest.raises(ValueError, match=rf"^{package} >= .* is needed, got {version[:5]}"):
        prepare.check()


def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="interpreted, not measured"):
        prepare.check()


def test_red_tests_are_counted(tmp_path, capsys):
    file = tmp_path / "test_red.py"
    file.write_text(
        "import pytest\npytestmark = pytest.mark.gpu\ndef test_good(): pass\ndef test_bad(): assert 1 == 2\n"
    )
    found = prepare.test(100, [file])
    assert {name: found[name] for name in ("tests", "failures", "errors", "skipped", "status")} == {
        "tests": 2, "failures": 1, "errors": 0, "skipped": 0, "status": 1,
    }  # fmt: skip
    assert [name.split("::")[1] for name in found["failed"]] == ["test_bad"]
    assert "assert 1 == 2" in capsys.readouterr().out


def test_the_tests_of_all_folders_are_run(monkeypatch):
    commands = []
    monkeypatch.setattr(prepare, "execute", lambda command, seconds, grace: commands.append(command) or (0, ""))
    prepare.test(100)
    assert any(path.endswith("tests/bench/test_cuda.py") for path in commands[0])


def test_what_runs_too_long_is_killed_with_its_children():
    start = time.monotonic()
    assert prepare.execute(["sh", "-c", "echo before; sleep 60 & sleep 60"], 0.5) == (None, "before\n")
    told = "trap 'echo summary; exit 2' INT; echo before; while :; do sleep 0.1; done"
    assert prepare.execute(["sh", "-c", told], 0.5, grace=5) == (None, "before\nsummary\n")
    deaf = "trap '' INT; echo before; sleep 60 & sleep 60"
    assert prepare.execute(["sh", "-c", deaf], 0.5, grace=0.5) == (None, "before\n")
    assert time.monotonic() - start < 30


def test_a_build_that_fails_says_why(monkeypatch, capsys):
    monkeypatch.setattr(prepare, "execute", lambda command, seconds: (1, "configuring\nsetup.py: no cmake\n"))
    found = prepare.build(60)
    assert found["built"] is False and found["reason"] == "setup.py: no cmake"
    assert capsys.readouterr().out == "without a new _C: setup.py: no cmake\n"
