"""Breakdown of a row's time by operator."""

import time
from collections.abc import Iterable

from torch.profiler import ProfilerActivity, profile

from .machine import arithmetic
from .registry import Row, TimedCall
from .runner import judge

KINDS = (  # of operators, by the first name that occurs in the operator's
    ("convolutions", ("convolution", "mkldnn_conv")),
    ("batch norm", ("batch_norm",)),
    ("layer norm", ("layer_norm",)),
    ("attention", ("attention",)),
    ("activations", ("relu", "gelu")),
    ("pooling", ("pool",)),
    ("matrix products", ("::mm", "addmm", "bmm", "baddbmm")),
    ("the package's ops", ("condlr_ext::",)),
    ("linear algebra", ("linalg", "cholesky", "triangular")),
    ("the other parameters", ("_foreach", "_fused_sgd")),
    ("fills and copies", ("copy_", "fill_", "zero_", "clone", "empty", "resize")),
)


def breakdown(row: Row, names: Iterable[str], device) -> str:
    """Break down the time per call of a row's providers in every mode.

    Args:
        row: The row.
        names: Of providers; those that the row lacks are skipped.
        device: Where it runs.

    Returns:
        Text with the self time of torch's operators, by kind and of the longest, on a CUDA device that of the kernels
        they start. The rest is outside of operators: Python, autograd's bookkeeping, the profiler.
    """
    parts = []
    with arithmetic(row.dtype):
        problem = row.operation.problem(row.shape, row.dtype, device)
        for name in names:
            if name not in problem.providers:
                continue
            provider = problem.providers[name]()
            for mode, call in provider.calls.items():
                found = judge(device, provider, call)  # also warms up
                what = found.get("reason") or _breakdown(call, device)
                parts.append(f"{row}, {mode}, {name}: {what}")
    return "\n\n".join(parts)


def _breakdown(call: TimedCall, device, repeats: int = 5) -> str:
    cuda = device.kind == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    plain = device.seconds(call, repeats, cold=False)
    totals, profiled = {}, 0.0
    for _ in range(repeats):
        if call.prepare:
            call.prepare()
        device.synchronize()
        with profile(activities=activities) as prof:
            start = time.perf_counter()
            call.run()
            device.synchronize()
            profiled += (time.perf_counter() - start) / repeats
        for e in prof.key_averages():
            if "::" in e.key:
                spent = e.self_device_time_total if cuda else e.self_cpu_time_total
                seconds, count = totals.get(e.key, (0.0, 0.0))
                totals[e.key] = seconds + spent / 1e6 / repeats, count + e.count / repeats
    events = [(key, seconds, count) for key, (seconds, count) in totals.items()]
    by_kind = dict.fromkeys([kind for kind, _ in KINDS] + ["other operators"], 0.0)
    for key, seconds, _ in events:
        by_kind[next((kind for kind, names in KINDS if any(n in key for n in names)), "other operators")] += seconds
    by_kind["outside operators"] = max(0.0, profiled - sum(by_kind.values()))
    lines = [f"{1e3 * plain:.3f} ms a call, {1e3 * profiled:.3f} ms with the profiler:"]
    lines += [f"  {kind:<22} {1e3 * t:>10.3f} ms {t / profiled:>6.1%}" for kind, t in by_kind.items() if t]
    for key, seconds, count in sorted(events, key=lambda e: -e[1])[:12]:
        lines.append(f"    {key:<48} {1e3 * seconds:>10.3f} ms, {count:.0f} calls")
    return "\n".join(lines)
