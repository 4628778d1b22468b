"""CPU microbenchmark of the compiled kernels: python bench/cpu.py [--json FILE] [--quick]

Rows: core linear algebra on batches, and the step of a whole network. Providers are timed in turn in one process
(torch.utils.benchmark, median of blocks); each is compared with float64 first, and one whose error is out of line
gets no time. "floor" is the row's multiply-adds at the rate this machine reaches in a float32 matrix product.
"""

import argparse
import datetime
import json
import math
import subprocess

import numpy as np
import torch
from torch.utils.benchmark import Timer

import condlr_ext
from condlr_ext import ops, reference
from condlr_ext.info import collect
from condlr_ext.reference import HYPER

NETWORKS = {  # (m, n, r) of each layer: 20 % rank
    "digits MLP": [(256, 64, 13), (256, 256, 52)],
    "LeNet5": [(20, 25, 4), (50, 500, 10), (500, 800, 100)],
    "VGG16": [(64, 27, 6), (64, 576, 13), (128, 576, 26), (128, 1152, 26), (256, 1152, 52)]
    + [(256, 2304, 52)] * 2 + [(512, 2304, 103)] + [(512, 4608, 103)] * 5 + [(512, 512, 103)] * 2,
}  # fmt: skip


def clamped_core(r: int) -> torch.Tensor:
    """A core as the step meets it: in the band of tau = 0.1, then moved a little."""
    S = condlr_ext.linalg.clip_spectrum(torch.randn(r, r, dtype=torch.float64), 0.1)
    return (S + 1e-2 * torch.linalg.norm(S) / r * torch.randn(r, r, dtype=torch.float64)).float()


def on_cpu(fn):
    """fn on the compiled kernels, also where "auto" would leave it to LAPACK."""

    def call(A):
        with condlr_ext.backend("cpu"):
            return fn(A)

    return call


def linalg_rows(quick: bool):
    """name, providers {name: function of a batch}, check(result, batch) -> error, batch, multiply-adds."""
    for r in (8, 32) if quick else (8, 16, 32, 64, 128):
        A = torch.stack([clamped_core(r) for _ in range(16)])
        exact = np.linalg.svd(A.double().numpy(), compute_uv=False)
        lo, hi = reference.clip_edges(torch.from_numpy(exact), 0.1)
        clipped = torch.from_numpy(exact).clamp(lo[:, None], hi[:, None])

        def svd_error(out, A=A):
            U, sigma, V = out
            return ((U * sigma.unsqueeze(-2)) @ V.mT - A).abs().max().item()

        def clip_error(out, clipped=clipped):
            return (
                (torch.from_numpy(np.linalg.svd(out.double().numpy(), compute_uv=False)) - clipped).abs().max().item()
            )

        def torch_svd(A):
            U, sigma, Vh = torch.linalg.svd(A, full_matrices=False)
            return U, sigma, Vh.mT

        def torch_clip(A):
            U, sigma, Vh = torch.linalg.svd(A)
            lo, hi = reference.band_edges(sigma, 0.1)
            return (U * sigma.clamp(lo[:, None], hi[:, None]).unsqueeze(-2)) @ Vh

        def numpy_svd(A):
            U, sigma, Vh = np.linalg.svd(A.numpy())
            return torch.from_numpy(U), torch.from_numpy(sigma), torch.from_numpy(Vh).mT

        flops = 16 * 9 * r**3
        svds = {"ours": on_cpu(condlr_ext.linalg.svd), "torch.linalg": torch_svd, "numpy": numpy_svd}
        yield f"svd 16 x {r}x{r}", svds, svd_error, A, flops
        clips = {"ours": on_cpu(lambda A: condlr_ext.linalg.clip_spectrum(A, 0.1)), "torch.linalg": torch_clip}
        yield f"clip 16 x {r}x{r}", clips, clip_error, A, flops


def qr_rows(quick: bool):
    """As linalg_rows; the error is that of the product and of the orthonormality."""

    def error(out, A):
        Q, R = out
        eye = torch.eye(Q.shape[-1])
        return max((Q @ R - A).abs().max().item(), (Q.mT @ Q - eye).abs().max().item())

    for m, n in ((256, 32),) if quick else ((64, 64), (256, 32), (512, 52), (4608, 103)):
        A = torch.randn(m, n) / m**0.5
        providers = {"ours": on_cpu(condlr_ext.linalg.qr), "torch.linalg": torch.linalg.qr}
        yield f"qr {m}x{n}", providers, lambda out, A=A: error(out, A), A, 2 * m * n * n


