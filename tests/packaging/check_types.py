"""`make types`: what is public is wholly typed, with members and base classes, or exit status 1.

A type checker sees what its users see: no Unknown, and nothing that another checker might infer differently.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from helpers import public_api

ROOT = Path(__file__).parents[2]


def symbols() -> dict[str, dict]:
    """Return basedpyright's findings by name."""
    # from the checkout, since a type checker does not follow setuptools' editable installs
    environment = os.environ | {"PYTHONPATH": str(ROOT), "VIRTUAL_ENV": sys.prefix}
    environment["PATH"] = os.pathsep.join([f"{sys.prefix}/bin", os.environ["PATH"]])
    command = ["basedpyright", "--verifytypes", "condlr_ext", "--ignoreexternal", "--outputjson"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return {symbol["name"]: symbol for symbol in json.loads(done.stdout)["typeCompleteness"]["symbols"]}


def is_member(name: str, of: str) -> bool:
    """Return whether the symbol is public, or a special method, in a public class or function, or that itself."""
    parts = name.removeprefix(of).split(".")[1:]
    return name == of or name.startswith(f"{of}.") and all(p[:1] != "_" or p[:2] == "__" for p in parts)


def main() -> int:
    found, checked, bad = symbols(), 0, 0
    for public in public_api.definitions():
        assert public in found, f"basedpyright does not know {public}"
        for name in (name for name in found if is_member(name, public)):
            checked += 1
            if not found[name]["isTypeKnown"]:
                bad += 1
                print(name, *(f"  {diagnostic['message']}" for diagnostic in found[name]["diagnostics"]), sep="\n")
    print(f"types: {checked} public names, {bad} of them not wholly typed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
