"""Timing of several calls in turn."""

import numpy as np

from .registry import Call

QUANTILES = (0.2, 0.5, 0.8)


def interleave(
    device, calls: list[Call], shares: list[float], seconds: float, rounds: int, cold: bool, lasting: float = 0.01
) -> list[list[float]]:
    """Samples of each call in seconds, taken in turn until each has had its `rounds`, or its share of `seconds` is over
    (at least one). With warm caches a sample of a short call is the mean of so many that it lasts `lasting` seconds.
    """
    samples, spent, numbers = [[] for _ in calls], [0.0] * len(calls), [1] * len(calls)
    for _ in range(rounds):
        for i, call in enumerate(calls):
            if samples[i] and spent[i] >= seconds * shares[i]:
                continue
            time = device.seconds(call, numbers[i], cold)
            if not samples[i] and not cold and time < lasting:
                numbers[i] = max(1, int(lasting / max(time, 1e-9)))
                time = device.seconds(call, numbers[i], cold)
            samples[i].append(time)
            spent[i] += time * numbers[i]
    return samples


def quantiles(samples: list[float]) -> list[float]:
    return np.quantile(samples, QUANTILES).tolist()
