"""Short trainings on digits."""

import dataclasses

import torch

from condlr_ext.experiments import TrainConfig, data
from condlr_ext.experiments.networks import build
from condlr_ext.experiments.trainer import Trainer


def small_split(n=256, seed=0):
    split = data.load("digits", seed)
    return dataclasses.replace(
        split,
        x_train=split.x_train[:n],
        y_train=split.y_train[:n],
        x_val=split.x_train[n:500],
        y_val=split.y_train[n:500],
    )


def begin(run, network="mlp", epochs=4, split=None, **settings):
    """Return the Trainer of a run, before its first epoch."""
    split = split or small_split()
    config = TrainConfig(runs=(run,), epochs=epochs, network=network, **settings)
    torch.manual_seed(0)
    return Trainer(config, split, build(network, split.shape, split.classes))
