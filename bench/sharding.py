"""What a sharded step costs on paper: `python -m bench.sharding [FILE.md]`, on any machine.

Bytes and memory are counted from the algorithms, times are those of an alpha-beta model and of a simulated schedule
with the assumptions below. With a Markdown file, the tables in it between `<!-- python -m bench.sharding: NAME -->` and
`<!-- end -->` are rewritten.
"""

import math
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from condlr_ext._table import markdown

GPUS = (8, 64, 1024, 16384)
RANKS = (64, 256)
TOKENS = 8192  # of a GPU and step

# Assumed. A node of 8 H100 SXM, a 400 Gb/s port for each of them; data sheet rates times EFFICIENCY.
NODE, MEMORY = 8, 60e9  # bytes of 80e9 for parameters, gradients and state
EFFICIENCY = 0.8
NVLINK, NETWORK = 450e9 * EFFICIENCY, 50e9 * EFFICIENCY  # bytes a second, each way
HBM = 3.35e12 * EFFICIENCY
NVLINK_LATENCY, NETWORK_LATENCY, MESSAGE = 3e-6, 10e-6, 1e-6  # seconds: of a message, and to issue another
DENSE, THIN = 0.4 * 989e12, 0.25 * 989e12  # flop/s of bf16 products, with W and with U and V
SMALL64, SMALL32 = 0.2 * 67e12, 0.2 * 67e12  # of batched r x r work
ALGEBRA, CLIP = 20, 80  # flops / r³: of a factor (Cholesky, inverse, products) and of a core's clip

