"""FAB: distances known in closed form, the projection onto a hyperplane in the box, what it returns."""

import pytest
import torch
from helpers.classifiers import Function, batch, linear_model, network
from scipy.optimize import linprog, minimize

from condlr_ext.attacks import fab
from condlr_ext.attacks.boundary import OVERSHOOT, _to_hyperplane
from condlr_ext.errors import NonFiniteError


@pytest.mark.parametrize("norm, dual", [("linf", 1), ("l2", 2)])
def test_the_distance_of_a_linear_classifier(norm, dual):
    model, w = linear_model()
    x = 0.45 + 0.1 * torch.rand(8, 12, dtype=torch.float64)
    x = x - torch.rand(8, 1, dtype=torch.float64) * (x @ w)[:, None] * w / (w @ w)  # towards the boundary
    y = model(x).argmax(1)
    exact = (x @ w).abs() / w.norm(dual)
    found, distance = fab(model, x, y, norm=norm, steps=5)
    inside = exact < 0.3  # the box is farther away
    assert inside.sum() >= 4 and (model(found).argmax(1) != y)[inside].all()
    assert (distance[inside] >= exact[inside]).all() and (distance[inside] <= OVERSHOOT * exact[inside]).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_projection_onto_a_plane_in_the_box_is_the_nearest_point(norm):
    point, slope = torch.rand(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    slope[:, 2] = 0
    reach = (slope.clamp_min(0).sum(1) + slope.clamp_max(0).sum(1)) / 2 + 0.4 * slope.abs().sum(1)
    step = _to_hyperplane(point, slope, reach, norm)
    torch.testing.assert_close((slope * (point + step)).sum(1), reach)
    assert (point + step).min() >= -1e-12 and (point + step).max() <= 1 + 1e-12
    for p, w, value, d in zip(point, slope, reach, step, strict=True):
        bounds = [(-a, 1 - a) for a in p.tolist()]
        if norm == "linf":  # variables d and the bound on their sizes
            rows = torch.cat([torch.eye(5), -torch.eye(5)]).double()
            rows = torch.cat([rows, -torch.ones(10, 1)], 1)
            equal = torch.cat([w, torch.zeros(1)])[None]
            best = linprog(
                [0] * 5 + [1], rows.numpy(), [0] * 10, equal.numpy(), [float(value - w @ p)], [*bounds, (0, None)]
            ).fun
            size = d.abs().max()
        else:
            plane = {"type": "eq", "fun": lambda z, w=w, p=p, v=value: float(w @ (p + torch.tensor(z)) - v)}
            options = {"ftol": 1e-14, "maxiter": 500}
            best = minimize(lambda z: z @ z, [0] * 5, bounds=bounds, constraints=plane, options=options).fun ** 0.5
            size = d.norm()
        assert size == pytest.approx(best, rel=1e-5)
    beyond = _to_hyperplane(point, slope, 100 * reach.abs() + 100, norm)
    torch.testing.assert_close(point + beyond, torch.where(slope == 0, point, (slope > 0).double()))


@pytest.mark.parametrize("norm, power", [("linf", torch.inf), ("l2", 2)])
def test_what_is_returned(norm, power):
    model, (x, y) = network(), batch(60)
    found, distance = fab(model, x, y, norm=norm, steps=10)
    wrong = model(x).argmax(1) != y
    assert (distance[wrong] == 0).all() and torch.equal(found[wrong], x[wrong])
    broken = distance < torch.inf
    assert broken.sum() > wrong.sum() > 0 and (model(found).argmax(1) != y)[broken].all()
    torch.testing.assert_close(torch.linalg.vector_norm(found - x, power, 1)[broken], distance[broken])
    assert found.min() >= 0 and found.max() <= 1


def test_where_nothing_is_found():
    model = Function(lambda x: 0 * x[:, :3] + torch.tensor([1.0, 0.0, -1.0]))
    x, y = torch.rand(4, 3), torch.zeros(4, dtype=torch.int64)
    found, distance = fab(model, x, y, steps=3)
    assert torch.equal(found, x) and distance.isinf().all()
    found, distance = fab(model, x[:0], y[:0])
    assert found.shape == (0, 3) and distance.shape == (0,)


def test_bad_arguments():
    model, (x, y) = network(), batch()
    for name in ("steps", "targets"):
        with pytest.raises(ValueError, match=f"fab: {name} must be an integer >= 1, got 0"):
            fab(model, x, y, **{name: 0})
    with pytest.raises(ValueError, match="fab: norm must be one of linf, l2, got 'l1'"):
        fab(model, x, y, norm="l1")
    with pytest.raises(ValueError, match="fab: the model's output carries no gradient"):
        fab(Function(lambda x: model(x).detach()), x, model(x).argmax(1))
    with pytest.raises(NonFiniteError, match="fab: the gradient .* is not finite"):
        fab(Function(lambda x: model(x) + (0 * x.sum(1, keepdim=True)).sqrt()), x, model(x).argmax(1))
