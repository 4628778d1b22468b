"""RNNs and stacks of experts whose matrices are low-rank."""

import copy
import pickle

import pytest
import torch
from helpers.training import assert_constraint
from torch import nn

import condlr_ext
from condlr_ext.nn import low_rank_layers
from condlr_ext.nn.formed_parameters import is_formed

X = torch.rand(4, 3, 6, generator=torch.Generator().manual_seed(0))


class Experts(nn.Module):
    """Experts of one layer each, run in a loop."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, 6))
        self.forms = 0

    def forward(self, x):
        return sum(x @ self.weight[i].mT for i in range(3))


def network(kind):
    torch.manual_seed(0)
    return nn.Sequential({"lstm": lambda: nn.LSTM(6, 8, num_layers=2), "experts": Experts}[kind]())


def output(model, x=X):
    y = model(x)
    return y if isinstance(y, torch.Tensor) else y[0]


EACH = pytest.mark.parametrize("kind", ["lstm", "experts"])


def low_rank(kind):
    model = network(kind)
    condlr_ext.factorize(model, rank=3, include="0")
    return model


@EACH
def test_the_weight_is_a_property_and_gradients_reach_the_factors(kind):
    model = low_rank(kind)
    name = "weight_hh_l1" if kind == "lstm" else "weight"
    owner = model[0]
    assert is_formed(owner) and isinstance(owner, type(network(kind)[0]))
    with pytest.raises(AttributeError, match=f"{name} is formed from the factors of {name}_factors"):
        setattr(owner, name, nn.Parameter(torch.zeros(3)))
    with pytest.raises(AttributeError, match="would be lost"):
        getattr(owner, name).zero_()
    dense = condlr_ext.to_dense(copy.deepcopy(model))
    torch.testing.assert_close(getattr(owner, name), getattr(dense[0], name))
    output(model).square().sum().backward()
    output(dense).square().sum().backward()
    for layer_name, layer in low_rank_layers(model).items():
        path, _, index = layer_name.removeprefix("0.").partition("_factors")
        G = getattr(dense[0], path).grad
        G = G[int(index[1:])] if index else G
        torch.testing.assert_close(layer.S.grad, layer.U.mT @ G @ layer.V, rtol=1e-4, atol=1e-5)


def test_weights_are_formed_once_in_a_forward(monkeypatch):
    from condlr_ext.nn import formed_parameters

    model, calls = low_rank("experts"), []
    product = formed_parameters._product
    monkeypatch.setattr(formed_parameters, "_product", lambda child: calls.append(child) or product(child))
    output(model)
    assert len(calls) == 1


@EACH
def test_copies_pickles_dtypes_and_tied_modules(kind):
    model = low_rank(kind)
    expected = output(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin[0]) is type(model[0]) and torch.equal(output(twin), expected)
        assert all(p is not q for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    torch.testing.assert_close(output(copy.deepcopy(model).double(), X.double()).float(), expected)
    shared = nn.ModuleList([model[0], model[0]])
    condlr_ext.to_dense(shared)
    assert shared[0] is shared[1] and not is_formed(shared[0])


@EACH
def test_transforms_and_checkpointing(kind):
    model = low_rank(kind)
    parameters = dict(model.named_parameters())
    twice = {name: 2 * p if name.endswith("S") else p for name, p in parameters.items()}
    changed = torch.func.functional_call(model, twice, (X,))
    changed = changed if isinstance(changed, torch.Tensor) else changed[0]
    assert not torch.allclose(changed, output(model))
    torch.testing.assert_close(output(model), output(condlr_ext.to_dense(copy.deepcopy(model))))


def test_stacks_are_taken_whole_and_by_name():
    report = condlr_ext.factorize(nn.Sequential(Experts(), nn.Linear(8, 8)), rank=3)
    reason = "a stack of matrices is factorized where include or rank names it"
    assert report.skipped == {"0.weight": reason}
    for include in ("0", "0.weight", "0.weight_factors.*", Experts):
        assert len(condlr_ext.factorize(network("experts"), rank=3, include=include).layers) == 3
    with pytest.raises(ValueError, match="all matrices of its stack are factorized, or none"):
        condlr_ext.factorize(network("experts"), rank=3, include="0.weight_factors.1")
    model = network("experts")
    condlr_ext.factorize(model, rank={f"0.weight_factors.{i}": i + 1 for i in range(3)})
    assert [layer.rank for layer in model[0].weight_factors] == [1, 2, 3]
    torch.testing.assert_close(output(model), output(condlr_ext.to_dense(copy.deepcopy(model))))


def test_parts_of_a_module_at_a_time():
    model = network("lstm")
    condlr_ext.factorize(model, rank=3, include="0.weight_hh_l0")
    condlr_ext.factorize(model, rank=2, include="0.weight_ih_l1")
    assert list(low_rank_layers(model)) == ["0.weight_hh_l0_factors", "0.weight_ih_l1_factors"]
    optimizer = condlr_ext.optim.CondLRSGD(model, lr=0.1, tau=0.1)
    output(model).square().sum().backward()
    optimizer.step()
    assert_constraint(model, 0.1)
    expected = output(model)
    torch.testing.assert_close(output(condlr_ext.to_dense(model)), expected)
    assert list(model.state_dict()) == list(network("lstm").state_dict())


def test_packed_sequences_and_fresh_parameters():
    model = low_rank("lstm")
    packed = nn.utils.rnn.pack_padded_sequence(X, [4, 3, 1], enforce_sorted=True)
    dense = condlr_ext.to_dense(copy.deepcopy(model))
    torch.testing.assert_close(model[0](packed)[0].data, dense[0](packed)[0].data)
    model[0].reset_parameters()
    assert max(condlr_ext.condition_numbers(model).values()) == pytest.approx(1)


def test_wrapped_and_parametrized_parameters_are_left_alone():
    lstm = nn.LSTM(6, 8)
    nn.utils.parametrizations.weight_norm(lstm, "weight_hh_l0")
    report = condlr_ext.factorize(nn.Sequential(lstm, nn.Linear(8, 8)), rank=3)
    assert report.skipped["0.weight_ih_l0"] == "it has state_dict hooks, which know its dense weight"


@EACH
def test_compiled_modules_follow_their_factors(kind):
    model = low_rank(kind)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=kind == "experts")  # dynamo leaves RNNs to Python
    for _ in range(2):
        torch.testing.assert_close(output(compiled), output(model))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.9)
