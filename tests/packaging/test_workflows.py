"""The workflows of .github ask for what exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.stem)
def test_commands_exist(path):
    text = path.read_text()
    for words in re.findall(r"(?:run: |\")make ([a-z -]+)", text):
        assert set(words.split()) <= TARGETS, words
    for file in re.findall(r"python (?:checkout/)?([\w/]+\.py)", text):
        assert (ROOT / file).is_file(), file
