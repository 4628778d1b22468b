"""Packages only the experiments need, imported when they are used."""

import importlib


def require(module: str):
    """The module, or an ImportError that says how to install it."""
    package = module.split(".")[0]
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ImportError(f"this command needs {package}: pip install 'condlr_ext[demo]'") from None
    return importlib.import_module(module)
