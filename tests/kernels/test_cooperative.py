"""Cooperative groups in Triton's interpreter: every member is a process of its own, all at once."""

import math
import multiprocessing
import random

import pytest
import torch
from helpers.kernels import ON_CPU, run_on_cpu
from helpers.matrices import with_spectrum

from condlr_ext import reference
from condlr_ext.kernels.status import NOT_CONVERGED, OK
from condlr_ext.kernels.triton import devices
from condlr_ext.reference import HYPER

pytestmark = [*ON_CPU, pytest.mark.skipif(not devices.INTERPRETED, reason="members are processes of the interpreter")]
if run_on_cpu():
    from triton.runtime import interpreter

    from condlr_ext.kernels.triton.runtime import cooperative
    from condlr_ext.kernels.triton.spectral import launch as spectral
    from condlr_ext.kernels.triton.spectral import newton_schulz
    from condlr_ext.kernels.triton.step import core_clip

MEMBERS = 3


@pytest.fixture
def absent():
    """Members that never run."""
    return set()


@pytest.fixture(autouse=True)
def at_once(monkeypatch, absent):
    """Run launches of groups in one process per member, over the same memory. Return their group sizes."""
    run, launched = interpreter.InterpretedFunction.run, []

    def run_member(mine, programs, kernel, args, options):
        """Run these programs one after another, in a process that knows the grid of all of them."""
        builder = interpreter.interpreter_builder
        place, size = builder.set_grid_idx, builder.set_grid_dim
        builder.set_grid_idx = lambda x, y, z: place(mine[x], y, z)
        builder.set_grid_dim = lambda x, y, z: size(programs, y, z)
        # no copying back: the memory is shared
        interpreter.GridExecutor._restore_args_dev = lambda *args: None
        run(kernel, *args, grid=(len(mine),), **options)

    def run_all(kernel, *args, grid, **options):
        names = dict(zip(kernel.arg_names, args, strict=False)) | options
        if "counter_ptr" not in names:
            return run(kernel, *args, grid=grid, **options)
        if "work_ptr" in names:
            member_of = names["work_ptr"][:, 1].tolist()
        else:
            member_of = [program % names["group_size"] for program in range(grid[0])]
        launched.append(max(member_of) + 1)
        for value in args:
            if isinstance(value, torch.Tensor) and value.numel():
                value.share_memory_()
        fork = multiprocessing.get_context("fork")
        processes = []
        for member in set(range(max(member_of) + 1)) - absent:
            mine = [program for program, of in enumerate(member_of) if of == member]
            processes.append(fork.Process(target=run_member, args=(mine, grid[0], kernel, args, options)))
            processes[-1].start()
        for process in processes:
            process.join()
            assert process.exitcode == 0

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", run_all)
    monkeypatch.setattr(cooperative, "group_sizes", lambda device, jobs: [min(job, MEMBERS) for job in jobs])
    # small tiles, so that every member has some
    sizes = newton_schulz.config("sm_90") | dict(TILE=64, WIDE_TILE=64, BLOCK=2048)
    monkeypatch.setattr(newton_schulz, "config", lambda name: dict(sizes))
    return launched


def alone(monkeypatch, compute):
    with monkeypatch.context() as patch:
        patch.setattr(cooperative, "group_sizes", lambda device, jobs: [1] * len(jobs))
        return compute()


def spectra(*smallest):
    """Matrices [70, 65], whose products have numbers of tiles that the members cannot share evenly."""
    return torch.stack([with_spectrum(torch.linspace(1, s, 65, dtype=torch.float64), 70, 65) for s in smallest]).float()


def clipped(A):
    out, row = torch.zeros_like(A), torch.zeros(len(A), dtype=torch.int32)
    active_mask = newton_schulz.clip_spectrum(A, torch.tensor([[0.1, 0, math.inf]], dtype=torch.float64), row, out)
    return out, active_mask


def test_a_group_clips_as_one_program_does(monkeypatch, at_once):
    """One matrix near the band, one that products do not serve: its group stops early, together."""
    A = spectra(0.5, 1e-3)
    out, active_mask = clipped(A)
    assert at_once == [MEMBERS] and active_mask.tolist() == [0, 1]
    same, active_mask = alone(monkeypatch, lambda: clipped(A))
    assert at_once == [MEMBERS, 1] and active_mask.tolist() == [0, 1]
    assert torch.equal(out, same) and out[0].any() and not out[1].any()


