"""Files that are whole or absent, and small ones of others."""

import pytest

from condlr_ext._files import LARGEST_TEXT, read_text, whole_file, write_whole


def test_files_are_whole_or_absent(tmp_path):
    path = tmp_path / "a.bin"
    write_whole(path, b"old")
    with pytest.raises(OSError, match="no space left"), whole_file(path) as file:
        file.write(b"ne")
        raise OSError("no space left")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_texts_have_a_limit(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * LARGEST_TEXT)
    assert len(read_text(path)) == LARGEST_TEXT
    path.write_bytes(b"x" * (LARGEST_TEXT + 1))
    with pytest.raises(ValueError, match="more than 1048576 bytes"):
        read_text(path)
    with pytest.raises(ValueError, match="more than 1048576 bytes"):
        read_text("/dev/zero")
