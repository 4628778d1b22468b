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

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 2
COMPILED = ("csrc", "CMakeLists.txt", "setup.py")  # what the compiled parts are made of


def measure(revisions: tuple[str, str], selection: list[str], folder: Path) -> list[Results]:
    """Results of both revisions ("." is the working tree) for these arguments of `python -m bench`, of ROUNDS runs each,
    A B A B, whose files are kept in `folder`. Raises ValueError for what is no revision, ChildProcessError where one
    cannot be built or measured.
    """
    if not (ROOT / "setup.py").exists() or git("rev-parse", "--show-toplevel", check=False) != str(ROOT):
        raise ValueError(
            f"python -m bench --compare: neither result files, nor can {' and '.join(revisions)} be revisions: "
            f"{ROOT} is no git repository of condlr_ext (revisions need an editable install, pip install -e)"
        )
    names = [named(revision) for revision in revisions]
    files = [[], []]
    with contextlib.ExitStack() as trees:
        roots = [trees.enter_context(worktree(revision)) for revision in revisions]
        for turn in range(1, ROUNDS + 1):
            for side, (root, name) in enumerate(zip(roots, names, strict=True)):
                file = (folder / f"{'AB'[side]}-{name}-{turn}.jsonl").resolve()
                print(f"{'AB'[side]}, {name}, run {turn} of {ROUNDS}", file=sys.stderr, flush=True)
                run([sys.executable, "-m", "bench", *selection, "--json", str(file)], root, output=None)
                files[side].append(file)
    return [merge(map(Results.read, found), name) for found, name in zip(files, names, strict=True)]


def named(revision: str) -> str:
    if revision == ".":
        return "working-tree"
    commit = git("rev-parse", "--verify", "--quiet", "--short", f"{revision}^{{commit}}", check=False)
    if not commit:
        raise ValueError(f"python -m bench --compare: {revision!r} is neither a results file nor a revision")
    return commit


@contextlib.contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """A folder with the revision, its compiled parts and the present benchmark; removed afterwards."""
    if revision == ".":
        yield ROOT
        return
    with tempfile.TemporaryDirectory(prefix="condlr-bench-") as folder:
        root = Path(folder) / "tree"
        try:
            git("worktree", "add", "--detach", "--quiet", str(root), revision)
            compile_as_here(revision, root)
            here = Path(__file__).resolve().parent
            shutil.rmtree(root / "condlr_ext" / "bench", ignore_errors=True)
            shutil.copytree(here, root / "condlr_ext" / "bench", ignore=shutil.ignore_patterns("__pycache__"))
            yield root
        finally:
            git("worktree", "remove", "--force", str(root), check=False)
            git("worktree", "prune", check=False)


def compile_as_here(revision: str, root: Path) -> None:
    """Compiled parts as the working tree has them: its own, if made of the same, else built; none if it has none."""
    present = list((ROOT / "condlr_ext").glob("*.so")) + list((ROOT / "condlr_ext").glob("*.pyd"))
    if not present:
        return
    if subprocess.run(["git", "diff", "--quiet", revision, "--", *COMPILED], cwd=ROOT).returncode == 0:
        for file in present:
            shutil.copy2(file, root / "condlr_ext")
        return
    print(f"building {revision}", file=sys.stderr, flush=True)
    run([sys.executable, "setup.py", "build_ext", "--inplace"], root)
    missing = [file.name for file in present if not (root / "condlr_ext" / file.name).exists()]
    if missing:
        raise ChildProcessError(f"python -m bench --compare: {revision} was built without {', '.join(missing)}")


def run(command: list[str], root: Path, output: int | None = subprocess.STDOUT) -> None:
    """In that tree. `output`: where its standard error goes; None: to this process's."""
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    out = subprocess.PIPE if output else subprocess.DEVNULL
    done = subprocess.run(command, cwd=root, env=environment, stdout=out, stderr=output, text=True)
    if done.returncode:
        said = (done.stdout or "").strip().splitlines()[-1:] or ["its error is above"]
        raise ChildProcessError(f"python -m bench --compare: {' '.join(command[1:3])} failed in {root}: {said[0]}")


def git(*arguments: str, check: bool = True) -> str:
    """What git prints, "" where it fails and that is allowed."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError as error:
        raise ValueError(f"python -m bench --compare: no git: {error}") from None
    if done.returncode and check:
        said = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise ChildProcessError(f"python -m bench --compare: git {arguments[0]} failed: {said[0]}")
    return done.stdout.strip() if done.returncode == 0 else ""
