"""Two git revisions measured by the present benchmark, in turn, each in a worktree of its own."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .compare import merge
from .records import Results

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 2
SOURCES = ("csrc", "CMakeLists.txt", "setup.py")  # of the compiled parts


def measure(revisions: tuple[str, str], arguments: list[str], folder: Path) -> list[Results]:
    """Measure two revisions, A B A B.

    Args:
        revisions: Of git; "." is the working tree.
        arguments: Of `python -m bench`.
        folder: Takes the results file of each of the ROUNDS runs of each revision.

    Raises:
        ValueError: This is no git checkout, or one is no revision.
        ChildProcessError: A revision cannot be built or measured.
    """
    if git("rev-parse", "--show-toplevel", check=False) != str(ROOT):
        raise ValueError(
            f"--compare: neither result files, nor can {' and '.join(revisions)} be revisions: {ROOT} is no git"
            " repository of condlr_ext"
        )
    names = [named(revision) for revision in revisions]
    files = [[], []]
    with contextlib.ExitStack() as trees:
        roots = [trees.enter_context(worktree(revision)) for revision in revisions]
        for turn in range(1, ROUNDS + 1):
            for side, (root, name) in enumerate(zip(roots, names, strict=True)):
                file = (folder / f"{'AB'[side]}-{name}-{turn}.jsonl").resolve()
                print(f"{'AB'[side]}, {name}, run {turn} of {ROUNDS}", file=sys.stderr, flush=True)
                command = [sys.executable, "-m", "bench", *arguments, "--no-prepare", "--json", str(file)]
                run(command, root, accepted=(0, 1))  # 1: something of ours is wrong there
                if not file.exists():
                    raise ChildProcessError(f"--compare: -m bench failed in {root}: its error is above")
                files[side].append(file)
    return [merge(map(Results.read, found), name) for found, name in zip(files, names, strict=True)]


def named(revision: str) -> str:
    if revision == ".":
        return "working-tree"
    commit = git("rev-parse", "--verify", "--quiet", "--short", f"{revision}^{{commit}}", check=False)
    if not commit:
        raise ValueError(f"--compare: {revision!r} is neither a results file nor a revision")
    return commit


@contextlib.contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """Check out the revision beside the present benchmark, with compiled parts if the working tree has some."""
    if revision == ".":
        yield ROOT
        return
    with tempfile.TemporaryDirectory(prefix="condlr-bench-") as folder:
        root = Path(folder) / "tree"
        try:
            git("worktree", "add", "--detach", "--quiet", str(root), revision)
            compile_as_here(revision, root)
            shutil.rmtree(root / "bench", ignore_errors=True)
            ignored = shutil.ignore_patterns("__pycache__", "results")
            shutil.copytree(Path(__file__).resolve().parent, root / "bench", ignore=ignored)
            yield root
        finally:
            git("worktree", "remove", "--force", str(root), check=False)
            git("worktree", "prune", check=False)


def compile_as_here(revision: str, root: Path) -> None:
    """Copy the compiled parts of the working tree if they are made of the same sources, else build them."""
    present = [file for suffix in ("so", "pyd") for file in (ROOT / "condlr_ext").glob(f"*.{suffix}")]
    if not present:
        return
    if subprocess.run(["git", "diff", "--quiet", revision, "--", *SOURCES], cwd=ROOT).returncode == 0:
        for file in present:
            shutil.copy2(file, root / "condlr_ext")
        return
    print(f"building {revision}", file=sys.stderr, flush=True)
    run([sys.executable, "setup.py", "build_ext", "--inplace"], root, quiet=True)
    missing = [file.name for file in present if not (root / "condlr_ext" / file.name).exists()]
    if missing:
        raise ChildProcessError(f"--compare: {revision} was built without {', '.join(missing)}")


def run(command: list[str], root: Path, quiet: bool = False, accepted: tuple[int, ...] = (0,)) -> None:
    """Run a command in that tree, with its errors on this process's stderr unless `quiet`."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    out, err = (subprocess.PIPE, subprocess.STDOUT) if quiet else (subprocess.DEVNULL, None)
    done = subprocess.run(command, cwd=root, env=environment, stdout=out, stderr=err, text=True)
    if done.returncode not in accepted:
        said = (done.stdout or "").strip().splitlines()[-1:] or ["its error is above"]
        raise ChildProcessError(f"--compare: {' '.join(command[1:3])} failed in {root}: {said[0]}")


def git(*arguments: str, check: bool = True) -> str:
    """Return git's output; "" where it fails and `check` is false."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError as error:
        raise ValueError(f"--compare: no git: {error}") from None
    if done.returncode and check:
        said = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise ChildProcessError(f"--compare: git {arguments[0]} failed: {said[0]}")
    return done.stdout.strip() if done.returncode == 0 else ""
