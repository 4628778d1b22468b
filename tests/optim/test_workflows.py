"""Uses of a model in training scripts: torch.func, copies, files, averages, checkpointing, meta device, sharing."""

import copy
import inspect
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers.matrices import non_orthonormality
from helpers.models import MODELS, Residual, example_input
from torch import nn
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import condlr_ext
from condlr_ext import LowRankLinear
from condlr_ext.nn import LowRankLayer
from condlr_ext.optim import CondLRAdamW, CondLRSGD

NETWORKS = pytest.mark.parametrize("name", ["resnet", "vit", "encoder"])
# attention on CPUs has no batching rule of its own
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def low_rank(name: str, seed: int = 0, dtype=torch.float32):
    torch.manual_seed(seed)
    model = MODELS[name]()
    condlr_ext.factorize(model, rank=0.5)
    return model.to(dtype)


def data(name: str, seed: int = 0, batch: int = 8, dtype=torch.float32):
    torch.manual_seed(100 + seed)
    return example_input(name, batch, dtype), torch.randint(0, 10, (batch,))


def train(model, optimizer, name: str, steps) -> None:
    for step in steps:
        x, y = data(name, step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def layers_of(model) -> dict[str, LowRankLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LowRankLayer)}


def assert_on_constraint_set(model, tau=0.1) -> None:
    assert max(condlr_ext.condition_numbers(model).values()) <= (1 + tau) * (1 + 5e-6)
    for layer in layers_of(model).values():
        assert max(non_orthonormality(layer.U), non_orthonormality(layer.V)) <= 2e-6


# ---------------------------------------------------------------------------------------------- torch.func


@NETWORKS
def test_functional_call_and_gradients(name):
    model, (x, y) = low_rank(name, dtype=torch.float64).eval(), data(name, dtype=torch.float64)
    params = {key: p.detach() for key, p in model.named_parameters()}

    def loss(params, x, y):
        return F.cross_entropy(functional_call(model, params, (x,)), y)

    F.cross_entropy(model(x), y).backward()
    whole = grad(loss)(params, x, y)
    for key, p in model.named_parameters():
        torch.testing.assert_close(whole[key], p.grad)
    per_sample = vmap(grad(loss), (None, 0, 0))(params, x[:, None], y[:, None])
    for key, g in per_sample.items():
        torch.testing.assert_close(g.mean(0), whole[key])


@NETWORKS
def test_ensembles(name):
    models = [low_rank(name, seed).eval() for seed in range(3)]
    x, _ = data(name)
    params, buffers = stack_module_state(models)
    skeleton = copy.deepcopy(models[0]).to("meta")
    together = vmap(lambda p, b: functional_call(skeleton, (p, b), (x,)))(params, buffers)
    # another order of float32 products, through all layers
    torch.testing.assert_close(together, torch.stack([m(x) for m in models]), rtol=1e-3, atol=1e-4)


def test_jacobian_of_a_network():
    model = low_rank("resnet", dtype=torch.float64).eval()
    x, _ = data("resnet", batch=2, dtype=torch.float64)
    J = jacrev(model)(x)
    direction = torch.randn_like(x)
    out, slope = torch.func.jvp(model, (x,), (direction,))
    torch.testing.assert_close(torch.einsum("bkcihw,cihw->bk", J, direction), slope)
    torch.testing.assert_close(out, model(x))


# ------------------------------------------------------------------------------------------ copies and files


def through_pickle(pair):
    return pickle.loads(pickle.dumps(pair))


def through_torch_save(pair):
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, through_pickle, through_torch_save], ids=lambda f: f.__name__)
@NETWORKS
def test_copies_of_model_and_optimizer_train_on(name, way):
    """Bit for bit, in the middle of training."""
    model = low_rank(name)
    optimizer = CondLRSGD(model, 0.05, 0.9, tau=0.1)
    train(model, optimizer, name, range(2))
    twin, twin_optimizer = way((model, optimizer))
    for m, o in ((model, optimizer), (twin, twin_optimizer)):
        train(m, o, name, range(2, 4))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p is not q and torch.equal(p, q)


@NETWORKS
def test_parameter_vector(name):
    model, other = low_rank(name), low_rank(name, seed=1)
    x, _ = data(name)
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()), other.parameters())
    other.load_state_dict(dict(model.named_buffers()), strict=False)
    assert torch.equal(other.eval()(x), model.eval()(x))


@NETWORKS
def test_meta_device(name):
    """A model made without memory, then filled by a state_dict, or fresh layer by layer."""
    stored = low_rank(name)
    x, _ = data(name)
    with torch.device("meta"):
        empty = MODELS[name]()
    condlr_ext.factorize(empty, rank=0.5)
    assert all(p.is_meta for p in empty.parameters())
    filled = copy.deepcopy(empty)
    filled.load_state_dict(stored.state_dict(), assign=True)
    assert torch.equal(filled.eval()(x), stored.eval()(x))
    fresh = empty.to_empty(device="cpu")
    for layer in layers_of(fresh).values():
        layer.reset_parameters()
        assert max(non_orthonormality(layer.U), non_orthonormality(layer.V)) <= 2e-6 and layer.condition_number() == 1
    assert set(condlr_ext.condition_numbers(fresh)) == set(condlr_ext.condition_numbers(stored))


