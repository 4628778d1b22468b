"""The README's example runs as written."""

import re
from pathlib import Path

import condlr_ext
from bench import tables

README = Path(__file__).parents[2] / "README.md"


def test_example(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    namespace = {}
    exec(code, namespace)
    assert "256 x 64" in capsys.readouterr().out
    assert [type(m).__name__ for m in namespace["model"]] == ["Linear", "ReLU"] * 2 + ["Linear"]
    assert namespace["x_adv"].shape == (32, 64)
    assert isinstance(namespace["optimizer"], condlr_ext.optim.CondLRSGD)


def test_names_in_the_api_table_exist():
    table = README.read_text().split("| | |\n")[1].split("\n\n")[0]
    columns = [re.split(r"(?<!\\) \|", line)[0] for line in table.splitlines()[1:]]
    names = [name for column in columns for name in expand(re.findall(r"`([^`]*)`", column))]
    assert {"factorize", "optim.CondLRSGD", "linalg.cond", "functional.low_rank_conv3d", "attacks.pgd"} <= set(names)
    for name in names:
        target = condlr_ext
        for part in name.split("."):
            target = getattr(target, part)


def expand(cells):
    """["linalg.svd, qr"] -> linalg.svd, linalg.qr; ["Conv1d/2d/3d"] -> Conv1d, Conv2d, Conv3d; arguments dropped."""
    names = [name for cell in cells for name in re.sub(r"\(.*", "", cell).split(", ")]
    prefix = names[0].rpartition(".")[0]
    for name in names:
        name = f"{prefix}.{name}" if prefix and "." not in name else name
        numbered = re.match(r"(.*)(1d/2d/3d|\{1,2,3\}d)$", name)
        yield from [f"{numbered[1]}{d}d" for d in (1, 2, 3)] if numbered else [name]


def test_benchmark_tables_are_those_of_the_results():
    text = README.read_text()
    assert text.count("<!-- python -m bench ") >= 5
    assert tables.rewrite(text, README.parent) == text
