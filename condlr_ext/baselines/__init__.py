"""What the constrained training is compared with."""

from .vanilla import TwoFactorLinear, vanilla_low_rank

__all__ = ["TwoFactorLinear", "vanilla_low_rank"]
