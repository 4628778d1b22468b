"""Comparisons of two results."""

import math

import pytest
from helpers.bench_records import ROW, RUN, results, time_record

from bench import compare


def test_no_regression_on_equal_results():
    a = results(*ROW)
    found = compare.compare(a, results(*ROW))
    (change,) = found.changes
    assert change.verdict == "as before" and change.slowdown == pytest.approx(1) and not found.regressions
    assert found.only == ([], []) and not found.missed
    assert compare.show(found, a, a)[-1] == "1 as before: no regression; half of the bounds are below 1.05"


def slower(factor, baseline=1.0, spread=0.02, samples=11):
    changed = {"ours": factor, "plain": baseline, "slow": baseline, "whole": baseline}
    return [
        time_record(r["provider"], r["role"], changed[r["provider"]] * r["seconds"][1], spread, samples=samples)
        for r in ROW[:4]
    ]


def test_slower_beyond_noise():
    (change,) = compare.compare(results(*slower(1)), results(*slower(1.2))).changes
    noise = math.log(1.01 / 0.99) / 2
    assert change.slowdown == pytest.approx(1.2) and change.regression
    assert change.bound == pytest.approx(max(1.05, math.exp(2 * noise * 2)))  # ours and baselines, in A and B
    assert not compare.compare(results(*slower(1)), results(*slower(1.04))).regressions
    assert compare.compare(results(*slower(1.2)), results(*slower(1))).changes[0].verdict == "faster"


def test_within_noise():
    a, b = results(*slower(1, spread=0.2)), results(*slower(1.2, spread=0.2))
    assert compare.compare(a, b).changes[0].verdict == "as before"
    a, b = results(*slower(1, spread=0, samples=1)), results(*slower(1.2, spread=0, samples=1))
    assert compare.compare(a, b).changes[0].verdict == "as before"


def test_drift_of_the_machine():
    (change,) = compare.compare(results(*slower(1)), results(*slower(1.5, baseline=1.5))).changes
    assert change.drift == pytest.approx(1.5) and change.slowdown == pytest.approx(1) and not change.regression
    (change,) = compare.compare(results(*slower(1)), results(*slower(1.0, baseline=0.7))).changes
    assert change.regression


def test_drift_where_a_row_has_no_baseline():
    """The drift is that of the other rows; the reference path and context are no baselines."""

    def alone(ours, others):
        roles = {"ours": ("ours", ours), "reference": ("same", others), "related": ("context", others)}
        return [time_record(name, role, middle, row="alone") for name, (role, middle) in roles.items()]

    a, b = results(*ROW, *alone(1, 1)), results(*slower(1.3, baseline=1.3), *alone(1.3, 5))
    found = compare.compare(a, b)
    assert not found.regressions
    (change,) = [c for c in found.changes if c.key[1] == "alone"]
    assert change.drift == pytest.approx(1.3)


def test_scatter_of_the_baselines_of_all_rows():
    """Quantiles within a process do not show what differs between processes."""

    def row(n, ours, plain):
        return [
            time_record("ours", "ours", ours, 0.001, row=str(n)),
            time_record("plain", "same", plain, 0.001, row=str(n)),
        ]

    before = [r for n in range(5) for r in row(n, 1, 1)]
    factors = (0.9, 0.95, 1.0, 1.05, 1.1)
    found = compare.compare(results(*before), results(*(r for n, f in enumerate(factors) for r in row(n, 1, f))))
    scatter = math.log(1.06 / 0.94) / 2  # quantiles of 20 and 80 % of five are between the first two and the last two
    assert not found.regressions
    assert all(change.bound == pytest.approx(math.exp(5 * scatter), rel=2e-3) for change in found.changes)


def test_disagreeing_baselines_are_noise():
    b = slower(1.4)
    b[1]["seconds"], b[2]["seconds"] = ([s * f for s in r["seconds"]] for r, f in zip(b[1:3], (0.7, 1.4), strict=True))
    assert not compare.compare(results(*slower(1)), results(*b)).regressions


def test_wrong_is_a_regression():
    wrong = [time_record("ours", "ours", 1, reason="wrong: A 1e+00 > 1e-06"), *ROW[1:]]
    a, b = results(*ROW), results(*wrong)
    found = compare.compare(a, b)
    assert [c.verdict for c in found.regressions] == ["lost"]
    assert "lost: clip 16 x 8x8 (fp32, call, warm, 1 thread): ours: wrong: A 1e+00 > 1e-06" in "\n".join(
        compare.show(found, a, b)
    )
    back = compare.compare(b, a)
    assert not back.regressions and [c.verdict for c in back.changes] == ["gained"]


def test_what_raises_is_a_regression_and_a_missing_baseline_none():
    raised = [time_record("ours", None, 1, reason="RuntimeError: no"), *ROW[1:]]
    assert compare.compare(results(*ROW), results(*raised)).regressions
    without = [ROW[0], time_record("plain", None, 1, reason="ImportError: no plain"), *ROW[2:]]
    found = compare.compare(results(*ROW), results(*without))
    assert not found.regressions
    assert found.missed == ["clip 16 x 8x8 (fp32, call, warm, 1 thread): plain: ImportError: no plain"]


def test_rows_of_one_side():
    more = time_record("ours", "ours", 1, row="new")
    a, b = results(*ROW), results(*ROW, more)
    assert compare.compare(a, b).only == ([], ["clip new (fp32, call, warm, 1 thread)"])
    assert compare.compare(b, a).only == (["clip new (fp32, call, warm, 1 thread)"], [])
    assert "only in B: clip new" in "\n".join(compare.show(compare.compare(a, b), a, b))


def test_worst_first():
    rows = [
        [time_record(p, r, f * s, row=str(i)) for p, r, s, f in (("ours", "ours", 1, f), ("plain", "same", 1, 1))]
        for i, f in enumerate((1, 3, 2))
    ]
    before = [time_record(r["provider"], r["role"], 1, row=r["row"]) for row in rows for r in row]
    found = compare.compare(results(*before), results(*(r for row in rows for r in row)))
    assert [c.key[1] for c in found.changes] == ["1", "2", "0"]


@pytest.mark.parametrize(
    "b, message",
    [
        (results(*ROW, run=RUN | {"machine": RUN["machine"] | {"device": "B"}}), "different devices: .* A CPU, .* B"),
        (results(*ROW, run=RUN | {"machine": RUN["machine"] | {"allocator": "tuned"}}), "different allocators"),
        (results(*ROW, time_record("ours", "ours", 1, threads=2)), "different numbers of threads"),
        (results(*(r | {"row": "1"} for r in ROW)), "no row in common"),
    ],
)
def test_what_cannot_be_compared(b, message):
    with pytest.raises(ValueError, match=message):
        compare.compare(results(*ROW), b)


def test_rounds_are_merged():
    first = [time_record("ours", "ours", 1.0), time_record("plain", "same", 2.0)]
    second = [time_record("ours", "ours", 1.2), time_record("plain", "same", 1, reason="RuntimeError: once")]
    merged = compare.merge([results(*first), results(*second)], "both")
    ours, plain = merged.times
    assert ours["seconds"] == pytest.approx([0.99, 1.1, 1.212]) and ours["samples"] == 22
    assert plain["seconds"] is None and plain["reason"] == "RuntimeError: once"
    assert ours["floor"] > 0 and merged.name == "both"
