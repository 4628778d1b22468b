"""Git revisions in worktrees of their own, on a small repository."""

import subprocess

import pytest

from bench import revisions


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Two commits; the second changes csrc. setup.py builds condlr_ext/_C.so out of csrc/code, or fails."""
    root = tmp_path / "repository"
    (root / "condlr_ext").mkdir(parents=True)
    (root / "bench").mkdir()
    (root / "csrc").mkdir()
    (root / "condlr_ext" / "__init__.py").write_text("")
    (root / "bench" / "old.py").write_text("")
    (root / ".gitignore").write_text("*.so\n")
    (root / "CMakeLists.txt").write_text("")
    (root / "setup.py").write_text(
        "from pathlib import Path\ncode = Path('csrc/code').read_text()\n"
        "if code == 'faulty': raise SystemExit('no such instruction')\n"
        "Path('condlr_ext/_C.so').write_text('built ' + code)\n"
    )
    for code in ("faulty", "one", "two"):
        (root / "csrc" / "code").write_text(code)
        git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b"]
        if code == "faulty":
            subprocess.run([*git, "init", "--quiet"], check=True)
        subprocess.run([*git, "add", "-A"], check=True)
        subprocess.run([*git, "commit", "--quiet", "-m", code], check=True)
    (root / "condlr_ext" / "_C.so").write_text("present")
    monkeypatch.setattr(revisions, "ROOT", root.resolve())
    return root


def trees():
    return revisions.git("worktree", "list").splitlines()


def test_worktree_of_the_same_sources(repository):
    with revisions.worktree("HEAD") as root:
        assert (root / "condlr_ext" / "_C.so").read_text() == "present"
        assert (root / "bench" / "tables.py").exists() and not (root / "bench" / "old.py").exists()
        assert len(trees()) == 2
    assert not root.exists() and len(trees()) == 1


def test_worktree_of_other_sources_is_built(repository):
    with revisions.worktree("HEAD~1") as root:
        assert (root / "condlr_ext" / "_C.so").read_text() == "built one"


def test_a_build_that_fails(repository):
    with pytest.raises(ChildProcessError, match=r"setup\.py build_ext failed in .*: no such instruction"):
        with revisions.worktree("HEAD~2"):
            pass
    assert len(trees()) == 1


def test_nothing_is_built_where_nothing_is(repository):
    (repository / "condlr_ext" / "_C.so").unlink()
    with revisions.worktree("HEAD~2") as root:
        assert not (root / "condlr_ext" / "_C.so").exists()


def test_worktrees_go_when_the_measurement_fails(repository, tmp_path):
    with pytest.raises(ChildProcessError, match="-m bench failed"):  # the small package has no linalg
        revisions.measure(("HEAD", "HEAD~1"), ["clip"], tmp_path / "out")
    assert len(trees()) == 1


def test_no_revision(repository, tmp_path):
    with pytest.raises(ValueError, match="'nonsense' is neither a results file nor a revision"):
        revisions.measure(("HEAD", "nonsense"), [], tmp_path)


def test_no_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(revisions, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="no git repository of condlr_ext"):
        revisions.measure(("HEAD", "."), [], tmp_path)
