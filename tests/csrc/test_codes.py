"""The numbers of csrc/core/info.h are those of the Python side."""

import re
from pathlib import Path

from condlr_ext import reference
from condlr_ext.kernels import status

SOURCE = (Path(__file__).parents[2] / "csrc/core/info.h").read_text()


def enum(name):
    body = re.search(rf"enum {name} : int {{(.*?)}};", SOURCE)[1]
    return {key: int(value) for key, value in re.findall(r"(\w+) = (\d+)", body)}


def test_status_codes():
    names = dict(OK="kOk", NOT_CONVERGED="kNotConverged", NOT_FINITE="kNotFinite", ALL_ZERO="kAllZero")
    assert enum("Info") == {names[name]: value for name, value in vars(status).items() if name.isupper()}


def test_bands():
    assert enum("Band") == {f"k{name.title()}": i for i, name in enumerate(reference.BANDS)}
