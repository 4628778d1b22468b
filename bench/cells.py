"""Cells of tables: numbers with three digits and their units, "-" for what is missing."""


def middle(record: dict | None) -> float | None:
    """Return the median time."""
    return record["seconds"][1] if record and record["seconds"] else None


def field(record: dict | None, name: str, scale: float = 1) -> float | None:
    return record[name] / scale if record and name in record else None


def spread(record: dict | None) -> str:
    """Return the distance of the quantiles over the median."""
    if not record or not record["seconds"] or record["samples"] == 1:
        return "-"
    low, median, high = record["seconds"]
    return percent((high - low) / median)


def error(record: dict | None) -> str:
    return f"{record['error']:.0e}" if record and record.get("error") is not None else "-"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for scale, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * scale >= 0.9995:
            return f"{digits(seconds * scale)} {unit}"
    return f"{digits(seconds * 1e9)} ns"


def number(value: float | None) -> str:
    return "-" if value is None else digits(value)


def digits(value: float) -> str:
    """Return three digits, from 0.01 on without a power of ten."""
    if abs(value) < 9.995:
        return f"{value:.2f}" if abs(value) >= 0.01 or value == 0 else f"{value:.1e}"
    return f"{value:.1f}" if abs(value) < 99.95 else f"{value:.0f}"


def exponent(value: float | None) -> str:
    return "-" if value is None else f"{round(value, 2) + 0:.2f}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.{0 if share >= 0.0995 else 1 if share >= 0.00995 else 2}f} %"


def flop_rate(rate: float) -> str:
    return f"{digits(rate / 1e12)} TFLOP/s" if rate >= 1e12 else f"{digits(rate / 1e9)} GFLOP/s"


def size(count: float | None) -> str:
    """Return bytes in binary units."""
    if count is None:
        return "-"
    for scale, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if abs(count) >= scale:
            return f"{digits(count / scale)} {unit}"
    return f"{count:.0f} B"


def thread_count(threads: int) -> str:
    return f"{threads} thread{'s' * (threads != 1)}"
