"""Tensor parallel styles of LowRankLinear for torch's parallelize_module, and clipping for what comes out.

Over the ranks of a mesh dimension, S is replicated and

| style | X | V | U | Y | all-reduced forward | backward |
|---|---|---|---|---|---|---|
| LowRankColwiseParallel | Replicate | Replicate | Shard(0) | Shard(-1) | | dY U [*, r] |
| LowRankRowwiseParallel | Shard(-1) | Shard(0) | Replicate | Replicate | X V [*, r] | |
| LowRankBottleneckParallel | Shard(-1) | Shard(0) | Shard(0) | Shard(-1) | X V [*, r] | dY U [*, r] |

A dense layer all-reduces [*, n] or [*, m] instead. Gradients have the placements of their parameters, and those of
replicated ones are equal on all ranks without further communication.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from . import functional
from ._modules import not_plain
from .errors import ShapeError
from .nn import LowRankLinear

__all__ = ["LowRankBottleneckParallel", "LowRankColwiseParallel", "LowRankRowwiseParallel", "clip_grad_norm_"]


class _LowRankParallel(ParallelStyle):
    """A style that shards U and V where the output and the input are sharded."""

    _input: Placement
    _output: Placement

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ):
        self.input_layouts = (input_layouts or self._input,)
        self.output_layouts = (output_layouts or self._output,)
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self._check(module)
        distribute_module(module, device_mesh, self._partition, self._local_input, self._laid_out)
        module.__class__ = ParallelLowRankLinear
        return module

    def _check(self, module: nn.Module) -> None:
        name = type(self).__name__
        if type(module) is not LowRankLinear:  # another forward would not be that of ParallelLowRankLinear
            raise TypeError(f"{name}: the module must be a LowRankLinear, got {type(module).__name__}")
        if module.route == "merged":
            raise ValueError(f'{name}: the layer\'s route must be "auto" or "factorized", got "merged", which forms W')
        for role in "USV":
            factor = module._parameters.get(role)
            reason = "must be a parameter, got one that is computed" if factor is None else not_plain(factor)
            if reason:
                raise ValueError(f"{name}: the layer's {role} {reason}")

    def _partition(self, _, layer: LowRankLinear, mesh: DeviceMesh) -> None:
        rows_of_U, rows_of_V = (
            Shard(0) if placement.is_shard() else Replicate() for placement in (self._output, self._input)
        )
        for name, placement in (("U", rows_of_U), ("S", Replicate()), ("V", rows_of_V), ("bias", rows_of_U)):
            p = layer._parameters[name]
            if p is not None:
                placed = distribute_tensor(p, mesh, [placement], src_data_rank=self.src_data_rank)
                layer.register_parameter(name, nn.Parameter(placed, requires_grad=p.requires_grad))

    def _local_input(self, _, inputs: tuple, mesh: DeviceMesh) -> Tensor:
        """Return the local part of an input in the layout that the products take."""
        input = inputs[0]
        if not isinstance(input, DTensor):
            if self.input_layouts == (self._input,):
                return input
            input = DTensor.from_local(input, mesh, self.input_layouts, run_check=False)
        return input.redistribute(mesh, (self._input,)).to_local()

    def _laid_out(self, layer: LowRankLinear, output: Tensor, mesh: DeviceMesh) -> Tensor:
        """Return the output in the layout that was asked for."""
        if self.use_local_output and self.output_layouts == (self._output,):
            return output
        shape = *output.shape[:-1], layer.out_features
        stride = torch.empty(shape, dtype=output.dtype, device="meta").stride()
        whole = DTensor.from_local(output, mesh, (self._output,), run_check=False, shape=shape, stride=stride)
        whole = whole.redistribute(mesh, self.output_layouts)
        return whole.to_local() if self.use_local_output else whole

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(input_layouts={self.input_layouts}, output_layouts={self.output_layouts},"
            f" use_local_output={self.use_local_output})"
        )


class LowRankColwiseParallel(_LowRankParallel):
    """Shard U and the bias by rows: outputs are sharded by features, as with torch's ColwiseParallel.

    The arguments are those of torch's style.

    Args:
        input_layouts: Placement of inputs that are no DTensors; by default they are whole.
        output_layouts: Placement of the output; by default Shard(-1).
        use_local_output: Whether the output is a local tensor instead of a DTensor.

    Raises:
        TypeError: The module is no LowRankLinear, or one that is parallel already.
        ValueError: Its route is "merged", or U, S or V is sharded or quantized.

    Examples:
        >>> from condlr_ext.parallel import LowRankColwiseParallel, LowRankRowwiseParallel
        >>> plan = {"up": LowRankColwiseParallel(), "down": LowRankRowwiseParallel()}
    """

    _input, _output = Replicate(), Shard(-1)


class LowRankRowwiseParallel(_LowRankParallel):
    """Shard V by rows, the bias not: inputs are sharded by features, as with torch's RowwiseParallel.

    The arguments are those of torch's style; see LowRankColwiseParallel.

    Args:
        input_layouts: Placement of inputs that are no DTensors; by default Shard(-1).
        output_layouts: Placement of the output; by default it is whole.
        use_local_output: Whether the output is a local tensor instead of a DTensor.
    """

    _input, _output = Shard(-1), Replicate()


class LowRankBottleneckParallel(_LowRankParallel):
    """Shard U, V and the bias by rows: inputs and outputs are sharded by features, and only [*, r] is whole.

    See LowRankColwiseParallel.

    Args:
        input_layouts: Placement of inputs that are no DTensors; by default Shard(-1).
        output_layouts: Placement of the output; by default Shard(-1).
        use_local_output: Whether the output is a local tensor instead of a DTensor.

    Source:
        The bottleneck-aware tensor parallelism of BOOST, arXiv 2512.12131, has the same aim.
    """

    _input, _output = Shard(-1), Shard(-1)


def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients so that their norm, all together, is at most max_norm, and return what it was.

    It is torch.nn.utils.clip_grad_norm_, which raises where some parameters are sharded and others not, or not over the
    same mesh, as with tensor parallel layers among others.

    Args:
        parameters: With their gradients; all processes pass the same.
        max_norm: The largest norm.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    by_mesh: dict[DeviceMesh | None, list[Tensor]] = {}
    for grad in grads:
        by_mesh.setdefault(grad.device_mesh if isinstance(grad, DTensor) else None, []).append(grad)
    norms = [nn.utils.get_total_norm(some) for some in by_mesh.values()]
    total = nn.utils.get_total_norm([n.full_tensor() if isinstance(n, DTensor) else n for n in norms])
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for grad in grads:
        (grad.to_local() if isinstance(grad, DTensor) else grad).mul_(scale)
    return total


class ParallelLowRankLinear(LowRankLinear):
    """A LowRankLinear with factors sharded by rows over one mesh dimension: local inputs to local outputs.

    Its products are torch's own. Those of replicated factors need the same bits on all ranks, which kernels that are
    chosen by the size of a shard, or by timing, do not promise.
    """

    def __init__(self, *args, **kwargs):
        raise TypeError("ParallelLowRankLinear: build a LowRankLinear and call parallelize_module")

    def forward(self, input: Tensor) -> Tensor:
        name = type(self).__name__
        if self._route == "merged":
            raise ValueError(f'{name}: route must be "auto" or "factorized" where factors are sharded, got "merged"')
        of_V, of_U = (X.device_mesh.get_group() if X.placements[0].is_shard() else None for X in (self.V, self.U))
        parameters = {role: p.to_local() for role, p in self.named_parameters(recurse=False)}
        rows = parameters["V"].shape[0]
        if input.dim() == 0 or input.shape[-1] != rows:
            raise ShapeError(f"{name}: input must be [*, {rows}] to fit this rank's rows of V, got {list(input.shape)}")
        tensors = functional.cast_alike(name, {"input": input, **parameters})
        P = tensors["input"] @ tensors["V"]
        if of_V is not None:
            P = _Sum.apply(P, of_V)
        P = F.linear(P, tensors["S"])
        if of_U is not None:
            P = _Copy.apply(P, of_U)
        return F.linear(P, tensors["U"], tensors.get("bias"))

    def apply_rows(self, input: Tensor, rows: slice, bias: Tensor | None) -> Tensor:
        raise NotImplementedError(
            "ParallelLowRankLinear: the projections of nn.MultiheadAttention cannot be tensor parallel; use an"
            " attention with linear layers of its own"
        )


class _Sum(torch.autograd.Function):
    """The sum of the ranks' parts, whole on every rank, and so is its gradient."""

    @staticmethod
    def forward(ctx, part: Tensor, group) -> Tensor:
        ctx.group = group
        return collectives.wait_tensor(collectives.all_reduce(part.contiguous(), "sum", group))

    @staticmethod
    def backward(ctx, grad):
        return _Copy.apply(grad, ctx.group), None


class _Copy(torch.autograd.Function):
    """A tensor that is whole on every rank and used for a part there, so that its gradient is a sum over the ranks."""

    @staticmethod
    def forward(ctx, whole: Tensor, group) -> Tensor:
        ctx.group = group
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx, grad):
        return _Sum.apply(grad, ctx.group), None
