"""Benchmark records for tests of tables, comparisons and figures."""

from bench.records import Results

RUN = {
    "kind": "run", "format": 2, "date": "2026-01-02T03:04:05", "commit": "abc1234", "command": [],
    "machine": {"device": "A CPU", "cores": 2, "allocator": "default"},
    "versions": {"torch": "2.13.0", "condlr_ext": "0.1.0"},
}  # fmt: skip
CEILINGS = {"kind": "ceilings", "threads": 1, "copy": [[1 << 19, 1e11], [1 << 27, 1e10]], "fp32": 1e11}


def time_record(provider, role, middle, spread=0.02, op="clip", row="16 x 8x8", shape=None, reason=None, **changes):
    record = {
        "kind": "time", "op": op, "row": row, "shape": shape or {"count": 16, "m": 8, "n": 8}, "dtype": "fp32",
        "mode": "call", "cache": "warm", "threads": 1, "provider": provider, "role": role,
        "seconds": [middle * (1 - spread / 2), middle, middle * (1 + spread / 2)], "samples": 11,
        "work": [[2e6, 1e6]], "error": 2e-7, "errors": {"A": 2e-7}, "limits": {"A": 1e-6}, "memory": None,
    }  # fmt: skip
    if reason:
        record |= {"seconds": None, "reason": reason, "samples": 0}
    return record | changes


def results(*times, run=RUN, others=(CEILINGS,), name="a.jsonl"):
    return Results([run, *others, *times], name)


ROW = (
    time_record("ours", "ours", 1e-3),
    time_record("plain", "same", 2e-3, error=3e-7),
    time_record("slow", "same", 5e-3),
    time_record("whole", "dense", 5e-4),
    time_record("related", "context", 4e-3, error=0.3),
    time_record("broken", "same", 1, reason="wrong: A 3e-03 > 1e-06"),
    time_record("absent", None, 1, reason="ImportError: absent is not installed", work=[]),
)
