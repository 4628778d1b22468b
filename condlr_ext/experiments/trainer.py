"""Trains one network by one method, epoch by epoch, such that it can stop and go on."""

import copy
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks import low_rank_pgd, pgd
from ..errors import NonFiniteError
from ..linalg import svd
from . import methods
from .augment import crop_and_flip
from .config import RunSpec, TrainConfig
from .data import Split
from .inspect_layers import core, dense_layers, low_rank_layers
from .monitor import Monitor

INFERENCE_BATCH = 1024
LOW_RANK = 0.2  # of an image's smaller side: the rank of low-rank perturbations in training


class _Diverged(ArithmeticError):
    """The loss has stopped being finite."""


class Fit:
    """Training of one model, in place.

    Args:
        model: as it starts; low-rank already, except for methods that start dense.
        spec, config: the method and the settings; of config.seeds the first one counts.
        split: the data, on the CPU.
        state: of a Fit of the same arguments, to go on from there. The model must have the weights of that moment.

    Attributes:
        epoch: how many are done. status: "training", or "diverged" once the loss was not finite.
        history: {"loss", "validation" (accuracy), "seconds"} per epoch and "step_loss" per step; losses are
            cross-entropies, without penalties.
        best: {"epoch", "validation", "ranks"} of the epoch with the highest validation accuracy, the first of equals;
            best_weights the state_dict of that moment. None without a validation part.
    """

    def __init__(self, model: nn.Module, spec: RunSpec, config: TrainConfig, split: Split, state: dict | None = None):
        self.model, self.spec, self.config, self.split = model, spec, config, split
        self.epoch, self.status = 0, "training"
        self._phases = methods.phases(spec, config.epochs)
        self.history = {"loss": [], "step_loss": [], "validation": [], "seconds": []}
        self.best = self.best_weights = None
        self.augment = split.augment if config.augment is None else config.augment
        if self.augment and len(split.shape) != 3:
            raise ValueError(f"train: augment needs images [C, H, W], the samples are {list(split.shape)}")
        self._order = torch.Generator().manual_seed(config.seeds[0])
        self._noise = torch.Generator(config.device).manual_seed(config.seeds[0])  # of attacks in training
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seeds[0])
            self._random = torch.get_rng_state()  # of dropout
        self._start()
        if state is None:
            self.monitor.record()
        else:
            self.epoch = state["epoch"]
            self.history = state["history"]
            self.best, self.best_weights = state["best"], state["best_weights"]
            self._random = state["random"]
            self._order.set_state(state["order"])
            self._noise.set_state(state["noise"])
            self.schedule.load_state_dict(state["schedule"])
            self.monitor.load(state["monitor"])

    def state(self) -> dict:
        """What a new Fit needs beside the weights and the optimizer's state to go on bit for bit."""
        return {
            "epoch": self.epoch, "history": self.history, "best": self.best, "best_weights": self.best_weights,
            "random": self._random, "order": self._order.get_state(), "noise": self._noise.get_state(),
            "schedule": self.schedule.state_dict(), "monitor": self.monitor.state(),
        }  # fmt: skip

    def _start(self) -> None:
        """Optimizer, schedule and monitor for the model as it is now."""
        self.optimizer = methods.optimizer(self.model, self.spec, self.config)
        milestones = [round(share * self.config.epochs) for share in self.config.drop_at]
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, milestones, self.config.lr_drop)
        self.monitor = Monitor(self.model)

    def run_epoch(self) -> None:
        """One epoch; before it what the method has for this time is done to the model."""
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
        # RobustDLRT: within a cycle the model has twice its rank, with singular values near 0 that mean nothing
        truncate = getattr(self.optimizer, "truncate", None)
        self.model.train()
        spent = total = 0.0
        for index in torch.randperm(len(split.y_train), generator=self._order).split(config.batch_size):
            x, y = split.x_train[index], split.y_train[index].to(device)
            if self.augment:
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
            if truncate is None:
                self.monitor.record()
        self.model.eval()  # gates are random in training
        if truncate is not None and self.status != "diverged":
            truncate()
            self.monitor.record()
        self.monitor.flush()
        if self.status == "diverged":
            return
        self.schedule.step()
        self.epoch += 1
        self.history["seconds"].append(spent)
        self.history["loss"].append(total / len(split.y_train))
        if split.x_val is not None:
            accuracy = (self.logits(split.x_val).argmax(1) == split.y_val).double().mean().item()
            self.history["validation"].append(accuracy)
            if self.best is None or accuracy > self.best["validation"]:
                self.best = {"epoch": self.epoch, "validation": accuracy, "ranks": self.ranks}
                self.best_weights = copy.deepcopy(self.model.state_dict())

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        with torch.enable_grad():
            loss = F.cross_entropy(self.model(x), y)
            total = loss + methods.penalty(self.model, self.spec, len(self.split.y_train))
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

    @property
    def ranks(self) -> dict[str, int]:
        return {name: min(core(layer).shape) for name, layer in low_rank_layers(self.model).items()}

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Of the model in eval mode, whose mode is given back; on the CPU."""
        training = self.model.training
        self.model.eval()
        try:
            return torch.cat([self.model(part.to(self.config.device)).cpu() for part in x.split(INFERENCE_BATCH)])
        finally:
            self.model.train(training)

    def record(self) -> dict:
        """What is to be reported, when training is over.

        Returns:
            dict: the histories, status ("trained", "diverged", "collapsed": one class for all training samples),
            ranks as they are now, spectra {layer: singular values}, kappa and dense_kappa (see Monitor) and their
            maximum, orthonormality, seconds_per_epoch (steps only, the monitoring excluded), best, and for condlr
            the number of layer updates the optimizer skipped.
        """
        self.model.eval()
        logits = self.logits(self.split.x_train)
        status = "trained"
        if self.status == "diverged" or not torch.isfinite(logits).all():
            status = "diverged"
        elif len(logits.argmax(1).unique()) == 1:
            status = "collapsed"
        layers = low_rank_layers(self.model)
        cores = {name: core(layer) for name, layer in (layers or dense_layers(self.model)).items()}
        seconds = self.history["seconds"]
        skipped = getattr(self.optimizer, "skipped", None)
        return {
            "status": status,
            "ranks": self.ranks,
            "loss": self.history["loss"],
            "step_loss": self.history["step_loss"],
            "validation": self.history["validation"],
            "best": self.best,
            "spectra": {name: svd(C).sigma.tolist() if torch.isfinite(C).all() else None for name, C in cores.items()},
            "kappa": self.monitor.kappa,
            "dense_kappa": self.monitor.dense_kappa,
            "max_kappa": self.monitor.max_kappa,
            "orthonormality": self.monitor.orthonormality,
            "skipped": None if skipped is None else int(skipped.sum()),
            "seconds_per_epoch": sum(seconds) / len(seconds) if seconds else None,
        }