# ------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("use_reentrant", [False, True])
@NETWORKS
def test_activation_checkpointing(name, use_reentrant):
    """The same gradients bit for bit: the forward that is run again takes the same route."""
    model = low_rank(name)
    x, y = data(name)
    gradients = []
    for forward in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        model.zero_grad()
        F.cross_entropy(forward(x.clone().requires_grad_()), y).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_checkpointed_block_keeps_less():
    """Apart from parameters, only the input of a block is kept for backward."""
    block = Residual(16, 16)
    condlr_ext.factorize(block, rank=0.5)
    own = {p.data_ptr() for p in (*block.parameters(), *block.buffers())}
    x = torch.randn(4, 16, 8, 8, requires_grad=True)
    kept = {}
    for way, forward in {"plain": block, "checkpoint": lambda x: checkpoint(block, x, use_reentrant=False)}.items():
        sizes = {}

        def pack(t, sizes=sizes):
            if t.data_ptr() not in own:
                sizes[t.data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            forward(x)
        kept[way] = sum(sizes.values())
    assert kept["checkpoint"] <= x.nbytes < kept["plain"]


@NETWORKS
def test_accumulated_gradients_are_those_of_the_whole_batch(name):
    model, (x, y) = low_rank(name, dtype=torch.float64).eval(), data(name, dtype=torch.float64)
    F.cross_entropy(model(x), y).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for part_x, part_y in zip(x.chunk(4), y.chunk(4), strict=True):
        (F.cross_entropy(model(part_x), part_y) / 4).backward()
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_clipped_gradients_and_a_schedule():
    """clip_grad_norm_ acts on the gradients of the factors; the bound holds under any schedule of lr."""
    model = low_rank("vit")
    optimizer = CondLRSGD(model, 0.5, 0.9, nesterov=True, tau=0.1)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [3])
    for step in range(8):
        x, y = data("vit", step)
        optimizer.zero_grad()
        (100 * F.cross_entropy(model(x), y)).backward()
        assert nn.utils.clip_grad_norm_(model.parameters(), 1.0) > 1
        assert torch.stack([p.grad.norm() for p in model.parameters()]).norm().item() == pytest.approx(1, rel=1e-4)
        optimizer.step()
        schedule.step()
        assert_on_constraint_set(model)


def test_a_layer_used_twice_and_one_in_two_places():
    """Shared layers are one layer: their gradient is the sum, and they are stepped once."""

    class Twice(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.first, self.second = layers

        def forward(self, x):
            return self.second(torch.tanh(self.first(torch.tanh(self.first(x)))))

    torch.manual_seed(0)
    shared = Twice([nn.Linear(12, 12)] * 2)
    condlr_ext.factorize(shared, rank=4)
    assert shared.first is shared.second and isinstance(shared.first, LowRankLinear)
    apart = Twice([copy.deepcopy(shared.first), copy.deepcopy(shared.first)])
    x = torch.randn(5, 12)
    for model in (shared, apart):
        model(x).pow(2).sum().backward()
    for p, q, s in zip(apart.first.parameters(), apart.second.parameters(), shared.first.parameters(), strict=True):
        torch.testing.assert_close(s.grad, p.grad + q.grad)
    optimizer = CondLRSGD(shared, 0.1, 0.9, tau=0.1)
    optimizer.step()
    assert [n for group in optimizer.param_groups for n in group["param_names"]] == [
        "first.U", "first.S", "first.V", "first.bias",
    ]  # fmt: skip
    assert_on_constraint_set(shared)


def test_averaged_model_is_put_back_on_the_constraint_set():
    """The mean of orthonormal matrices is not orthonormal; an optimizer built on it makes it so, in place.

    kappa(S) of the average is then not that of its weight. What building the optimizer changes of the function is what
    clipping the core does: nothing where the average is within the bound.
    """
    name = "resnet"
    model = low_rank(name)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    optimizer = CondLRSGD(model, 0.1, 0.9, tau=0.1)
    for step in range(10):
        train(model, optimizer, name, [step])
        average.update_parameters(model)
    off = {key: non_orthonormality(layer.U) for key, layer in layers_of(average).items()}
    assert max(off.values()) > 1e-3
    weights = {key: layer.weight.detach().clone() for key, layer in layers_of(average).items()}
    spectra = {}
    for key, layer in layers_of(average).items():
        spectra[key] = torch.linalg.svdvals(layer.weight.detach().flatten(1).double())[: layer.rank]
    worst = max((s[0] / s[-1]).item() for s in spectra.values())
    assert worst > 1.1
    for tau in (worst, 0.1):  # a bound it keeps, one it does not
        again = copy.deepcopy(average)
        CondLRSGD(again, lr=0.0, tau=tau)
        assert_on_constraint_set(again, tau)
        for key, layer in layers_of(again).items():
            sigma = spectra[key]
            # the Frobenius distance to the band of rms, and rounding
            s = sigma.norm() / len(sigma) ** 0.5
            clipped = (
                sigma
                if sigma[0] <= (1 + tau) * sigma[-1]
                else sigma.clamp(2 * s / (2 + tau), 2 * s * (1 + tau) / (2 + tau))
            )
            distance = (layer.weight - weights[key]).norm().item()
            assert distance == pytest.approx((clipped - sigma).norm().item(), rel=1e-3, abs=1e-5 * sigma.norm().item())


@pytest.mark.parametrize("ours, theirs", [(CondLRSGD, torch.optim.SGD), (CondLRAdamW, torch.optim.AdamW)])
def test_scripts_for_the_optimizers_of_torch(ours, theirs):
    names = [set(inspect.signature(cls).parameters) for cls in (ours, theirs)]
    assert names[1] - names[0] == {"params", "differentiable"}
    trained = []
    for options in ({}, {"foreach": True}, {"foreach": False, "fused": True}, {"fused": None}):
        torch.manual_seed(0)
        model = nn.Sequential(LowRankLinear(6, 5, rank=2), nn.Linear(5, 3))
        optimizer = ours(model, lr=0.1, tau=0.1, **options)
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
        trained.append(model.state_dict())
    for other in trained[1:]:
        assert all(torch.equal(value, other[name]) for name, value in trained[0].items())
