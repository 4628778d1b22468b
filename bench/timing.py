"""Timing of several calls in turn."""

import numpy as np

from .registry import TimedCall

QUANTILES = (0.2, 0.5, 0.8)
LEAST = 3  # samples
BRIEF = 0.1  # seconds from which on a run is a sample of its own: what others left in the caches does not matter


def interleave(
    device,
    calls: list[TimedCall],
    shares: list[float],
    seconds: float,
    rounds: int,
    cold: bool,
    failed: dict[int, Exception],
    lasting: float = 0.01,
) -> list[list[float]]:
    """Samples of each call in seconds, taken in turn until each has had its `rounds`, or its share of `seconds` is over
    (at least LEAST). The first turn warms up and is no sample. With warm caches a sample of a short call is the mean of
    as many runs, two at least, as last `lasting` seconds. A call that raises ends in `failed`, without samples.
    """
    samples, spent, numbers = [[] for _ in calls], [0.0] * len(calls), [1] * len(calls)
    for turn in range(max(rounds, LEAST) + 1):
        for i, call in enumerate(calls):
            if i in failed or (len(samples[i]) >= LEAST and spent[i] >= seconds * shares[i]):
                continue
            try:
                if turn:
                    samples[i].append(device.seconds(call, numbers[i], cold))
                    spent[i] += samples[i][-1] * numbers[i]
                else:
                    numbers[i] = number(device, call, cold, lasting)
            except Exception as error:  # of other inputs than were judged, or for lack of memory
                failed[i], samples[i] = error, []
                device.synchronize()  # raises where the device is lost
    return samples


def number(device, call: TimedCall, cold: bool, lasting: float) -> int:
    """Runs in a sample."""
    time = device.seconds(call, 1, cold)
    if cold or time >= BRIEF:
        return 1
    time = device.seconds(call, max(2, int(lasting / max(time, 1e-9))), cold)  # the first run may have been slow
    return max(2, int(lasting / max(time, 1e-9)))


def quantiles(samples: list[float]) -> list[float]:
    return np.quantile(samples, QUANTILES).tolist()
