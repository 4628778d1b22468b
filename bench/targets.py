"""The project's targets on CPUs: how many times as long as ours another provider should take in a row."""

OURS = ("ours", "ours compiled")
TARGETS = (  # row, providers of which the fastest counts, ratio
    ("step VGG16 50%", ("released",), 40),
    ("step VGG16 20%", ("released",), 100),
    ("step WRN16-4 50%", ("released",), 25),
    ("step WRN16-4 20%", ("released",), 80),
    ("step LeNet5 50%", ("released",), 9),
    ("step LeNet5 20%", ("released",), 15),
    ("step VGG16 50%", ("fast PyTorch",), 8),
    ("step VGG16 20%", ("fast PyTorch",), 10),
    ("step WRN16-4 50%", ("fast PyTorch",), 8),
    ("step WRN16-4 20%", ("fast PyTorch",), 11),
    ("step LeNet5 50%", ("fast PyTorch",), 6),
    ("step LeNet5 20%", ("fast PyTorch",), 9),
    ("step VGG16 20%", ("dense SGD", "dense SGD fused"), 1.0),
    ("step WRN16-4 20%", ("dense SGD", "dense SGD fused"), 1.0),
    ("iteration VGG16 50%", ("dense", "dense compiled"), 1.5),
    ("iteration VGG16 20%", ("dense", "dense compiled"), 3.0),
    ("iteration WRN16-4 50%", ("dense", "dense compiled"), 1.55),
    ("iteration WRN16-4 20%", ("dense", "dense compiled"), 3.0),
    ("iteration LeNet5 50%", ("dense", "dense compiled"), 1.0),
    ("iteration LeNet5 20%", ("dense", "dense compiled"), 1.8),
    ("iteration digits MLP 50%", ("dense", "dense compiled"), 0.6),
    ("iteration digits MLP 20%", ("dense", "dense compiled"), 0.8),
    ("clip 16 x 16x16", ("gesdd loop",), 10),
    ("clip 16 x 64x64", ("gesdd loop",), 6),
    ("clip 16 x 128x128", ("gesdd loop",), 5),
    ("clip 16 x 256x256", ("gesdd loop",), 5),
)


def outcomes(records: list[dict]) -> list[dict]:
    """What was reached of each target that was measured, for every number of threads. Where both were also compiled
    (--compile), the better form of each counts.
    """
    times = {(r["row"], r["threads"], r["provider"]): r["seconds"] for r in records if r.get("seconds")}
    found = []
    for row, providers, target in TARGETS:
        for threads in sorted({threads for name, threads, _ in times if name == row}):
            mine = [t for p in OURS if (t := times.get((row, threads, p)))]
            theirs = {t: p for p in providers if (t := times.get((row, threads, p)))}
            if mine and theirs:
                ratio = min(theirs) / min(mine)
                result = {"row": row, "against": theirs[min(theirs)], "threads": threads, "ratio": ratio}
                found.append(result | {"target": target, "reached": ratio >= target})
    return found
