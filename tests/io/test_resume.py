"""Training resumed from a checkpoint, bit for bit."""

import copy

import pytest
import torch
from helpers.checkpoints import equal_states, make_optimizer, small_mlp, steps
from helpers.models import MODELS, example_input
from torch import nn

import condlr_ext
from condlr_ext.io import checkpoint

OURS = [name for name in ("CondLRSGD", "CondLRAdamW") if hasattr(condlr_ext.optim, name)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [*OURS, "SGD", "AdamW", "LBFGS"])
def test_resume_is_bit_exact(tmp_path, kind, dtype):
    if kind == "LBFGS":
        if dtype != torch.float32:
            pytest.skip("LBFGS in half precision diverges")

        def train(model, optimizer, inputs):
            def closure():
                optimizer.zero_grad()
                loss = model(inputs[0]).square().mean()
                loss.backward()
                return loss

            for _ in inputs:
                optimizer.step(closure)
    else:
        train = steps
    inputs = [torch.rand(6, 12).to(dtype) for _ in range(6)]
    start = small_mlp().to(dtype)
    through = copy.deepcopy(start)
    optimizer = make_optimizer(kind, through)
    train(through, optimizer, inputs[:3])
    path = tmp_path / "m.safetensors"
    condlr_ext.save(through, path, optimizer, extra={"step": 3})
    if kind in OURS and dtype != torch.float32:
        assert checkpoint.read(path).optimizer["state"][0]["master"].dtype == torch.float32
    train(through, optimizer, inputs[3:])

    resumed = small_mlp(None).to(dtype)
    condlr_ext.load(resumed, path)  # dense until here
    again = make_optimizer(kind, resumed)
    assert condlr_ext.load(resumed, path, again).extra == {"step": 3}
    train(resumed, again, inputs[3:])
    assert equal_states(resumed.state_dict(), through.state_dict())
    assert equal_states(again.state_dict(), optimizer.state_dict())


def test_resume_of_a_residual_network_with_scheduler_and_random_numbers(tmp_path):
    def make():
        model = nn.Sequential(MODELS["resnet"](8), nn.Dropout(0.2)).train()
        condlr_ext.factorize(model, rank=3)
        optimizer = condlr_ext.optim.CondLRSGD(model, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-3, tau=0.1)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2)

    def train(model, optimizer, schedule, inputs):
        for x in inputs:
            steps(model, optimizer, [x])
            schedule.step()

    inputs = [example_input("resnet") for _ in range(5)]
    model, optimizer, schedule = make()
    train(model, optimizer, schedule, inputs[:3])
    extra = {"schedule": schedule.state_dict(), "rng": torch.get_rng_state()}
    condlr_ext.save(model, tmp_path / "m.safetensors", optimizer, extra=extra)
    train(model, optimizer, schedule, inputs[3:])

    resumed = make()
    extra = condlr_ext.load(resumed[0], tmp_path / "m.safetensors", resumed[1]).extra
    resumed[2].load_state_dict(extra["schedule"])
    torch.set_rng_state(extra["rng"])
    train(*resumed, inputs[3:])
    assert equal_states(resumed[0].state_dict(), model.state_dict())
    assert resumed[1].param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 0.05 * 0.1**2


@pytest.mark.parametrize("kind", [*OURS, "SGD", "AdamW"])
def test_plain_torch_files_load_with_weights_only(tmp_path, kind):
    model = small_mlp()
    optimizer = make_optimizer(kind, model)
    steps(model, optimizer, [torch.rand(6, 12)] * 2)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "m.pt")
    stored = torch.load(tmp_path / "m.pt", weights_only=True)
    other = small_mlp()
    again = make_optimizer(kind, other)
    other.load_state_dict(stored["model"])
    again.load_state_dict(stored["optimizer"])
    x = torch.rand(6, 12)
    steps(model, optimizer, [x])
    steps(other, again, [x])
    assert equal_states(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("kind", OURS)
def test_a_wrapped_model_goes_on_unwrapped_and_back(kind, tmp_path):
    """The state names parameters as the model does, so it moves from many processes to one."""
    path = tmp_path / "model.safetensors"
    for first, second in ((_compiled, _plain), (_plain, _compiled), (nn.DataParallel, _compiled)):
        model, other = first(small_mlp()), second(small_mlp())
        optimizer, resumed = make_optimizer(kind, model), make_optimizer(kind, other)
        inputs = torch.randn(6, 10, 12)
        steps(model, optimizer, inputs[:3])
        condlr_ext.save(model, path, optimizer)
        condlr_ext.load(other, path, resumed)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for m, o in ((model, optimizer), (other, resumed)):
            steps(m, o, inputs[3:])
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def _compiled(model):
    torch._dynamo.reset()  # code that has seen other batches takes sizes for open, and adds in another order
    return torch.compile(model, backend="eager")


def _plain(model):
    return model
