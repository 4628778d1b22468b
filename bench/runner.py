"""Measurement of rows: every provider is made, checked, and only then timed, in turn with the others."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch._dynamo
from torch.utils._pytree import tree_leaves

from .machine import arithmetic
from .registry import Provider, Row, TimedCall
from .timing import interleave, quantiles

SHORT = 5e-4  # seconds below which launches may take most of the time


@dataclass(frozen=True)
class Options:
    """Options of a measurement.

    Attributes:
        seconds: For each provider in each mode.
        rounds: Most samples of each provider.
        caches: "warm", "cold" or both; empty: the device's default.
        compile: "some" (headline shapes), "all" or "none".
        providers: Only these beside ours; empty: all.
        extra: Whether to make an operation's further records, such as the memory of processes of their own.
    """

    seconds: float = 2.0
    rounds: int = 11
    caches: tuple[str, ...] = ()
    compile: str = "some"
    providers: tuple[str, ...] = ()
    extra: bool = True


def measure(row: Row, device, options: Options) -> Iterator[dict]:
    """Yield the records of one row."""
    torch._dynamo.reset()  # or it gives up compiling after a few shapes
    gc.collect()  # problems refer to themselves: tensors of the last one would stay
    operation = row.operation
    with arithmetic(row.dtype):
        reasons: dict[str, str] = {}
        problem = attempt(device, lambda: operation.problem(row.shape, row.dtype, device), reasons, "")
        if problem is None:
            record = _record(row, operation.modes[0], _caches(device, options)[0], "ours", None, [])
            yield record | {"reason": reasons[""]}
            return
        found: dict[str, Provider] = {}
        for name, make in problem.providers.items():
            if selected(name, row, options):
                provider = attempt(device, make, reasons, name)
                if provider is not None:
                    found[name] = provider
        for mode in operation.modes:
            judged = {n: judge(device, p, p.calls[mode]) for n, p in found.items() if mode in p.calls}
            right = [n for n, judgement in judged.items() if "reason" not in judgement]
            replays = {}
            for cache in _caches(device, options):
                calls = {n: found[n].calls[mode] for n in right}
                times = _timed(device, calls, found, options, cache)
                for name, judgement in judged.items():
                    work = (found[name].work or problem.work)[mode]
                    record = _record(row, mode, cache, name, found[name], work) | judgement | times.get(name, {})
                    if record["seconds"]:
                        record["memory"] = attempt(device, partial(device.memory, calls[name]), {}, "")
                    yield record
                ended = [time["seconds"][1] for time in times.values() if "seconds" in time]
                if hasattr(device, "graph") and ended and min(ended) < SHORT:
                    replays = {n: call for n, call in calls.items() if "seconds" in times[n]}
            yield from _replayed(row, mode, device, options, problem, found, replays)
        for name in (name for name in problem.providers if name in reasons):
            for mode in problem.work:
                record = _record(row, mode, _caches(device, options)[0], name, None, [])
                yield record | {"reason": reasons[name]}
        if operation.extra and options.extra:
            failed = {"kind": "failed", "op": operation.name, "row": str(row.shape), "dtype": row.dtype}
            yield from attempt(device, lambda: operation.extra(row, device), failed, "reason") or ()
            if "reason" in failed:
                yield failed


def selected(name: str, row: Row, options: Options) -> bool:
    """Return whether the provider of this name is measured."""
    if options.providers and name not in options.providers and name != "ours":
        return False
    if "compiled" in name:
        return options.compile == "all" or (options.compile == "some" and row.operation.headline(row.shape))
    return True


def judge(device, provider: Provider, call: TimedCall, run: Callable | None = None) -> dict:
    """Check the results of a call.

    Args:
        device: Where it runs.
        provider: Has the limits.
        call: The call.
        run: A replay of the call, which returns what the call would.

    Returns:
        "error", "errors" and "limits", and a "reason" if the call gets no time.
    """

    def compared() -> dict[str, float]:
        if call.rewind:
            call.rewind()
        if call.prepare:
            call.prepare()
        out = (run or call.run)()
        device.synchronize()
        errors = {name: _without_nan(error) for name, error in call.errors(out).items()}
        if run is None:
            freed = [(t.shape, t.dtype, t.device) for t in _floating(out)]
            del out
            _poison(freed)
        return errors

    judgement = {"error": None, "errors": {}, "limits": {}}
    errors = attempt(device, compared, judgement, "reason")
    if errors is None:
        return judgement
    limits = {name: provider.limit(name) for name in errors}
    judgement |= {"errors": {k: e if e < torch.inf else None for k, e in errors.items()}, "limits": limits}
    worst = max(errors, key=lambda name: errors[name] / limits[name] if limits[name] else errors[name])
    largest = max(errors.values())
    judgement["error"] = largest if largest < torch.inf else None
    if not errors[worst] <= limits[worst]:
        judgement["reason"] = f"wrong: {worst} {errors[worst]:.0e} > {limits[worst]:.0e}"
    return judgement


def _without_nan(error) -> float:
    error = float(error)
    return error if error == error else float("inf")


def _floating(out) -> list[torch.Tensor]:
    return [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.dtype.is_floating_point]


def _poison(freed: list[tuple]) -> None:
    """Fill the memory of freed results with NaN.

    A caching allocator hands this memory to the next provider, so NaN shows where that does not write.
    """
    [torch.full(size, torch.nan, dtype=dtype, device=where) for size, dtype, where in freed]


def replayed(replay: Callable, out):
    """Return `out` after a replay, which has to write all of it."""
    for tensor in _floating(out):
        tensor.detach().fill_(torch.nan)
    replay()
    return out


def attempt(device, function: Callable, record: dict, key: str):
    """Return function(), or None with the reason as record[key] where it raises."""
    try:
        result = function()
        device.synchronize()
        return result
    except Exception as error:
        record[key] = one_line(error)
        device.synchronize()  # raises where the device is lost
        return None


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _replayed(row, mode, device, options, problem, found, calls: dict[str, TimedCall]) -> Iterator[dict]:
    """Yield the records of the mode replayed from CUDA graphs, for calls that can be captured."""
    judged, replays = {}, {}
    for name, call in calls.items():
        if call.prepare or not found[name].captured:
            continue
        captured = attempt(device, lambda call=call: device.graph(call), judged.setdefault(name, {}), "reason")
        if captured:
            judged[name] = judge(device, found[name], call, partial(replayed, *captured))
            if "reason" not in judged[name]:
                replays[name] = TimedCall(captured[0], call.errors)
    for cache in _caches(device, options) if judged else ():
        times = _timed(device, replays, found, options, cache)
        for name, judgement in judged.items():
            work = (found[name].work or problem.work)[mode]
            yield _record(row, f"{mode}, graph", cache, name, found[name], work) | judgement | times.get(name, {})


def _timed(
    device, calls: dict[str, TimedCall], found: dict[str, Provider], options: Options, cache: str
) -> dict[str, dict]:
    """Return {"seconds": quantiles, "samples"} by provider, or the "reason" why there is no time."""
    failed: dict[int, Exception] = {}
    shares = [found[name].share for name in calls]
    samples = interleave(device, list(calls.values()), shares, options.seconds, options.rounds, cache == "cold", failed)
    return {
        name: {"reason": one_line(failed[i])} if i in failed else {"seconds": quantiles(its), "samples": len(its)}
        for i, (name, its) in enumerate(zip(calls, samples, strict=True))
    }


def _record(row: Row, mode: str, cache: str, provider: str, made: Provider | None, work) -> dict:
    return {
        "kind": "time",
        "op": row.operation.name,
        "row": str(row.shape),
        "shape": asdict(row.shape),
        "dtype": row.dtype,
        "mode": mode,
        "cache": cache,
        "threads": torch.get_num_threads(),
        "provider": provider,
        "role": made.role if made else None,
        "error": None,
        "seconds": None,
        "work": [[w.flops, w.bytes] for w in work],
    }


def _caches(device, options: Options) -> tuple[str, ...]:
    return options.caches or (device.default_cache,)