BLOCK = re.compile(r"(<!-- python -m bench\.sharding: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Transformer:
    """A transformer with gated MLP, by the sizes of its published configuration; see arXiv 2307.09288."""

    name: str
    blocks: int
    width: int
    hidden: int
    keys: int  # width of keys and of values
    vocabulary: int = 32000

    def matrices(self) -> list[tuple[int, int]]:
        """Return [outputs, inputs] of the weights of a block."""
        d, h, k = self.width, self.hidden, self.keys
        return [(d, d), (k, d), (k, d), (d, d), (h, d), (h, d), (d, h)]

    def outside(self) -> int:
        """Return the parameters that stay dense: embedding, head and norms."""
        return 2 * self.vocabulary * self.width + (2 * self.blocks + 1) * self.width

    def of_block(self, r: int | None) -> int:
        """Return the parameters of a block's weights, with rank r or dense."""
        return sum(m * n if r is None else r * (m + n) + r * r for m, n in self.matrices())

    def parameters(self, r: int | None) -> int:
        return self.blocks * self.of_block(r) + self.outside()


MODELS = (Transformer("7B", 32, 4096, 11008, 4096), Transformer("70B", 80, 8192, 28672, 1024))


# ------------------------------------------------------------------------------------------ collectives


def split(group: int) -> tuple[int, int]:
    """Return GPUs of a group in a node, and nodes."""
    inside = min(group, NODE)
    return inside, group // inside


def half(size: float, group: int) -> float:
    """Return the seconds of an all-gather to, or a reduce-scatter of, `size` bytes: in the node, then between nodes."""
    inside, nodes = split(group)
    within = (inside - 1) * NVLINK_LATENCY + (inside - 1) / inside * size / NVLINK
    return within + math.log2(nodes) * NETWORK_LATENCY + (nodes - 1) / nodes * size / inside / NETWORK


def all_reduce(size: float, group: int) -> float:
    return 2 * half(size, group)


def all_to_all(size: float, group: int, parts: int) -> float:
    """Return the seconds in which each GPU sends its `size` bytes in so many parts, each to another GPU."""
    inside, nodes = split(group)
    within = (inside - 1) / group * size / NVLINK + NVLINK_LATENCY
    across = (group - inside) / group * size / NETWORK + NETWORK_LATENCY if nodes > 1 else 0
    return within + across + min(group - 1, parts) * MESSAGE


@dataclass(frozen=True)
class Sent:
    """What a GPU sends in the step of an optimizer, apart from gradients, and how long that takes by itself."""

    bytes: float
    seconds: float


def numbers(model: Transformer, r: int) -> int:
    """Return how many numbers CondLRSGD sums over the shards of a network."""
    return model.blocks * len(model.matrices()) * numbers_of_layer(r)


def numbers_of_layer(r: int) -> int:
    """Return those of a layer: the lower half of [X d]ᵀ[X d] for U and V, S and its direction, four flags."""
    return 2 * (2 * r * r + r) + 2 * r * r + 4


def ours(model: Transformer, r: int, group: int) -> Sent:
    """One all-reduce in float64."""
    size = 8 * numbers(model, r)
    return Sent(2 * (group - 1) / group * size, all_reduce(size, group))


def muon(model: Transformer, r: int, group: int) -> Sent:
    """All-to-all of the bfloat16 momentum to whole matrices, and of the updates back; not padded.

    As in Dion's muon.py and megabatch_base.py at 0a059a4, which pad shards and numbers of matrices.
    """
    matrices = model.blocks * len(model.matrices())
    size = 2 * model.blocks * model.of_block(None) / group
    return Sent(2 * (group - 1) / group * size, 2 * all_to_all(size, group, matrices))


def dion(model: Transformer, r: int, group: int) -> Sent:
    """Reduce-scatter and all-gather of P [n, r], here in bfloat16; not padded, without the sums of column norms.

    As in dion_update_fsdp of Dion's dion.py at 0a059a4, which pads the number of matrices.
    """
    size = 2 * r * model.blocks * sum(n for _, n in model.matrices())
    return Sent(2 * (group - 1) / group * size, 2 * half(size, group))


def fsdp(model: Transformer, r: int | None, group: int) -> float:
    """Return the bytes that a GPU sends for FSDP: two all-gathers in bfloat16, a reduce-scatter in float32."""
    return (group - 1) / group * (2 * 2 + 4) * model.parameters(r)


def memory(model: Transformer, r: int | None, group: int) -> float:
    """Return bytes of a GPU: float32 parameters, gradients and momentum; the buffer of the sum is on every GPU."""
    return 12 * model.parameters(r) / group + (8 * numbers(model, r) if r else 0)


def smallest_group(model: Transformer, r: int | None, gpus: int) -> int | None:
    """Return over how many GPUs to shard: powers of two from a node on, until everything fits."""
    group = NODE
    while group <= gpus and memory(model, r, group) > MEMORY:
        group *= 2
    return group if group <= gpus else None


# --------------------------------------------------------------------------------------------- schedule


@dataclass(frozen=True)
class Task:
    """Work of a stream, which does its tasks in the order in which they are listed."""

    name: str
    stream: str
    seconds: float
    after: tuple[str, ...] = ()


def simulate(tasks: Iterable[Task]) -> dict[str, float]:
    """Return when each task ends: it starts when its stream is free and what it waits for has ended."""
    free, ends = {}, {}
    for task in tasks:
        start = max([free.get(task.stream, 0.0), *(ends[name] for name in task.after)])
        free[task.stream] = ends[task.name] = start + task.seconds
    return ends


def training(model: Transformer, r: int | None, group: int, gpus: int) -> list[Task]:
    """Return forward and backward under HSDP: sharded over the group, summed over its replicas.

    A block is gathered while the one before it is computed, and gathered again for backward; the last block is the head
    with the embedding.
    """
    sizes = [model.of_block(r)] * model.blocks + [model.outside()]
    speeds = [THIN if r else DENSE] * model.blocks + [DENSE]
    last, tasks = len(sizes) - 1, []

    def gather(name: str, i: int, after: tuple[str, ...]) -> Task:
        return Task(f"{name} {i}", "gather", half(2 * sizes[i], group), after)

    def compute(name: str, i: int, flops: float, after: tuple[str, ...]) -> Task:
        return Task(f"{name} {i}", "compute", flops * sizes[i] * TOKENS / speeds[i], after)

    for i in range(last + 1):
        tasks.append(gather("gather", i, (f"forward {i - 2}",) if i > 1 else ()))
        tasks.append(compute("forward", i, 2, (f"gather {i}",)))
    for i in reversed(range(last + 1)):
        tasks.append(gather("gather again", i, (f"backward {i + 2}" if i + 2 <= last else f"forward {last}",)))
        tasks.append(compute("backward", i, 4, (f"gather again {i}",)))
        tasks.append(Task(f"scatter {i}", "scatter", half(4 * sizes[i], group), (f"backward {i}",)))
        replicas = gpus // group
        shard = 4 * sizes[i] / group
        seconds = 2 * math.log2(replicas) * NETWORK_LATENCY + 2 * (replicas - 1) / replicas * shard / NETWORK
        tasks.append(Task(f"reduce {i}", "network", seconds, (f"scatter {i}",)))
    return tasks


def our_step(model: Transformer, r: int, group: int) -> list[Task]:
    """Return the step of CondLRSGD: products of local rows, one sum, r x r work on every GPU, new local rows."""
    layers, rows = model.blocks * len(model.matrices()), model.blocks * sum(map(sum, model.matrices())) / group
    local = rows * r * 4  # bytes of U and V here
    return [
        Task("products", "compute", max(3 * local / HBM, 8 * r * r * rows / SMALL64), ("reduce 0",)),
        Task("sum", "gather", ours(model, r, group).seconds, ("products",)),
        Task("algebra", "compute", layers * r**3 * (2 * ALGEBRA / SMALL64 + CLIP / SMALL32), ("sum",)),
        Task("rows", "compute", max(3 * local / HBM, 4 * r * r * rows / SMALL64)),
    ]


def muon_step(model: Transformer, group: int) -> list[Task]:
    """Return Muon's: for each shape all-to-all, five iterations of Newton-Schulz, all-to-all.

    The flops of an iteration on [p, q], p <= q, are 2 p² (2 q + p): essential.ai/blog/infra.
    """
    shapes, tasks = model.matrices(), []
    for i, (m, n) in enumerate(sorted(set(shapes))):
        count = model.blocks * shapes.count((m, n))
        seconds = all_to_all(2 * count * m * n / group, group, count)
        p, q = sorted((m, n))
        tasks.append(Task(f"to {i}", "gather", seconds, ("reduce 0",)))
        flops = math.ceil(count / group) * 5 * 2 * p * p * (2 * q + p)
        tasks.append(Task(f"iterate {i}", "compute", flops / DENSE, (f"to {i}",)))
        tasks.append(Task(f"back {i}", "scatter", seconds, (f"iterate {i}",)))
    rows = model.blocks * model.of_block(None) / group
    return [*tasks, Task("update", "compute", 3 * 4 * rows / HBM, tuple(task.name for task in tasks))]


def iteration(model: Transformer, r: int | None, gpus: int) -> tuple[int, float, float] | None:
    """Return the size of the shard groups, seconds of an iteration and of its step; None if nothing fits."""
    group = smallest_group(model, r, gpus)
    if group is None:
        return None
    tasks = training(model, r, group, gpus)
    before = max(simulate(tasks).values())
    step = our_step(model, r, group) if r else muon_step(model, group)
    total = max(simulate(tasks + step).values())
    return group, total, total - before


# ----------------------------------------------------------------------------------------------- tables


def digits(x: float) -> str:
    """Return three digits without an exponent."""
    return f"{x:.0f}" if x >= 99.5 else f"{x:.1f}" if x >= 9.95 else f"{x:.2g}"


def cases() -> Iterable[tuple[Transformer, int]]:
    return ((model, r) for model in MODELS for r in RANKS)


def step_table() -> str:
    titles = ["model", "r", "GPUs", "ours, MB", "ms", "Muon, MB", "ms", "Dion, MB", "ms"]
    titles += ["FSDP of ours, MB", "FSDP dense, MB"]
    rows = []
    for model, r in cases():
        for gpus in GPUS:
            cells = [model.name, str(r), str(gpus)]
            for scheme in (ours, muon, dion):
                sent = scheme(model, r, gpus)
                cells += [digits(sent.bytes / 1e6), digits(1e3 * sent.seconds)]
            rows.append(cells + [digits(fsdp(model, rank, gpus) / 1e6) for rank in (r, None)])
    return markdown(titles, rows)


def latency_table() -> str:
    parts = MODELS[0].blocks * len(MODELS[0].matrices())
    rows = [
        ["one all-reduce, us", *(digits(1e6 * all_reduce(0, gpus)) for gpus in GPUS)],
        ["two, us", *(digits(2e6 * all_reduce(0, gpus)) for gpus in GPUS)],
        [f"two all-to-alls of {parts} parts, us", *(digits(2e6 * all_to_all(0, gpus, parts)) for gpus in GPUS)],
    ]
    return markdown(["over GPUs", *map(str, GPUS)], rows)


def memory_table() -> str:
    rows = []
    for model in MODELS:
        for r in (*RANKS, None):
            cells = [model.name, str(r or "dense"), digits(model.parameters(r) / 1e9)]
            cells.append(digits(8 * numbers(model, r) / 1e9) if r else "-")
            rows.append(cells + [digits(memory(model, r, gpus) / 1e9) for gpus in GPUS])
    return markdown(["model", "r", "parameters, 1e9", "of it the sum, GB", *(f"GB on {g}" for g in GPUS)], rows)


def schedule_table() -> str:
    titles = ["model", "r", "GPUs", "shard group", "iteration, ms", "of it the step, ms"]
    titles += ["shard group, dense", "iteration with Muon, ms", "of it the step, ms"]
    rows = []
    for model, r in cases():
        for gpus in GPUS:
            cells = [model.name, str(r), str(gpus)]
            for found in (iteration(model, r, gpus), iteration(model, None, gpus)):
                cells += [str(found[0]), *(digits(1e3 * t) for t in found[1:])] if found else ["does not fit", "-", "-"]
            rows.append(cells)
    return markdown(titles, rows)


TABLES: dict[str, Callable[[], str]] = {
    "step": step_table, "latency": latency_table, "memory": memory_table, "schedule": schedule_table,
}  # fmt: skip


def rewrite(text: str) -> str:
    """Return the text with its tables made again; raise ValueError unless each is there once."""
    names = [found[2] for found in BLOCK.finditer(text)]
    if sorted(names) != sorted(TABLES):
        raise ValueError(
            f"needed: <!-- python -m bench.sharding: NAME --> for each of {', '.join(TABLES)}, got {names}"
        )
    return BLOCK.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)


def main(arguments: list[str]) -> None:
    for name, table in TABLES.items():
        print(f"{name}\n\n{table()}")
    for name in arguments:
        Path(name).write_text(rewrite(Path(name).read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
