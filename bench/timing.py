"""Time several calls in turn."""

import numpy as np

from .registry import TimedCall

QUANTILES = (0.2, 0.5, 0.8)
LEAST = 3  # samples
BRIEF = 0.1  # seconds from which on a run is a sample of its own: the caches left by others do not matter


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
    """Sample the calls in turn, after one turn that warms up.

    Args:
        device: Has the clock.
        calls: The calls.
        shares: Of `seconds`, after which a call gets no further sample beyond LEAST.
        seconds: For each call.
        rounds: Most samples of each call.
        cold: Whether each run finds empty caches.
        failed: Takes the exception of a call that raises, which then has no samples.
        lasting: Seconds that a sample of a short call with warm caches lasts: it is the mean of as many runs, at least
            two.

    Returns:
        Seconds of each sample of each call.
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
                    numbers[i] = runs_per_sample(device, call, cold, lasting)
            except Exception as error:  # on other inputs than the checked ones, or for lack of memory
                failed[i], samples[i] = error, []
                device.synchronize()  # raises where the device is lost
    return samples


def runs_per_sample(device, call: TimedCall, cold: bool, lasting: float) -> int:
    time = device.seconds(call, 1, cold)
    if cold or time >= BRIEF:
        return 1
    time = device.seconds(call, max(2, int(lasting / max(time, 1e-9))), cold)  # the first run may have been slow
    return max(2, int(lasting / max(time, 1e-9)))


def quantiles(samples: list[float]) -> list[float]:
    return np.quantile(samples, QUANTILES).tolist()
