"""Optional packages, imported when they are used."""

import importlib


def require(module: str, user: str = "this command", extra: str = "demo"):
    """Import and return an optional module.

    Raises:
        ImportError: It is not installed; the text names `user` and the extra of this package that installs it.
    """
    package = module.split(".")[0]
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ImportError(f"{user} needs {package}: pip install 'condlr_ext[{extra}]'") from None
    return importlib.import_module(module)
