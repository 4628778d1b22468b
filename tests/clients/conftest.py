"""Fixtures of the tests with packages of others: quiet, offline, and a torchvision that can be imported."""

import os
import warnings

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "NO_ALBUMENTATIONS_UPDATE": "1"}

import pytest
import torch
from helpers.clients import import_torchvision

import_torchvision()


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
