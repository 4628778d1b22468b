"""What is public: the names in `__all__` of these modules, and their members without an underscore."""

import importlib

AREAS = (
    "attacks", "baselines", "errors", "factorize", "functional", "io.checkpoint", "io.importers", "io.lora", "linalg",
    "nn", "optim", "pruning", "regularizers", "robustness",
)  # fmt: skip
MODULES = ("condlr_ext", *(f"condlr_ext.{area}" for area in AREAS))


def definitions() -> dict[str, object]:
    """Return the public functions and classes by the names under which they are defined."""
    found = {}
    for name in MODULES:
        module = importlib.import_module(name)
        for thing in (getattr(module, public) for public in module.__all__):
            if hasattr(thing, "__qualname__"):
                found[f"{thing.__module__}.{thing.__qualname__}"] = thing
    return found