def step_rows(quick: bool):
    """name, providers {name: function of the step's arguments}, arguments, multiply-adds."""
    for name, layers in NETWORKS.items():
        if quick and name == "VGG16":
            continue
        params = []
        for m, n, r in layers:
            factors = (torch.linalg.qr(torch.randn(k, r))[0].contiguous() for k in (m, n))
            U, V = factors
            params += [U, clamped_core(r), V, torch.zeros(0)]
        grads = [torch.randn_like(p) for p in params]
        buffers = [torch.zeros_like(p) for p in params]
        hyper = torch.zeros(len(layers), 4, len(HYPER), dtype=torch.float64)
        for column, value in {"lr": 1e-4, "momentum": 0.3, "tau": 0.1, "sigma_max": math.inf}.items():
            hyper[..., HYPER.index(column)] = value
        args = (params, grads, buffers, hyper, torch.zeros(len(layers), dtype=torch.int64))
        flops = sum(3 * (m + n) * r * r + 9 * r**3 for m, n, r in layers)
        yield (
            f"step {name}",
            {"ours": ops.step.step.dispatched, "reference": ops.step.step.reference},
            args,
            flops,
        )


def step_error(step, args) -> float:
    """Largest difference of one step's new factors and cores to the same step in float64."""
    params, grads, buffers, hyper, skipped = args
    mine = [p.clone() for p in params]
    step(mine, grads, [b.clone() for b in buffers], hyper, skipped.clone())
    exact = [p.double() for p in params]
    ops.step.step.reference(exact, [g.double() for g in grads], [b.double() for b in buffers], hyper, skipped.clone())
    return max((a - b).abs().max().item() for a, b in zip(mine, exact, strict=True) if a.numel())


def time_of(call, seconds: float) -> float:
    return Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads()).blocked_autorange(
        min_run_time=seconds
    ).median  # fmt: skip


def matrix_rate(seconds: float) -> float:
    """Multiply-adds per second of a float32 matrix product, n = 1024."""
    A = torch.randn(1024, 1024)
    return 1024**3 / time_of(lambda: A @ A, seconds)


def measure(quick: bool) -> list[dict]:
    seconds = 0.05 if quick else 0.5
    rate = matrix_rate(seconds)
    rows = []

    def add(name, providers, errors, call, flops, n):
        worst = 30 * torch.finfo(torch.float32).eps * n**0.5  # what a backward stable float32 method may show
        times = {
            p: time_of(lambda fn=fn: call(fn), seconds) if errors[p] <= worst else None for p, fn in providers.items()
        }
        for provider in providers:
            rows.append(
                {
                    "row": name,
                    "provider": provider,
                    "error": errors[provider],
                    "seconds": times[provider],
                    "ratio": times[provider] / times["ours"] if times[provider] and times["ours"] else None,
                    "over_floor": times[provider] / (flops / rate) if times[provider] else None,
                }
            )

    for name, providers, error, A, flops in (*linalg_rows(quick), *qr_rows(quick)):
        add(
            name,
            providers,
            {p: error(fn(A)) for p, fn in providers.items()},
            lambda fn, A=A: fn(A),
            flops,
            A.shape[-1],
        )
    for name, providers, args, flops in step_rows(quick):
        add(
            name,
            providers,
            {p: step_error(fn, args) for p, fn in providers.items()},
            lambda fn, a=args: fn(*a),
            flops,
            512,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="also write the rows with machine, versions, commit and date to this file")
    parser.add_argument("--quick", action="store_true", help="few rows, short runs: a smoke test")
    parser.add_argument("--threads", type=int, help="torch threads")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = measure(options.quick)
    print(f"{'row':<22} {'provider':<14} {'time':>10} {'time / ours':>12} {'over floor':>11} {'error':>9}")
    for r in rows:
        time = f"{1e6 * r['seconds']:.0f} us" if r["seconds"] else "wrong"
        ratio, floor = (f"{r[k]:.2f}" if r[k] else "-" for k in ("ratio", "over_floor"))
        print(f"{r['row']:<22} {r['provider']:<14} {time:>10} {ratio:>12} {floor:>11} {r['error']:>9.1e}")
    if options.json:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True
        ).stdout.strip()
        data = collect()
        machine = {k: data[k] for k in ("versions", "build", "isa", "cpu_features", "threads")}
        record = {
            "date": datetime.date.today().isoformat(),
            "commit": commit,
            "machine": machine,
            "rows": rows,
        }
        with open(options.json, "w") as file:
            json.dump(record, file, indent=1)


if __name__ == "__main__":
    main()
