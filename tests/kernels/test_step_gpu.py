"""The Triton kernels of the step of a network on a CUDA device. Not yet run on one."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import external_writes as writes
from helpers.cuda import DEVICE, captured, litter, never_waiting, on_another_stream
from helpers.matrices import SPECTRA, backward_error, kappa, non_orthonormality, orthonormal, with_spectrum
from helpers.op_arguments import hyper_table

import condlr_ext
from condlr_ext import ops, reference
from condlr_ext.nn import LowRankLayer
from condlr_ext.optim import CondLRSGD, param_groups

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("float32_convolutions")]

DTYPES = [torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def by_the_kernels():
    """Use the kernels alone: BackendError where they cannot serve."""
    with condlr_ext.backend("triton"):
        yield


# ranks above 64 are clipped by other kernels
SHAPES = [(120, 200, 30), (64, 36, 5), (16, 360, 16), (6, 1, 1), (300, 180, 64), (150, 130, 100), (700, 90, 17)]


def tensors(dtype, shapes=SHAPES):
    """Parameters, gradients and momentum buffers of layers of these (m, n, r), as the step op takes them."""
    params = []
    for m, n, r in shapes:
        S = with_spectrum(1 + 0.1 * SPECTRA["random"](r), r, r)
        params += [orthonormal(m, r), S, orthonormal(n, r), torch.randn(m, dtype=torch.float64)]
    params = [p.to(DEVICE, dtype).contiguous() for p in params]
    return params, [torch.randn_like(p) for p in params], [torch.randn_like(p) for p in params]


def table(layers, **options):
    return hyper_table(layers, **(dict(lr=0.01) | options)).to(DEVICE)


def counter(layers):
    return torch.zeros(layers, dtype=torch.int64, device=DEVICE)


def copies(tensors, *where):
    return [t.to(*where, copy=True) for t in tensors]


def on_the_constraint_set(params, tau=0.1):
    tolerance = 1e-6 if params[0].dtype == torch.float32 else 1e-13
    for U, S, V, _ in zip(*[iter(copies(params, "cpu"))] * 4, strict=True):
        assert kappa(S) <= (1 + tau) * (1 + (5e-6 if S.dtype == torch.float32 else 1e-11))
        assert max(non_orthonormality(U), non_orthonormality(V)) <= tolerance
    return True


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ten_steps(dtype):
    """Momentum starts, weight decays, gradients change at every step; compared with float64 by LAPACK."""
    params, _, buffers = tensors(dtype)
    exact, exact_buffers = copies(params, "cpu", torch.float64), copies(buffers, "cpu", torch.float64)
    skipped = counter(len(SHAPES))
    for i in range(10):
        hyper = table(len(SHAPES), momentum=0.9, weight_decay=1e-3, fresh=float(i == 0))
        grads = [torch.randn_like(p) for p in params]
        ops.step.step(params, grads, buffers, hyper, skipped)
        reference.step(exact, copies(grads, "cpu", torch.float64), exact_buffers, hyper.cpu(), skipped.cpu())
        assert on_the_constraint_set(params)
    assert not skipped.any()
    for got, want in zip(params + buffers, exact + exact_buffers, strict=True):
        allowed = 10 * backward_error(dtype, *got.shape)  # ten steps of backward stable pieces
        assert torch.linalg.norm(got.cpu() - want) <= allowed * torch.linalg.norm(want)


@pytest.mark.parametrize(
    "options",
    [
        dict(nesterov=1, momentum=0.9), dict(dampening=0.5, weight_decay=0.1), dict(maximize=1), dict(tau=0.0),
        dict(tau=math.inf), dict(sigma_max=0.9), dict(band=1), dict(band=2), dict(lr=30.0), dict(lr=1e6),
        dict(precondition=0),
    ],
    ids=str,
)  # fmt: skip
def test_options(options):
    params, grads, buffers = tensors(torch.float64)
    exact, exact_buffers = copies(params, "cpu"), copies(buffers, "cpu")
    hyper, skipped = table(len(SHAPES), **options), counter(len(SHAPES))
    ops.step.step(params, grads, buffers, hyper, skipped)
    reference.step(exact, copies(grads, "cpu"), exact_buffers, hyper.cpu(), skipped.cpu())
    assert not skipped.any()
    lr = options.get("lr", 0)
    for i, (got, want) in enumerate(zip(params + buffers, exact + exact_buffers, strict=True)):
        if lr > 1e3 and i % 4 == 1 and i < len(params):  # known to rounding of lr G
            continue
        # where a factor has fewer directions to go than its rank, lr = 1e6 makes them of rounding
        atol = 1e-7 if lr > 1e3 else 1e-9 if lr else 1e-12
        torch.testing.assert_close(got.cpu(), want, rtol=1e-9, atol=atol)
    assert options.get("tau") == math.inf or on_the_constraint_set(params, options.get("tau", 0.1))


def test_repeated_steps_give_the_same_bits():
    """Neither old contents of memory nor the address of gradients matters."""
    torch.use_deterministic_algorithms(False)
    start, _, start_buffers = tensors(torch.float32)
    all_grads = [[torch.randn_like(p) for p in start] for _ in range(5)]
    hyper, results = table(len(SHAPES)), []
    for value in (0.0, math.nan, 1e30, 0.0):
        params, buffers, skipped = copies(start), copies(start_buffers), counter(len(SHAPES))
        for grads in all_grads:
            litter(value)
            ops.step.step(params, copies(grads), buffers, hyper, skipped)
        results.append([*params, *buffers, skipped])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("role", range(4))
def test_layers_with_a_non_finite_gradient_stay(role):
    shapes = [shape for shape in SHAPES if shape[1] > 1]  # V = ±1 never moves
    params, grads, buffers = tensors(torch.float32, shapes)
    for layer in (1, 4):
        grads[4 * layer + role].view(-1)[-1] = math.nan
    before = copies(params + buffers)
    skipped = counter(len(shapes))
    ops.step.step(params, grads, buffers, table(len(shapes)), skipped)
    assert skipped.tolist() == [int(layer in (1, 4)) for layer in range(len(shapes))]
    for i, (now, then) in enumerate(zip(params + buffers, before, strict=True)):
        assert torch.equal(now, then) == (i // 4 % len(shapes) in (1, 4))


def test_step_on_another_stream():
    params, grads, buffers = tensors(torch.float32)
    twin, twin_buffers = copies(params), copies(buffers)
    hyper, skipped = table(len(SHAPES)), counter(len(SHAPES))
    for _ in range(3):
        ops.step.step(params, grads, buffers, hyper, skipped)
        on_another_stream(lambda: ops.step.step(twin, [g * 1.0 for g in grads], twin_buffers, hyper, skipped))
    assert all(torch.equal(a, b) for a, b in zip(params + buffers, twin + twin_buffers, strict=True))


def test_a_warm_step_allocates_nothing():
    params, grads, buffers = tensors(torch.float32)
    hyper, skipped = table(len(SHAPES)), counter(len(SHAPES))
    counts = []
    for _ in range(3):
        ops.step.step(params, grads, buffers, hyper, skipped)
        counts.append(torch.cuda.memory_stats()["allocation.all.allocated"])
    assert counts[1] == counts[2]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_step_on_a_second_device():
    params, grads, buffers = tensors(torch.float32)
    there = [copies(t, "cuda:1") for t in (params, grads, buffers)]
    hyper, skipped = table(len(SHAPES)), counter(len(SHAPES))
    ops.step.step(params, grads, buffers, hyper, skipped)
    ops.step.step(*there, hyper.to("cuda:1"), skipped.to("cuda:1"))
    assert all(torch.equal(a, b.to(a.device)) for a, b in zip(params, there[0], strict=True))


# ----------------------------------------------------------------------------------------------- training


class Training:
    """A small network of all kinds of layers with its optimizer, whose lr and tau are on the device."""

    def __init__(self, net, lr=0.05, tau=0.1):
        self.net = net
        self.lr, self.tau = (torch.tensor(value, device=DEVICE) for value in (lr, tau))
        options = {"lr": self.lr}
        groups = param_groups(net, factors=options, cores=options | {"tau": self.tau}, other=options)
        self.optimizer = CondLRSGD(groups, lr=lr, momentum=0.9, tau=tau, capturable=True)
        self.x = torch.empty(16, 3, 8, 8, device=DEVICE).to(memory_format=torch.channels_last)
        self.y = torch.empty(16, dtype=torch.int64, device=DEVICE)

    def feed(self, x, y, lr=0.05, tau=0.1):
        self.x.copy_(x)
        self.y.copy_(y)
        self.lr.fill_(lr)
        self.tau.fill_(tau)

    def iteration(self):
        self.optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(self.net(self.x), self.y).backward()
        self.optimizer.step()

    def state(self):
        buffers = [state["momentum_buffer"] for state in self.optimizer.state.values()]
        return copies([*map(torch.Tensor.detach, self.net.parameters()), *buffers])


def network(head):
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        condlr_ext.LowRankConv2d(3, 8, 3, padding=1, rank=7, device=DEVICE), torch.nn.ReLU(), torch.nn.Flatten(),
        condlr_ext.LowRankLinear(8 * 64, 90, rank=17, device=DEVICE), torch.nn.ReLU(),
        condlr_ext.LowRankLinear(90, 80, rank=70, device=DEVICE), torch.nn.ReLU(), head,
    )  # fmt: skip
    return net.to(DEVICE, memory_format=torch.channels_last)


def batch():
    return torch.randn(16, 3, 8, 8), torch.randint(0, 10, (16,))


def close(got, expected, tolerance=1e-5):
    return all(torch.linalg.norm(a - b) <= tolerance * torch.linalg.norm(b) for a, b in zip(got, expected, strict=True))


def test_a_replayed_iteration_is_the_eager_one():
    """lr and tau are read anew in every replay."""
    net = network(torch.nn.Linear(80, 10))
    ours, eager = Training(net), Training(copy.deepcopy(net))
    for training in (ours, eager):
        torch.manual_seed(1)
        training.feed(*batch())
    replay = captured(ours.iteration)
    for _ in range(3):
        eager.iteration()
    assert close(ours.state(), eager.state())
    for lr, tau in ((0.05, 0.1), (0.1, 0.5), (0.0, 0.02), (0.01, 0.02)):
        x, y = batch()
        before = ours.state()
        for training in (ours, eager):
            training.feed(x, y, lr, tau)
        replay()
        eager.iteration()
        assert close(ours.state(), eager.state())
        head = ours.net[-1].weight
        assert torch.equal(head, before[[p is head for p in ours.net.parameters()].index(True)]) == (lr == 0)
        for layer in ours.net.modules():
            if isinstance(layer, LowRankLayer):
                assert kappa(layer.S.detach().cpu()) <= (1 + tau) * (1 + 1e-5)
                assert max(non_orthonormality(X.cpu()) for X in (layer.U, layer.V)) <= 1e-6
    assert ours.optimizer.skipped == 0


def test_replays_do_not_mind_steps_beside_them():
    """The steps beside them have gradients at other addresses, or lack some."""
    net = network(torch.nn.Linear(80, 10))
    ours, eager = Training(net), Training(copy.deepcopy(net))
    x, y = batch()
    for training in (ours, eager):
        training.feed(x, y)
    static = [torch.zeros_like(p) for p in net.parameters()]

    def iteration():
        for p, grad in zip(net.parameters(), static, strict=True):
            p.grad = grad.zero_()
        F.cross_entropy(net(ours.x), ours.y).backward()
        ours.optimizer.step()

    replay = captured(iteration)
    for _ in range(3):
        eager.iteration()
    for left in (None, 0, 3):
        for training in (ours, eager):
            training.iteration()
            if left is not None:
                list(training.net.parameters())[left].grad = None
                training.optimizer.step()
        litter(math.nan)
        replay()
        eager.iteration()
        assert close(ours.state(), eager.state())


def test_a_replay_counts_what_it_skips():
    """All layers, when a NaN comes in; nothing has changed then, and training goes on."""
    training = Training(network(condlr_ext.LowRankLinear(80, 10, rank=6, device=DEVICE)))
    good = batch()
    training.feed(*good)
    replay = captured(training.iteration)
    before = training.state()
    training.x.fill_(math.nan)
    for count in (4, 8):
        replay()
        assert training.optimizer.skipped == count
    assert all(torch.equal(a, b) for a, b in zip(training.state(), before, strict=True))
    training.feed(*good)
    replay()
    assert training.optimizer.skipped == 8
    after = training.state()
    assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert all(t.isfinite().all() for t in after)


@pytest.mark.parametrize("write", [writes.double_u, writes.dependent_columns])
def test_a_write_that_the_version_counter_shows(write):
    for dtype in DTYPES:
        writes.check_that_the_weight_does_not_jump(writes.sgd, write, dtype, DEVICE)
    writes.check_the_next_step(writes.adamw, write, DEVICE)


def test_a_write_past_the_version_counter():
    """The layer stays until its mark has come to the host, here one step, and then has the weight that it had."""
    model, optimizer = writes.trained(writes.sgd, device=DEVICE, tau=math.inf)
    model[0].U.data.mul_(2)
    weight, before = model[0].weight.detach().clone(), copies(model[0].parameters())
    writes.set_lr(optimizer, 0.0)
    for steps in range(3):
        writes.step(model, optimizer)
        torch.cuda.synchronize()
        same = all(torch.equal(p, q) for p, q in zip(model[0].parameters(), before, strict=True))
        assert same == (steps == 0) and optimizer.skipped == 1
    assert (model[0].weight - weight).norm() <= 2e-6 * weight.norm() and writes.orthonormality_of(model[0]) <= 2e-6


def test_a_write_under_a_graph():
    """Replays leave the layer unchanged and count it; the steps outside put that right."""
    training = Training(network(torch.nn.Linear(80, 10)))
    training.feed(*batch())
    replay = captured(training.iteration)
    layer = training.net[0]
    layer.U.data.mul_(2)
    before = copies(layer.parameters())
    for steps in (1, 2):
        replay()
        assert all(torch.equal(p, q) for p, q in zip(layer.parameters(), before, strict=True))
        assert training.optimizer.skipped == steps
    for _ in range(3):
        training.iteration()
        torch.cuda.synchronize()
    skipped = training.optimizer.skipped.item()
    replay()
    assert writes.orthonormality_of(layer) <= 2e-6 and training.optimizer.skipped == skipped <= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("band", reference.BANDS)
def test_a_step_with_lr_0_and_zero_gradients_is_the_identity(band, dtype):
    for make in (writes.sgd, writes.adamw):
        writes.check_the_identity(make, band, dtype, DEVICE)


def test_cores_that_do_not_move_stay():
    """Of any rank."""
    for dtype in DTYPES:
        params, grads, buffers = tensors(dtype)
        ops.step.step(params, grads, buffers, table(len(SHAPES)), counter(len(SHAPES)))
        before, skipped = copies(params), counter(len(SHAPES))
        ops.step.step(params, grads, buffers, table(len(SHAPES), lr=0.0), skipped)
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True)) and not skipped.any()


def test_a_warm_step_does_not_wait():
    training = Training(network(torch.nn.Linear(80, 10)))
    training.feed(*batch())
    for _ in range(3):
        training.iteration()
    with never_waiting():
        training.optimizer.step()
        training.lr.fill_(0.01)
        training.optimizer.step()


def test_capture_of_a_first_step_is_refused():
    training = Training(network(torch.nn.Linear(80, 10)))
    training.feed(*batch())
    F.cross_entropy(training.net(training.x), training.y).backward()
    with pytest.raises(RuntimeError, match="before one is captured"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        training.optimizer.step()


def test_bfloat16_layers_step_as_their_float32_masters():
    layer = condlr_ext.LowRankLinear(200, 120, rank=24, device=DEVICE).to(torch.bfloat16)
    twin = copy.deepcopy(layer).float()
    optimizers = [CondLRSGD(module, 0.05, 0.9, tau=0.1) for module in (layer, twin)]
    for _ in range(3):
        for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
        assert torch.equal(optimizers[0].state[p]["master"], q) and torch.equal(p, q.to(torch.bfloat16))
