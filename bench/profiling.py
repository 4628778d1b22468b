"""What the time of a row is made of."""

from timing import Case, sample
from torch.profiler import ProfilerActivity, profile

KINDS = (  # what an operator's time counts as: the first name that occurs in the operator's
    ("convolutions", ("convolution", "mkldnn_conv")),
    ("batch norm", ("batch_norm",)),
    ("activations", ("relu", "gelu")),
    ("pooling", ("pool",)),
    ("matrix products", ("::mm", "addmm", "bmm", "baddbmm")),
    ("the package's ops", ("condlr_ext::",)),
    ("linear algebra", ("linalg", "cholesky", "triangular")),
    ("the other parameters", ("_foreach", "_fused_sgd")),
    ("fills and copies", ("copy_", "fill_", "zero_", "clone", "empty", "resize")),
)


def breakdown(case: Case, repeats: int = 5) -> str:
    """Self time per call of torch's operators, by kind and the longest by name. What is left is outside of operators:
    Python, autograd's bookkeeping, the profiler.
    """
    case.error()  # warms up
    plain = sample(case, repeats)
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        profiled = sample(case, repeats)
    events = [e for e in prof.key_averages() if "::" in e.key]
    by_kind = dict.fromkeys([kind for kind, _ in KINDS] + ["other operators"], 0.0)
    for event in events:
        kind = next((kind for kind, names in KINDS if any(n in event.key for n in names)), "other operators")
        by_kind[kind] += event.self_cpu_time_total / 1e6 / repeats
    by_kind["outside operators"] = profiled - sum(by_kind.values())
    lines = [f"{1e3 * plain:.3f} ms a call, {1e3 * profiled:.3f} ms with the profiler:"]
    lines += [f"  {kind:<22} {1e3 * t:>10.3f} ms {t / profiled:>6.1%}" for kind, t in by_kind.items() if t]
    for event in sorted(events, key=lambda e: -e.self_cpu_time_total)[:12]:
        seconds = event.self_cpu_time_total / 1e6 / repeats
        lines.append(f"    {event.key:<48} {1e3 * seconds:>10.3f} ms, {event.count / repeats:.0f} calls")
    return "\n".join(lines)
