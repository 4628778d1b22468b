"""Packages only the experiments need, imported when they are used."""

from .. import _extras


def require(module: str):
    """The module, or an ImportError that says how to install it."""
    return _extras.require(module, "this command", module if module == "tensorboard" else "demo")
