"""Rows of the tables that the step's kernels read, and constexprs for their columns."""

from typing import NamedTuple

import triton.language as tl

from ....reference import HYPER, ROLES
from ..runtime.launching import columns

# hyper, the table of the step op: a row for each layer and role
HYPER_COLUMNS, ROLE_COUNT = tl.constexpr(len(HYPER)), tl.constexpr(len(ROLES))
LR, MOMENTUM, WEIGHT_DECAY, PRECONDITION = columns(HYPER, "lr momentum weight_decay precondition")
TAU, BAND, SIGMA_MAX = columns(HYPER, "tau band sigma_max")
S_ROLE, BIAS_ROLE = columns(ROLES, "S bias")


class FactorRow(NamedTuple):
    """A factor X, U or V of a layer; a row of zeros where it has no gradient.

    x, grad, buffer, trial: entries of the pointer table. hyper: row of hyper. overlap_parts, overlap, core, core_L,
    gram, L: offsets in the float64 workspace of what network_step.py calls O, C, G and their Cholesky factors; the sums
    O and G come in overlap_splits and gram_splits parts. Before G, XᵀX is at gram, in overlap_splits parts.
    """

    x: int = 0
    grad: int = 0
    buffer: int = 0
    trial: int = 0
    rows: int = 0
    rank: int = 0
    hyper: int = 0
    overlap_parts: int = 0
    overlap_splits: int = 0
    overlap: int = 0
    core: int = 0
    core_L: int = 0
    gram: int = 0
    gram_splits: int = 0
    L: int = 0


FACTOR_COLUMNS = tl.constexpr(len(FactorRow._fields))
FACTOR_X, FACTOR_GRAD, FACTOR_BUFFER, FACTOR_TRIAL = columns(FactorRow._fields, "x grad buffer trial")
FACTOR_ROWS, FACTOR_RANK, FACTOR_HYPER = columns(FactorRow._fields, "rows rank hyper")
FACTOR_OVERLAP_PARTS, FACTOR_OVERLAP_SPLITS = columns(FactorRow._fields, "overlap_parts overlap_splits")
FACTOR_OVERLAP, FACTOR_CORE, FACTOR_CORE_L = columns(FactorRow._fields, "overlap core core_L")
FACTOR_GRAM, FACTOR_GRAM_SPLITS, FACTOR_L = columns(FactorRow._fields, "gram gram_splits L")


class LayerRow(NamedTuple):
    """Core and bias of a layer; zeros for one that has no gradient.

    S, bias and their gradients and buffers: entries of the pointer table. trial: offset of the new core among the trial
    cores.
    """

    S: int = 0
    S_grad: int = 0
    S_buffer: int = 0
    rank: int = 0
    trial: int = 0
    bias: int = 0
    bias_grad: int = 0
    bias_buffer: int = 0
    bias_length: int = 0


LAYER_COLUMNS = tl.constexpr(len(LayerRow._fields))
LAYER_S, LAYER_S_GRAD, LAYER_S_BUFFER = columns(LayerRow._fields, "S S_grad S_buffer")
LAYER_RANK, LAYER_TRIAL, LAYER_BIAS_LENGTH = columns(LayerRow._fields, "rank trial bias_length")
LAYER_BIAS, LAYER_BIAS_GRAD, LAYER_BIAS_BUFFER = columns(LayerRow._fields, "bias bias_grad bias_buffer")


class CoreRow(NamedTuple):
    """A core that will be clipped.

    start: offset from the first core. layer: where in hyper and info its values are. rounds: the power of two not below
    the rank or, above LARGEST_SINGLE, the number of blocks. workspace, wide_workspace: offsets.
    """

    start: int
    rank: int
    layer: int
    rounds: int
    workspace: int
    wide_workspace: int


CORE_COLUMNS = tl.constexpr(len(CoreRow._fields))
CORE_START, CORE_RANK, CORE_LAYER, CORE_ROUNDS = columns(CoreRow._fields, "start rank layer rounds")
CORE_WORKSPACE, CORE_WIDE_WORKSPACE = columns(CoreRow._fields, "workspace wide_workspace")
