"""scikit-learn's and Optuna's searches, by skorch."""

import numpy as np
import optuna
import skorch
import torch
from helpers.clients import TAU
from helpers.training import assert_constraint
from sklearn.model_selection import GridSearchCV
from torch import nn

import condlr_ext

X = np.random.default_rng(0).random((96, 32), dtype=np.float32)
Y = X[:, :4].argmax(1)


class LowRank(nn.Sequential):
    def __init__(self, rank=8):
        super().__init__(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))
        condlr_ext.factorize(self, rank=rank, exclude="2")


def classifier(**options):
    torch.manual_seed(0)
    fixed = dict(optimizer=condlr_ext.optim.CondLRAdamW, optimizer__tau=TAU, verbose=0, max_epochs=3, train_split=None)
    return skorch.NeuralNetClassifier(LowRank, criterion=nn.CrossEntropyLoss, lr=1e-2, **(fixed | options))


def test_skorch_and_grid_search():
    search = GridSearchCV(classifier(), {"module__rank": [2, 8], "lr": [1e-2]}, cv=2, refit=True)
    search.fit(X, Y)
    assert_constraint(search.best_estimator_.module_, TAU)


def test_optuna():
    def objective(trial):
        tau = trial.suggest_float("tau", 0.0, 1.0)
        net = classifier(module__rank=trial.suggest_int("rank", 2, 8), optimizer__tau=tau)
        net.fit(X, Y)
        assert_constraint(net.module_, tau)
        return net.score(X, Y)

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(objective, n_trials=3)
    assert 0 <= study.best_value <= 1
