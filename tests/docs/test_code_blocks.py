"""Every code block of the README and the documentation runs, or is parsed, or says why it cannot run here."""

import functools
import re
import shlex
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import bench.__main__ as bench
from condlr_ext import cli
from condlr_ext.experiments import checkpoint, study
from condlr_ext.experiments.config import TrainConfig
from condlr_ext.experiments.methods import METHODS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"python", "sh", "toml", "text", "markdown"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SKIPPED = re.compile(r"<!-- not run: ([^\n]+) -->\n$")
OTHER_COMMANDS = ("pip install ", "export ", "git ", "cd ")  # of a reader's shell, not ours


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    line: int
    skipped: str | None


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    for fence in FENCE.finditer(text):
        reason = SKIPPED.search(text[: fence.start()])
        line = text[: fence.start()].count("\n") + 2
        found.append(Block(fence[1], fence[2], line, reason and reason[1]))
    return found


def pages(language: str):
    chosen = [page for page in PAGES if any(block.language == language for block in blocks(page))]
    return pytest.mark.parametrize("page", chosen, ids=lambda page: str(page.relative_to(ROOT)))


@pages("python")
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # inductor would compile C++ for a minute; that compiled models work is tested in tests/nn
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    namespace = {}
    for block in blocks(page):
        if block.language == "python" and not block.skipped:
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's own, of its export
                exec(code, namespace)


class Understood(Exception):
    """A command was parsed and its settings are right."""


@pages("sh")
def test_commands_exist(page, monkeypatch):
    def stop(*args, **options):
        raise Understood

    monkeypatch.chdir(ROOT)
    for module, name in ((study, "train"), (checkpoint, "evaluate_checkpoint"), (checkpoint, "inspect_checkpoint")):
        monkeypatch.setattr(module, name, stop)
    for block in blocks(page):
        if block.language == "sh" and not block.skipped:
            for line in block.text.replace("\\\n", " ").splitlines():
                if line.strip() and not line.startswith("#"):
                    check(line)


def check(line: str) -> None:
    words = shlex.split(line, comments=True)
    if words[:3] == ["python", "-m", "bench"]:
        bench.parse(words[3:])
    elif words[:2] == ["condlr", "info"]:
        assert cli.main(words[1:]) == 0
    elif words[0] == "condlr":
        try:
            pytest.fail(f"{line!r} ends with {cli.main(words[1:])}")
        except Understood:
            pass
    elif words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets, f"no make target for {line!r}"
    elif words[:2] == ["python", "-m"]:
        assert (ROOT / words[2] / "__main__.py").is_file(), f"no package for {line!r}"
    else:
        assert line.startswith(OTHER_COMMANDS), f"what is {line!r}?"


def test_every_method_is_in_the_table_of_the_command_line():
    """The table lists its options, apart from those that all methods take."""
    page = (ROOT / "docs" / "guide" / "command-line.md").read_text()
    rows = re.findall(r"^\| (`[^|]*) \|[^|]*\|([^|]*)\|$", page, re.MULTILINE)
    shown = {
        name: set(re.findall(r"`(\w+)", options))
        for names, options in rows
        for name in re.findall(r"`([\w-]+)`", names)
    }
    rates = {"lr", "momentum", "weight_decay"}
    assert shown == {name: set(method.model_fields) - rates for name, method in METHODS.items()}


@pages("toml")
def test_settings_are_read(page, tmp_path):
    for block in blocks(page):
        if block.language == "toml":
            file = tmp_path / "settings.toml"
            file.write_text(block.text)
            TrainConfig.read(file)


def test_blocks_name_their_language_and_fit_the_page():
    for page in PAGES:
        for block in blocks(page):
            where = f"{page.relative_to(ROOT)}:{block.line}"
            assert block.language in LANGUAGES, f"{where}: language {block.language!r}"
            assert max(map(len, block.text.splitlines())) <= 120, where


def test_few_blocks_are_left_out():
    """They need packages or devices that are missing here; look at the list when it grows."""
    skipped = [(page.name, block.skipped) for page in PAGES for block in blocks(page) if block.skipped]
    assert [x for x in skipped if "make test-clients runs it" not in x[1]] == [("workflows.md", "needs a GPU")]
