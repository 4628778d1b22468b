"""Files that are whole or absent."""

from pathlib import Path

import pytest

from condlr_ext._files import write_whole


def test_files_are_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    write_whole(path, b"old")
    write = Path.write_bytes

    def disk_full(self, content):
        write(self, content[:2])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", disk_full)
    with pytest.raises(OSError, match="no space left"):
        write_whole(path, b"new content")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.bin"]
