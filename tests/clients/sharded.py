"""A script for torchrun: train the same network sharded by a framework and whole, and compare.

torchrun --standalone --nproc-per-node 2 tests/clients/sharded.py accelerate
"""

import os
import sys

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers.clients import TAU, import_torchvision
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import condlr_ext
from condlr_ext.optim import CondLRAdamW, CondLRSGD, Projector, param_groups

STEPS, BATCH, CLIP = 4, 16, 0.2  # the batch of all processes; gradients are longer than the limit
X = torch.rand(STEPS * BATCH, 32, generator=torch.Generator().manual_seed(0))
Y = X[:, :10].argmax(1)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    condlr_ext.factorize(model, rank=0.25, exclude="4")
    return model


def sgd(model):
    return CondLRSGD(model, lr=0.05, momentum=0.9, tau=TAU)


def projected(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    Projector(model, tau=TAU).attach(optimizer)
    return optimizer


def whole(make) -> nn.Module:
    """Train one network on whole batches, without a framework."""
    model = mlp()
    optimizer = make(model)
    for x, y in zip(X.split(BATCH), Y.split(BATCH), strict=True):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    return model


def mine(t: torch.Tensor) -> list[torch.Tensor]:
    """Return this process's half of every batch."""
    return [batch.chunk(2)[dist.get_rank()] for batch in t.split(BATCH)]


def check(model: nn.Module, expected: nn.Module) -> None:
    """Compare a sharded network with the whole one, and both with the constraint."""
    pairs = list(zip(model.named_parameters(), expected.parameters(), strict=True))
    assert all(isinstance(p, DTensor) for (_, p), _ in pairs)
    found = {name: p.full_tensor().detach() for (name, p), _ in pairs}
    for (name, _), q in pairs:
        torch.testing.assert_close(
            found[name], q.detach(), rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )
    for name, t in found.items():
        if name.endswith(".S"):
            assert condlr_ext.linalg.cond(t) <= (1 + TAU) * (1 + 5e-6), name
        if name.endswith((".U", ".V")):
            assert (t.mT @ t - torch.eye(t.shape[1])).abs().max() <= 2e-6, name


def on_cpus() -> None:
    """Let accelerate shard on CPUs, for which it knows only data parallelism."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def accelerate(make=sgd, first: str = "") -> None:
    """Shard by accelerate's plugin, or `first` by fully_shard; save and load the state."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    on_cpus()
    options = dict(cpu_ram_efficient_loading=False, state_dict_type="SHARDED_STATE_DICT")
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=1, **options
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    model = mlp()
    if first:
        fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    model, optimizer = accelerator.prepare(model, make(model))
    for x, y in zip(mine(X), mine(Y), strict=True):
        accelerator.backward(F.cross_entropy(model(x), y))
        accelerator.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    expected = whole(make)
    check(model, expected)
    accelerator.save_state("state")
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    accelerator.load_state("state")
    check(model, expected)


def lightning() -> None:
    """Shard in configure_model, for ModelParallelStrategy."""
    import_torchvision()
    import lightning
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.utils.data import DataLoader, TensorDataset

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = mlp()

        def configure_model(self):
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch, _):
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return sgd(self)

    module = Module()
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_epochs=1, gradient_clip_val=CLIP,
        use_distributed_sampler=False, **quiet,
    )  # fmt: skip
    rank = int(os.environ["RANK"])
    data = [
        TensorDataset(x.chunk(2)[rank], y.chunk(2)[rank]) for x, y in zip(X.split(BATCH), Y.split(BATCH), strict=True)
    ]
    trainer.fit(module, DataLoader(torch.utils.data.ConcatDataset(data), batch_size=BATCH // 2))
    check(module.model, whole(sgd))


def trainer(way: str) -> None:
    """Train with Hugging Face's Trainer, sharded and then whole; compare the losses."""
    import_torchvision()
    import transformers
    from accelerate.state import AcceleratorState

    class WithOurOptimizer(transformers.Trainer):
        def create_optimizer(self, model=None):
            if self.optimizer is None:
                groups = param_groups(self.model if model is None else model, cores={"tau": TAU})
                self.optimizer = CondLRAdamW(groups, lr=self.args.learning_rate, tau=TAU)
            return self.optimizer

    sizes = dict(vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    rows = torch.randint(5, 90, (16, 12), generator=torch.Generator().manual_seed(0))
    losses = {}
    for sharded in (True, False):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model("llama", num_key_value_heads=2, **sizes)
        )
        condlr_ext.factorize(model, rank=0.25, exclude="lm_head")
        options = dict(
            output_dir="out", per_device_train_batch_size=4, max_steps=STEPS, report_to=[], use_cpu=True,
            disable_tqdm=True, save_strategy="no", logging_steps=1, learning_rate=1e-3,
        )  # fmt: skip
        if sharded:
            wrap = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
            options |= dict(fsdp=True, fsdp_config=wrap)
        AcceleratorState._reset_state(True)
        arguments = transformers.TrainingArguments(**options)
        assert arguments.device.type == "cpu"
        if sharded:
            on_cpus()
        data = [{"input_ids": row, "labels": row} for row in rows]
        if way == "class":
            chosen = CondLRAdamW, {"lr": 1e-3, "tau": TAU}
            made = transformers.Trainer(model, arguments, train_dataset=data, optimizer_cls_and_kwargs=chosen)
        else:
            made = WithOurOptimizer(model, arguments, train_dataset=data)
        made.train()
        layer = next(iter(condlr_ext.nn.low_rank_layers(made.model).values()))
        assert isinstance(layer.U, DTensor) == sharded
        losses[sharded] = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert len(losses[True]) == STEPS
    torch.testing.assert_close(torch.tensor(losses[True]), torch.tensor(losses[False]), rtol=1e-4, atol=0)


CASES = {
    "accelerate": accelerate,
    "accelerate-projector": lambda: accelerate(projected),
    "accelerate-sharded-before": lambda: accelerate(first="fully_shard"),
    "lightning": lightning,
    "trainer-class": lambda: trainer("class"),
    "trainer-create_optimizer": lambda: trainer("create_optimizer"),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    CASES[sys.argv[1]]()
    dist.destroy_process_group()
