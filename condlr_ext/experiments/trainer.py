"""Training of one network by one method, epoch by epoch, so that it can stop and go on bit for bit."""

import copy
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks import low_rank_pgd, pgd
from ..errors import NonFiniteError
from ..io import checkpoint
from .config import TrainConfig
from .data import Split, crop_and_flip
from .inspect_layers import sizes
from .monitor import Monitor
from .networks import place

INFERENCE_BATCH = 1024
LOW_RANK = 0.2  # of an image's smaller side: the rank of low-rank perturbations in training


class _Diverged(ArithmeticError):
    """The loss has stopped being finite."""


class Trainer:
    """Training of one model.

    Args:
        config: The settings, of one run and seed; of more the first ones count.
        split: The data, on the CPU.
        initial: The dense network as built; it is left alone.
        state: Checkpoint to continue from, written by `save` for the same arguments and read by io.checkpoint.read.

    Attributes:
        model: The network in training.
        epoch: Number of finished epochs.
        status: "training", or "diverged" once the loss was not finite.
        history: {"loss", "validation" (accuracy), "seconds"} per epoch and "step_loss" per step; losses are
            cross-entropies, without penalties.
        best: {"epoch", "validation", "ranks"} of the epoch with the highest validation accuracy, the first of equals;
            None without a validation part.
    """

    def __init__(
        self, config: TrainConfig, split: Split, initial: nn.Module, state: checkpoint.Checkpoint | None = None
    ):
        self.config, self.split = config, split
        self.method, seed = config.runs[0], config.seeds[0]
        self.epoch, self.status = 0, "training"
        self.history = {"loss": [], "step_loss": [], "validation": [], "seconds": []}
        self.best = self._best_weights = None
        self._augment = split.augment if config.augment is None else config.augment
        if self._augment and len(split.shape) != 3:
            raise ValueError(f"train: augment needs images [C, H, W], the samples are {list(split.shape)}")
        self._initial, self._phases = initial, self.method.phases(config.epochs)
        self._order = torch.Generator("cpu").manual_seed(seed)
        self._noise = torch.Generator(config.device).manual_seed(seed)  # of attacks in training
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self._random = torch.get_rng_state()  # of dropout
        if state is None:
            self.model = copy.deepcopy(initial)
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                self.method.prepare(self.model, split.x_train)
            place(self.model, config.device)
            self._start()
            self.monitor.record()
        else:
            self._resume(state)

    def _start(self) -> None:
        """Make optimizer, schedule and monitor for the model as it is now."""
        self.optimizer = self.method.optimizer_for(self.model, self.config)
        milestones = [round(share * self.config.epochs) for share in self.config.drop_at]
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, milestones, self.config.lr_drop)
        self.monitor = Monitor(self.model)

    def _rebuilt(self, epoch: int, ranks: dict[str, int]) -> nn.Module:
        """Return a network with the layers of that epoch and arbitrary values."""
        model = copy.deepcopy(self._initial)
        with torch.random.fork_rng(devices=[]):
            self.method.rebuild(model, ranks, epoch, self.config.epochs)
        return place(model, self.config.device)

    # ------------------------------------------------------------------------------------------- interruption

    def save(self, path: Path, settings: dict) -> None:
        """Write what a new Trainer needs to go on bit for bit, and the settings it must have."""
        fit = {
            "epoch": self.epoch, "history": self.history, "best": self.best, "best_weights": self._best_weights,
            "random": self._random, "order": self._order.get_state(), "noise": self._noise.get_state(),
            "schedule": self.schedule.state_dict(), "monitor": self.monitor.state(),
        }  # fmt: skip
        extra = {"settings": settings, "ranks": self.monitor.ranks, "fit": fit}
        checkpoint.save(self.model, path, self.optimizer, extra=extra)

    def _resume(self, state: checkpoint.Checkpoint) -> None:
        fit = state.extra["fit"]
        self.model = self._rebuilt(fit["epoch"], state.extra["ranks"])
        checkpoint.restore(self.model, state)
        self._start()
        self.epoch, self.history = fit["epoch"], fit["history"]
        self.best, self._best_weights = fit["best"], fit["best_weights"]
        self._random = fit["random"]
        self._order.set_state(fit["order"])
        self._noise.set_state(fit["noise"])
        self.schedule.load_state_dict(fit["schedule"])
        self.monitor.load(fit["monitor"])
        checkpoint.restore(self.model, state, self.optimizer)  # after what an optimizer does to a model at its start

    # ---------------------------------------------------------------------------------------------- training

    def run(self) -> Iterator[dict]:
        """Train to the end; yield a line for the log after every epoch: the last value of each history."""
        while self.epoch < self.config.epochs:
            self.run_epoch()
            if self.status == "diverged":
                return
            line = {"epoch": self.epoch, "lr": float(self.optimizer.param_groups[0]["lr"])}
            line |= {name: values[-1] for name, values in self.history.items() if values and name != "step_loss"}
            yield line | {"max_kappa": self.monitor.last_kappa}

    def run_epoch(self) -> None:
        """Train one epoch; before it change the model where a phase of the method begins."""
        if self.epoch in self._phases:
            self._change(self._phases[self.epoch])
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._random)
            self._pass()
            self._random = torch.get_rng_state()

    def _change(self, change) -> None:
        before = self.monitor
        rates = [group["lr"] for group in self.optimizer.param_groups]
        schedule = self.schedule.state_dict()
        with torch.random.fork_rng(devices=[]):
            change(self.model)
        self._start()
        self.schedule.load_state_dict(schedule)
        for group, lr in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = lr
        self.monitor.load(before.state())
        self.monitor.record()

    def _pass(self) -> None:
        config, split, device = self.config, self.split, self.config.device
        each_step = self.method.whole_each_step
        self.model.train()
        spent = total = 0.0
        order = torch.randperm(len(split.y_train), device="cpu", generator=self._order)
        for index in order.split(config.batch_size):
            x, y = split.x_train[index], split.y_train[index].to(device)
            if self._augment:
                x = crop_and_flip(x, self._order)
            x = x.to(device)
            began = time.perf_counter()
            try:
                if config.adversarial:
                    x = self._attacked(x, y)
                value = float(self.optimizer.step(lambda x=x, y=y: self._loss(x, y)))
            except _Diverged:
                self.status = "diverged"
                break
            spent += time.perf_counter() - began
            self.history["step_loss"].append(value)
            total += value * len(index)
            if each_step:
                self.monitor.record()
        self.model.eval()  # gates are random in training
        if not each_step and self.status != "diverged":
            self.method.settle(self.optimizer)
            self.monitor.record()
        self.monitor.flush()
        if self.status == "diverged":
            return
        self.schedule.step()
        self.epoch += 1
        self.history["seconds"].append(spent)
        self.history["loss"].append(total / len(split.y_train))
        if split.x_val is not None:
            accuracy = (self._logits(split.x_val).argmax(1) == split.y_val).double().mean().item()
            self.history["validation"].append(accuracy)
            if self.best is None or accuracy > self.best["validation"]:
                self.best = {"epoch": self.epoch, "validation": accuracy, "ranks": self.monitor.ranks}
                self._best_weights = copy.deepcopy(self.model.state_dict())

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        with torch.enable_grad():
            loss = F.cross_entropy(self.model(x), y)
            total = loss + self.method.penalty(self.model, len(self.split.y_train))
        if not torch.isfinite(total):
            raise _Diverged
        total.backward()
        return loss.detach()

    def _attacked(self, x: Tensor, y: Tensor) -> Tensor:
        attack = pgd
        if self.config.adversarial != "pgd":
            attack = partial(low_rank_pgd, rank=max(1, round(LOW_RANK * min(x.shape[-2:]))))
        eps, steps = self.config.adversarial_eps, self.config.adversarial_steps
        try:
            return attack(self.model, x, y, eps, steps=steps, generator=self._noise)
        except NonFiniteError:  # the images are finite: it is the weights
            raise _Diverged from None

    @torch.no_grad()
    def _logits(self, x: Tensor) -> Tensor:
        """Return the logits of the model in eval mode, on the CPU."""
        self.model.eval()
        return torch.cat([self.model(part.to(self.config.device)).cpu() for part in x.split(INFERENCE_BATCH)])

    # ----------------------------------------------------------------------------------------------- results

    def finish(self) -> dict:
        """End the training, remove what is for training only from the model, and return the numbers of the run.

        Returns:
            dict: The histories, status ("trained", "diverged", "collapsed": one class for all training samples), what
            Monitor.summary returns, best, seconds_per_epoch (steps only, the monitoring excluded), the number of layer
            updates the optimizer skipped (None if it skips none), parameters that are not pruned away, of this network
            and of the dense one, and the share of the hidden weights that is kept.
        """
        logits = self._logits(self.split.x_train)
        status = "trained"
        if self.status == "diverged" or not torch.isfinite(logits).all():
            status = "diverged"
        elif len(logits.argmax(1).unique()) == 1:
            status = "collapsed"
        seconds = self.history["seconds"]
        record = {
            "status": status,
            "loss": self.history["loss"],
            "step_loss": self.history["step_loss"],
            "validation": self.history["validation"],
            "best": self.best,
            **self.monitor.summary(),
            "skipped": self.method.skipped(self.optimizer),
            "seconds_per_epoch": sum(seconds) / len(seconds) if seconds else None,
        }
        pruned = self.method.finish(self.model)
        return record | sizes(self.model, self._initial, record["ranks"], pruned)

    def best_model(self) -> nn.Module:
        """Return the finished network of the best epoch."""
        model = self._rebuilt(self.best["epoch"], self.best["ranks"])
        model.load_state_dict(self._best_weights)
        self.method.finish(model)
        return model