def test_a_group_rotates_blocks_as_one_program_does(monkeypatch, at_once):
    """Two pairs of blocks, rotated at the same time."""
    # columns that are nearly orthogonal, which takes one sweep
    A = torch.eye(80, 66)[None] * torch.linspace(1, 2, 66) + 1e-5 * torch.randn(1, 80, 66)
    results = spectral.svd(A)
    assert at_once == [2] and results[3] == OK
    for ours, theirs in zip(results, alone(monkeypatch, lambda: spectral.svd(A)), strict=True):
        assert torch.equal(ours, theirs)


def test_groups_clip_the_cores_of_a_network(at_once):
    """Two ranks, beside one that a program clips alone; one core needs the second launch."""
    cores, ranks = [], (66, 5, 65)
    for r in ranks:
        cores.append(with_spectrum(torch.linspace(1, 1.4, r, dtype=torch.float64), r, r))
    cores[2] = torch.diag(torch.linspace(0.05, 1.4, 65, dtype=torch.float64))
    flat = torch.cat([core.flatten() for core in cores]).float()
    views = [t.view(r, r) for t, r in zip(flat.split([r * r for r in ranks]), ranks, strict=True)]
    hyper, info = torch.zeros(3, 4, len(HYPER), dtype=torch.float64), torch.full((3,), -1, dtype=torch.int32)
    hyper[..., HYPER.index("tau")], hyper[..., HYPER.index("sigma_max")] = 0.1, math.inf
    clip = core_clip.CoreClip(views, range(3))
    clip(hyper, torch.ones_like(info), info)
    assert at_once == [MEMBERS, 1] * 2 and info.tolist() == [OK] * 3
    assert clip._active_mask.tolist() == [0, 0, 1] and not clip._counters.any()
    for view, core in zip(views, cores, strict=True):
        torch.testing.assert_close(view.double(), reference.clip_spectrum(core, 0.1), rtol=0, atol=2e-6)


@pytest.mark.parametrize("absent", [{1}])
def test_nobody_waits_forever(monkeypatch, absent):
    """Nobody takes the result of a group that timed out, and the next launch of groups raises."""
    monkeypatch.setattr(cooperative, "MAX_SPINS", 3)
    for call, expected in (
        (lambda: clipped(spectra(0.5))[1], 1),
        (lambda: spectral.svd(torch.eye(80, 66)[None])[3], NOT_CONVERGED),
    ):
        cooperative._failure_flag.cache_clear()
        assert call().tolist() == [expected]
        with pytest.raises(RuntimeError, match="waited in vain"):
            call()
    with pytest.raises(RuntimeError, match="waited in vain"):
        core_clip.CoreClip([torch.eye(3)], [0])(torch.zeros(0), torch.ones(1), torch.zeros(1))
    cooperative._failure_flag.cache_clear()


@pytest.mark.parametrize("multiprocessors", [1, 2, 7, 108, 132, 304])
def test_groups_fit_on_the_device(multiprocessors, monkeypatch):
    """Whatever the sizes of the matrices: all members of all groups run at once, or all groups have one member."""
    monkeypatch.undo()
    monkeypatch.setattr(cooperative, "INTERPRETED", False)
    monkeypatch.setattr(devices, "multiprocessors", lambda device: multiprocessors)
    draw = random.Random(0)
    for _ in range(300):
        jobs = [draw.choice((1, 9, 64, 256)) for _ in range(draw.randint(1, 200))]
        sizes = cooperative.group_sizes(torch.device("cpu"), jobs)
        together = cooperative.grid_options(sizes)["launch_cooperative_grid"]
        assert sum(sizes) <= multiprocessors if together else sizes == [1] * len(jobs)


def test_large_cores_do_not_wait_for_small_ones(monkeypatch):
    """A network with one large and many small cores: the groups are launched without them, and cooperatively."""
    monkeypatch.undo()
    monkeypatch.setattr(cooperative, "INTERPRETED", False)
    launched = []
    monkeypatch.setattr(core_clip, "launch", lambda kernel, grid, *args, **options: launched.append((grid, options)))
    ranks = [3] * 200 + [66]
    cores = torch.zeros(sum(r * r for r in ranks)).split([r * r for r in ranks])
    clip = core_clip.CoreClip([core.view(r, r) for core, r in zip(cores, ranks, strict=True)], range(len(ranks)))
    clip(torch.zeros(0), torch.zeros(0), torch.zeros(0))
    assert [grid for grid, _ in launched] == [(3,), (200,)] * 2  # 4 multiprocessors
    assert [bool(options.get("launch_cooperative_grid")) for _, options in launched] == [True, False] * 2
