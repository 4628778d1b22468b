"""Lightning and accelerate: loops, precision, callbacks and resuming."""

import lightning
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers.clients import TAU
from helpers.training import assert_constraint
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import condlr_ext
from condlr_ext.optim import CondLRAdamW, CondLRSGD, Projector

X = torch.rand(64, 32, generator=torch.Generator().manual_seed(0))
DATA = DataLoader(TensorDataset(X, X[:, :10].argmax(1)), batch_size=16)


def mlp():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    condlr_ext.factorize(model, rank=0.25, exclude="4")
    return model


def sgd(module):
    return CondLRSGD(module, lr=0.05, momentum=0.9, tau=TAU)


def one_cycle(module):
    optimizer = CondLRAdamW(module, lr=1e-3, tau=TAU)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=20)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def projected(module):
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    Projector(module, tau=TAU).attach(optimizer)
    return optimizer


class Classifier(lightning.LightningModule):
    def __init__(self, optimizers=sgd):
        super().__init__()
        self.model, self.optimizers_of, self.accuracy = mlp(), optimizers, MulticlassAccuracy(10)

    def training_step(self, batch, _):
        x, y = batch
        logits = self.model(x)
        self.accuracy(logits, y)
        self.log("accuracy", self.accuracy)
        return F.cross_entropy(logits, y)

    def configure_optimizers(self):
        return self.optimizers_of(self)


def trainer(folder, **options):
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    return lightning.Trainer(**(dict(max_epochs=2, accelerator="cpu", default_root_dir=folder, **quiet) | options))


OPTIONS = {
    "plain": {},
    "clipping": dict(gradient_clip_val=0.1),
    "accumulation": dict(accumulate_grad_batches=2),
    "bf16": dict(precision="bf16-mixed"),
    "float64": dict(precision="64-true"),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("optimizers", [sgd, one_cycle, projected])
def test_trainer(tmp_path, optimizers, options):
    module = Classifier(optimizers)
    trainer(tmp_path, **options).fit(module, DATA)
    assert_constraint(module, TAU)


def test_an_average_is_outside_of_the_bound_and_says_so(tmp_path):
    module = Classifier()
    average = WeightAveraging(avg_fn=lambda mean, new, count: mean + (new - mean) / (count + 1))
    trainer(tmp_path, callbacks=[average]).fit(module, DATA)
    sigma = torch.linalg.svdvals(module.model[0].weight.detach().double())[:8]
    assert module.model[0].condition_number() == pytest.approx((sigma[0] / sigma[-1]).item(), rel=1e-4)


def test_resumes_bitwise(tmp_path):
    def run(epochs, path=None, callbacks=()):
        module = Classifier()
        keep = dict(callbacks=list(callbacks), enable_checkpointing=bool(callbacks))
        trainer(tmp_path, max_epochs=epochs, **keep).fit(module, DATA, ckpt_path=path, weights_only=False)
        return module

    whole = run(3)
    run(1, callbacks=[ModelCheckpoint(tmp_path, filename="first")])
    resumed = run(3, tmp_path / "first.ckpt")
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_fabric():
    fabric = lightning.Fabric(accelerator="cpu", precision="bf16-mixed")
    model = mlp()
    wrapped, optimizer = fabric.setup(model, CondLRSGD(model, lr=0.05, tau=TAU))
    for x, y in fabric.setup_dataloaders(DATA):
        optimizer.zero_grad()
        fabric.backward(F.cross_entropy(wrapped(x), y))
        optimizer.step()
    assert_constraint(model, TAU)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("optimizers", [sgd, projected])
def test_accelerate(tmp_path, precision, optimizers):
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    model = mlp()
    model, optimizer, data = accelerator.prepare(model, optimizers(model), DATA)
    for x, y in data:
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(x), y))
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert_constraint(model, TAU)
    before = [p.clone() for p in model.parameters()]
    accelerator.save_state(str(tmp_path))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    accelerator.load_state(str(tmp_path))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_projector_attaches_to_the_wrapper_of_accelerate():
    model = mlp()
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    Projector(model, tau=TAU).attach(optimizer)
    F.cross_entropy(model(X), X[:, :10].argmax(1)).backward()
    optimizer.step()
    assert_constraint(model, TAU)
