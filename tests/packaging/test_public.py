"""What is public says so, and has types; `make types` looks deeper."""

import importlib
import inspect
from pathlib import Path

import pytest
from helpers import public_api

import condlr_ext

DEFINITIONS = public_api.definitions()


@pytest.mark.parametrize("name", public_api.MODULES)
def test_public_modules_name_what_they_have(name):
    module = importlib.import_module(name)
    assert len(set(module.__all__)) == len(module.__all__)
    assert all(hasattr(module, public) for public in module.__all__)


def test_type_checkers_are_told():
    assert (Path(condlr_ext.__file__).parent / "py.typed").exists()


def functions(thing) -> list:
    if not inspect.isclass(thing):
        return [thing]
    return [
        member
        for name, member in inspect.getmembers(thing, lambda x: inspect.isfunction(x) or inspect.ismethod(x))
        if (name == "__init__" or not name.startswith("_")) and member.__module__.startswith("condlr_ext")
    ]


@pytest.mark.parametrize("name", DEFINITIONS)
def test_arguments_and_results_have_types(name):
    for function in functions(DEFINITIONS[name]):
        signature = inspect.signature(function)
        named = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
        assert not [p.name for p in named if p.annotation is p.empty], function
        assert function.__name__ == "__init__" or signature.return_annotation is not signature.empty, function
