"""The project's targets on CPUs, and what was reached of them: python bench/targets.py RESULTS.jsonl

A ratio is another provider's time over ours; of several providers the fastest counts.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.records import Results

DENSE_STEP = ("dense SGD", "dense SGD fused")
DENSE = ("dense", "dense compiled")
TARGETS = (  # operation, row, mode, providers, ratio
    ("step", "VGG16 50%", "call", ("released",), 40),
    ("step", "VGG16 20%", "call", ("released",), 100),
    ("step", "WRN16-4 50%", "call", ("released",), 25),
    ("step", "WRN16-4 20%", "call", ("released",), 80),
    ("step", "LeNet5 50%", "call", ("released",), 9),
    ("step", "LeNet5 20%", "call", ("released",), 15),
    ("step", "VGG16 50%", "call", ("fast PyTorch",), 8),
    ("step", "VGG16 20%", "call", ("fast PyTorch",), 10),
    ("step", "WRN16-4 50%", "call", ("fast PyTorch",), 8),
    ("step", "WRN16-4 20%", "call", ("fast PyTorch",), 11),
    ("step", "LeNet5 50%", "call", ("fast PyTorch",), 6),
    ("step", "LeNet5 20%", "call", ("fast PyTorch",), 9),
    ("step", "VGG16 20%", "call", DENSE_STEP, 1.0),
    ("step", "WRN16-4 20%", "call", DENSE_STEP, 1.0),
    ("train", "VGG16 50%", "iteration", DENSE, 1.5),
    ("train", "VGG16 20%", "iteration", DENSE, 3.0),
    ("train", "WRN16-4 50%", "iteration", DENSE, 1.55),
    ("train", "WRN16-4 20%", "iteration", DENSE, 3.0),
    ("train", "LeNet5 50%", "iteration", DENSE, 1.0),
    ("train", "LeNet5 20%", "iteration", DENSE, 1.8),
    ("train", "digits MLP 50%", "iteration", DENSE, 0.6),
    ("train", "digits MLP 20%", "iteration", DENSE, 0.8),
    ("clip", "16 x 16x16", "call", ("torch.linalg",), 10),
    ("clip", "16 x 64x64", "call", ("torch.linalg",), 6),
    ("clip", "16 x 128x128", "call", ("torch.linalg",), 5),
    ("clip", "16 x 256x256", "call", ("torch.linalg",), 5),
)


def outcomes(results: Results) -> list[tuple]:
    """(operation, row, threads, fastest of the others, ratio, target) of the targets that were measured, with warm
    caches. Where a network was also compiled, the better form of each counts.
    """
    times = {}
    for r in results.times:
        if r["seconds"] and r["cache"] == "warm":
            times.setdefault((r["op"], r["row"], r["mode"]), {}).setdefault(r["threads"], {})[r["provider"]] = r
    found = []
    for operation, row, mode, providers, target in TARGETS:
        for threads, records in times.get((operation, row, mode), {}).items():
            seconds = {name: record["seconds"][1] for name, record in records.items()}
            mine = [seconds[name] for name in ("ours", "ours compiled") if name in seconds]
            others = [name for name in providers if name in seconds]
            if mine and others:
                best = min(others, key=seconds.get)
                found.append((operation, row, threads, best, seconds[best] / min(mine), target))
    return found


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__.splitlines()[0])
    for operation, row, threads, other, ratio, target in outcomes(Results.read(sys.argv[1])):
        reached = "reached" if ratio >= target else "not reached"
        print(f"{operation:<6} {row:<16} {threads} threads  {other:<16} {ratio:>7.2f} of {target:<6g} {reached}")


if __name__ == "__main__":
    main()
