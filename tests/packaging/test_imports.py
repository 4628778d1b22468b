"""Imports run one way: down the table of layers, never in a circle, and never from one test module to another."""

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).parents[2]

# From the bottom up; a name stands for a module or a whole subpackage. A module imports from rows below its own and
# from its own subpackage, never from a neighbor in its row. Where one part of a layer of the design builds on another
# (adapters on nn, baselines on optim, robustness on attacks, regularizers on pruning), it has a row of its own.
LAYERS = [
    {"_native"},
    {"errors", "_version", "_load", "_cpu", "_extras", "_files", "_modules", "_table", "_types"},
    {"_checks", "_shards", "reference"},
    {"kernels"},
    {"ops"},
    {"autograd"},
    {"functional", "linalg"},
    {"_factors", "nn"},
    {"adapters", "factorize", "parallel"},
    {"optim"},
    {"baselines"},
    {"io"},
    {"attacks", "pruning"},
    {"regularizers", "robustness"},
    {"condlr_ext"},  # the package's own __init__
    {"_installation", "experiments"},
    {"info"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def module_name(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, root: Path) -> set[str]:
    """The dotted names that a file imports, at its top or within functions; `from x import y` counts as x.y."""
    package = module_name(path, root).split(".")
    if path.stem != "__init__":
        package.pop()
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            found.update(".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)
    return found


MODULES = {module_name(path, ROOT): path for path in sorted((ROOT / "condlr_ext").rglob("*.py"))}
IMPORTS = {name: imports(path, ROOT) for name, path in MODULES.items()}


def part(name: str) -> str:
    """The part of the package that a dotted name belongs to: condlr_ext.nn.layer.LowRankLayer -> nn."""
    return (name.split(".") + ["condlr_ext"])[1]


def test_every_module_has_a_layer():
    assert {part(module) for module in MODULES} <= set(LEVEL)


def test_imports_go_down():
    wrong = [
        f"{module} imports {name}"
        for module, names in IMPORTS.items()
        for name in names
        if name.split(".")[0] == "condlr_ext"
        and part(name) != part(module)
        and LEVEL.get(part(name), len(LAYERS)) >= LEVEL[part(module)]
    ]
    assert not wrong


def test_no_circles():
    graph = {}
    for module, names in IMPORTS.items():
        graph[module] = {name if name in MODULES else name.rpartition(".")[0] for name in names} & set(MODULES)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_the_package_stands_alone():
    outside = {"bench", "studies", "examples", "tests", "helpers"}
    for module, names in IMPORTS.items():
        assert not {name.split(".")[0] for name in names} & outside, module


def test_tests_import_no_tests():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in (ROOT / "tests").rglob("*.py")
        for name in imports(path, ROOT / "tests")
        if any(part.startswith("test_") for part in name.split("."))
    ]
    assert not wrong


def test_tests_are_in_folders():
    assert not list((ROOT / "tests").glob("test_*.py"))
