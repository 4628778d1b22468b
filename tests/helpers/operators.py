"""Explicit matrices and Jacobians of functions, in float64, that certificates are compared with."""

import math

import torch
from torch import nn

F64 = torch.float64
EXACT = 1 + 1e-9  # float64 singular values of small matrices


def matrix(function, shape):
    """The linear part of function on inputs of this shape, as a matrix."""
    eye = torch.eye(math.prod(shape), dtype=F64).view(-1, *shape)
    return (function(eye) - function(torch.zeros_like(eye))).flatten(1).detach().mT


def norm(function, shape):
    return torch.linalg.matrix_norm(matrix(function, shape), 2).item()


def jacobian_norm(model, x):
    J = torch.autograd.functional.jacobian(lambda z: model(z[None])[0], x)
    return torch.linalg.matrix_norm(J.reshape(-1, x.numel()), 2).item()


class Function(nn.Module):
    def __init__(self, function, **constants):
        super().__init__()
        self.function, self.linear = function, nn.Linear(6, 6).double()
        for name, value in constants.items():
            self.register_buffer(name, value)

    def forward(self, x):
        return self.function(self, x)
