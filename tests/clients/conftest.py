"""Fixtures of the tests with packages of others: quiet, offline, and a torchvision that can be imported."""

import os
import warnings

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "NO_ALBUMENTATIONS_UPDATE": "1"}

import pytest
import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:  # its compiled part is for another torch: without two operators of detection, the rest imports
    OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(autouse=True)
def quiet():
    """Warnings are the packages' own; theirs are not ours to judge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(autouse=True)
def as_clients_run(seeded_and_poisoned):
    """Without deterministic algorithms, which poison memory that some packages rely on."""
    torch.use_deterministic_algorithms(False)
