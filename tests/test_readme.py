"""The README's example runs as written."""

import re
from pathlib import Path

import condlr_ext

README = Path(__file__).parents[1] / "README.md"


def test_example(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    namespace = {}
    exec(code, namespace)
    assert "256 x 64" in capsys.readouterr().out
    assert [type(m).__name__ for m in namespace["model"]] == ["Linear", "ReLU"] * 2 + ["Linear"]
    assert namespace["x_adv"].shape == (32, 64)
    assert isinstance(namespace["optimizer"], condlr_ext.optim.CondLRSGD)


def test_names_in_the_tables_exist():
    text = README.read_text()
    for name in ("LowRankLinear", "factorize", "to_dense", "condition_numbers", "backend"):
        assert f"`{name}" in text and hasattr(condlr_ext, name)
    for name in ("svd", "qr", "orthonormalize", "polar", "clip_spectrum", "cond"):
        assert name in text and hasattr(condlr_ext.linalg, name)
