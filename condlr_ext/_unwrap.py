"""The model inside of wrappers, whose names all share a prefix that is none of the model's."""

from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The module in DistributedDataParallel, DataParallel and torch.compile, or model itself."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile
            model = model._orig_mod
        else:
            return model
