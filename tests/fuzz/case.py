"""One random case: its sources of chance, and what it found."""

import math
import random
from collections import Counter

import torch
from torch import Tensor


class Case:
    """A case is what (kind, seed, number) says, alone or after others.

    Attributes:
        random: Source of Python's draws.
        torch: Source of torch's draws.
        counts: What was tried.
        worst: Largest share of its limit that each check has taken.
        faults: Texts, one for each check that failed.
    """

    def __init__(self, kind: str, seed: int, number: int):
        self.random = random.Random(f"{kind} {seed} {number}")
        self.torch = torch.Generator().manual_seed(self.random.getrandbits(60))
        self.counts, self.worst, self.faults = Counter(), {}, []

    def maybe(self, share: float) -> bool:
        """Return True for this share of the cases."""
        return self.random.random() < share

    def power(self, low: float, high: float) -> float:
        """Return a number from 10**low to 10**high."""
        return 10 ** self.random.uniform(low, high)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=self.torch)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=self.torch)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Return whole numbers from low to high as float64."""
        return torch.randint(low, high + 1, shape, generator=self.torch).double()

    def at_most(self, what: str, value, limit, about="") -> None:
        """Check that every value, of which there may be several with limits of their own, is at most its limit."""
        value, limit = (torch.as_tensor(t, dtype=torch.float64) for t in (value, limit))
        if value.numel() == 0:
            return
        share = torch.where(value <= 0, 0.0, value / limit).broadcast_to(
            torch.broadcast_shapes(value.shape, limit.shape)
        )
        most = share.max().item()  # NaN wins
        self.worst[what] = max(self.worst.get(what, 0.0), most if math.isfinite(most) else math.inf)
        if not most <= 1:
            at = int(torch.where(share.isnan(), math.inf, share).argmax())
            got, most = (t.broadcast_to(share.shape).flatten()[at].item() for t in (value, limit))
            self.faults.append(f"{what}: {got:.6g}, at most {most:.6g} was promised; {about}")

    def holds(self, what: str, condition, about="") -> None:
        """Check a condition."""
        if not condition:
            self.faults.append(f"{what}; {about}")
