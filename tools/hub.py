"""`make hub`: the batched linear algebra as a package in the format of Hugging Face's kernels, in dist/hub/.

A kernel may import torch, Triton and itself, so the modules that it needs are copied beside the sources in hub/, with
their places in the package kept. `build.toml` and `torch-ext` are what kernel-builder takes; `build` is what
`kernels.get_local_kernel` loads. Nothing is compiled, so every variant has the same files.
"""

import base64
import hashlib
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME, PACKAGE, VERSION = "condlr-linalg", "condlr_linalg", 1
BACKENDS = ("cpu", "cuda", "rocm")
MODULES = (
    "reference.py", "kernels/*.py", "kernels/triton/*.py", "kernels/triton/spectral/*.py", "kernels/triton/qr/*.py",
    "kernels/triton/runtime/*.py",
)  # fmt: skip


def build(folder: Path) -> Path:
    """Write the package into a new folder named after it, and return that."""
    target = folder / NAME
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(ROOT / "hub", target, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(ROOT / "LICENSE", target)
    source = target / "torch-ext" / PACKAGE
    for pattern in MODULES:
        for module in (ROOT / "condlr_ext").glob(pattern):
            copy = source / module.relative_to(ROOT / "condlr_ext")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(module, copy)
    files = sorted(path for path in source.rglob("*.py"))
    digests = {str(path.relative_to(source)): _digest(path.read_bytes()) for path in files}
    mark = hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:10]
    for backend in BACKENDS:
        variant = target / "build" / f"torch-{backend}"
        shutil.copytree(source, variant)
        metadata = {
            "name": NAME,
            "id": f"_{PACKAGE}_{backend}_{mark}",  # the name of the module, so that two versions may be loaded
            "version": VERSION,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": digests},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return target


def _digest(content: bytes) -> str:
    return base64.b64encode(hashlib.sha256(content).digest()).decode()


if __name__ == "__main__":
    print(build(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "dist" / "hub"))
