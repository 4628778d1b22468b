"""Trains a small network with the installed package; the argument says which implementation must serve the step."""

import sys
import warnings

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch

    import condlr_ext

expected = sys.argv[1]
said = [str(w.message) for w in caught if "condlr_ext" in str(w.message)]
assert len(said) == (expected == "reference"), said
assert "site-packages" in condlr_ext.__file__, condlr_ext.__file__

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
condlr_ext.factorize(model, budget=0.5)
optimizer = condlr_ext.optim.CondLRSGD(model, 0.2, 0.5, tau=0.1)
x = torch.randn(200, 20)
y = x[:, :4].argmax(1)
losses = []
for _ in range(100):
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
    assert all(kappa <= 1.1 * (1 + 1e-5) for kappa in condlr_ext.condition_numbers(model).values())
assert losses[-1] < 0.6 * losses[0], losses[::20]
assert condlr_ext.ops.linalg.svd.choose(torch.eye(3)) == expected
try:
    torch.ops.condlr_ext.clip_spectrum(torch.eye(3), -1.0, 0, 1.0)
except RuntimeError as error:  # of the compiled library, where there is one
    assert "tau must be >= 0" in str(error), error
else:
    raise AssertionError("tau = -1 was not refused")
U = model[0].U.detach()
assert (U.T @ U - torch.eye(U.shape[1])).abs().max() < 1e-5
compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
assert torch.allclose(compiled(x), model(x), atol=1e-6)
print(f"smoke: torch {torch.__version__}, {expected}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
