"""Ranks from a budget that is spent evenly over the layers."""

import heapq
import math
import numbers
from collections.abc import Callable
from typing import NamedTuple


class Cost(NamedTuple):
    """Cost of one layer in any unit: `dense`, and non-decreasing `at(rank)` for ranks 1..full."""

    dense: float
    at: Callable[[int], float]
    full: int


def stored_parameters(rank: int, m: int, n: int) -> int:
    return rank * (m + n) + rank * rank


def parameter_cost(m: int, n: int) -> Cost:
    return Cost(m * n, lambda rank: stored_parameters(rank, m, n), min(m, n))


def allocate_ranks(costs: dict[str, Cost], budget: float) -> dict[str, int]:
    """Return ranks that spend a budget evenly: the same amount on every layer.

    Layers whose full rank costs no more than their share take it and leave the surplus to the others, which take the
    largest rank that fits. The remainder buys single ranks, the cheapest first. Every rank is at least 1.

    Args:
        costs: The layers' costs by name.
        budget: Share of the dense cost to spend, > 0.

    Raises:
        ValueError: budget is no number > 0.
    """
    if isinstance(budget, bool) or not isinstance(budget, numbers.Real) or not 0 < budget < math.inf:
        raise ValueError(f"factorize: budget must be a number > 0, got {budget!r}")
    left = budget * sum(cost.dense for cost in costs.values())
    ranks: dict[str, int] = {}
    while remaining := [name for name in costs if name not in ranks]:
        share = left / len(remaining)
        whole = [name for name in remaining if costs[name].at(costs[name].full) <= share]
        if not whole:
            break
        for name in whole:
            ranks[name] = costs[name].full
            left -= costs[name].at(ranks[name])
    for name in remaining:
        ranks[name] = _largest(costs[name], share)
        left -= costs[name].at(ranks[name])

    order = {name: i for i, name in enumerate(costs)}

    def price(name: str) -> tuple[float, int, str]:
        return costs[name].at(ranks[name] + 1) - costs[name].at(ranks[name]), order[name], name

    prices = [price(name) for name in costs if ranks[name] < costs[name].full]
    heapq.heapify(prices)
    while prices and prices[0][0] <= left:
        amount, _, name = heapq.heappop(prices)
        ranks[name] += 1
        left -= amount
        if ranks[name] < costs[name].full:
            heapq.heappush(prices, price(name))
    return ranks


def _largest(cost: Cost, share: float) -> int:
    """Find the largest rank that costs no more than the share, by bisection; 1 if none does."""
    low, high = 1, cost.full
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost.at(middle) <= share * (1 + 1e-12) else (low, middle - 1)
    return low
