"""An upper bound on a network's Lipschitz constant in l2, followed operation by operation through its graph."""

import math
import operator
import warnings
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from .. import _table
from .._modules import check_module, frozen
from ..errors import NonFiniteError, ShapeError
from ..nn import LowRankLayer
from .conv_spectrum import largest_singular_value
from .layer_norms import (
    BATCH_NORM,
    CONV,
    LINEAR,
    LayerBound,
    batch_norm_scale,
    check_layer,
    conv_bound,
    is_plain,
    linear_bound,
    matrix_spectrum,
)
from .lipschitz_rules import function_constant, module_constant

_SUMS = (operator.add, operator.sub, operator.iadd, operator.isub, torch.add, torch.sub)
_PRODUCTS = (operator.mul, operator.imul, torch.mul)
_QUOTIENTS = (operator.truediv, operator.itruediv, torch.div)
_METHODS = {
    "add": torch.add, "add_": torch.add, "sub": torch.sub, "sub_": torch.sub, "mul": torch.mul, "mul_": torch.mul,
    "div": torch.div, "div_": torch.div,
}  # fmt: skip
_SHAPES = ("shape", "ndim", "dtype", "device", "is_cuda", "size", "dim", "numel", "ndimension")


@dataclass(frozen=True)
class LipschitzReport:
    """Lipschitz bound of a network; str() shows the layers as a table.

    Attributes:
        bound: |f(x) − f(x')| <= bound |x − x'| in l2 for any two inputs.
        layers: The layers with weights, in the order of their calls.
    """

    bound: float
    layers: list[LayerBound]

    def __str__(self) -> str:
        rows = [(x.name, x.kind, f"{x.sigma_max:.4g}", f"{x.kappa:.4g}", f"{x.bound:.4g}", x.how) for x in self.layers]
        table = _table.text(("layer", "kind", "sigma_max", "kappa", "bound", "how"), rows)
        return f"{table}\nthe network is {self.bound:.4g}-Lipschitz in l2"


def lipschitz(model: nn.Module, x: Tensor, *, circulant: bool = True) -> LipschitzReport:
    """Bound the Lipschitz constant of a network in eval mode: products along layers, sums where branches meet.

    The graph is that of torch.fx: x + F(x) has 1 + Lip(F), a concatenation the root of the sum of squares. Activations
    have their largest slopes (ReLU 1), max pooling the root of the number of windows that share a pixel, average
    pooling less than 1 if windows do not overlap; a BatchNorm that follows a layer is folded into it.

    Args:
        model: Any module of one tensor that torch.fx can trace; run in eval mode, its state is restored.
        x: An input [B, ...]; its first sample gives the sizes. The bound is for every input of that shape.
        circulant: Bound convolutions by their Fourier transform too, not only by sigma_max of the flattened weight
            times √(patches that share a pixel), which is √(prod(kernel_size)) at stride 1. The transform is exact for
            circular padding and tighter than patches for zeros; it costs an eigenvalue problem per frequency.

    Returns:
        The bound and the spectra and bounds of the layers.

    Raises:
        ValueError: An operation without a known bound, by name: LayerNorm, attention, products of two activations,
            control flow that depends on x, hooks, in-place changes of a tensor that is used again.
        TypeError: model is no module or x no floating-point tensor.
        ShapeError: x has no sample.
        NonFiniteError: NaN or Inf in a layer or in the output.

    Warns:
        UserWarning: A BatchNorm is in train mode; the bound is for eval mode, with its running statistics.

    Notes:
        The bound holds in real arithmetic and leaves out the network's own float32 rounding. It is loose, the more so
        the deeper the network: a large bound does not mean that a network is not robust.

    Source: Szegedy et al. (arXiv 1312.6199), section 4.3; convolutions Sedghi, Gupta, Long (arXiv 1805.10408).
    """
    check_module("lipschitz", model)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"lipschitz: x must be a floating-point tensor, got {got}")
    if x.ndim < 2 or not len(x):
        raise ShapeError(f"lipschitz: x must be [B, ...] with B >= 1, got {list(x.shape)}")
    norms = {name: module for name, module in model.named_modules() if isinstance(module, BATCH_NORM)}
    for name, module in norms.items():
        if module.running_var is None:
            raise ValueError(f"lipschitz: {name} must have running statistics, else samples depend on each other")
    training = [name for name, module in norms.items() if module.training]
    if training:
        warnings.warn(
            f"lipschitz: the bound is for eval mode, with running statistics; in train mode are {', '.join(training)}",
            stacklevel=2,
        )
    x = x[:1].detach().clone()
    _check_forward("the model", model)
    with frozen(model), torch.no_grad():
        interpreter = _BoundInterpreter(*_trace(model), circulant)
        output = interpreter.run(x.clone())
        if not isinstance(output, Tensor) or not torch.isfinite(output).all():
            raise NonFiniteError("lipschitz: the model must return one finite tensor for x")
        expected = model(x)
        if output.shape != expected.shape or not torch.allclose(output, expected, rtol=1e-3, atol=1e-5):
            raise ValueError("lipschitz: the graph that torch.fx traced does not compute what the model does")
    return LipschitzReport(interpreter.bound, list(interpreter.layers.values()))


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, LowRankLayer) or super().is_leaf_module(module, qualified_name)


def _check_forward(name: str, module: nn.Module) -> None:
    """Raise ValueError unless the module computes what its class says."""
    if module._forward_hooks or module._forward_pre_hooks:
        raise ValueError(f"lipschitz: {name} has hooks, which may change what it computes")
    if "forward" in vars(module):
        raise ValueError(f"lipschitz: {name} has a forward of its own, not that of {type(module).__name__}")


def _trace(model: nn.Module) -> tuple[nn.Module, fx.Graph]:
    tracer = _Tracer()
    if tracer.is_leaf_module(model, ""):
        model = nn.Sequential(OrderedDict(model=model))
    try:
        return model, tracer.trace(model)
    except Exception as error:  # whatever the model's own code does with a symbolic tensor
        raise ValueError(f"lipschitz: torch.fx cannot trace {type(model).__name__}: {error}") from error


class _BoundInterpreter(fx.Interpreter):
    """Runs the graph and keeps the Lipschitz bound of each value in x; 0 for constants."""

    def __init__(self, model: nn.Module, graph: fx.Graph, circulant: bool):
        super().__init__(fx.GraphModule(model, graph), garbage_collect_values=False)
        self.extra_traceback = False  # of the graph, which users do not know
        self.circulant = circulant
        self.bounds: dict[fx.Node, float] = {}
        self.versions: dict[fx.Node, int] = {}
        self.layers: dict[fx.Node, LayerBound] = {}
        self.bound = math.nan

    def run_node(self, node: fx.Node):
        for used in node.all_input_nodes:
            if self.versions.get(used) != self._version(self.env[used]):
                name = _describe(node)
                raise ValueError(f"lipschitz: {name} uses {used}, which was changed in place after it was made")
        value = super().run_node(node)
        self.bounds[node] = self._bound_of(node, value)
        self.versions[node] = self._version(value)
        if node.op == "output":
            self.bound = self.bounds[node]
        return value

    @staticmethod
    def _version(value):
        if isinstance(value, (tuple, list)):
            return [_BoundInterpreter._version(part) for part in value]
        return value._version if isinstance(value, Tensor) else None

    def _bound_of(self, node: fx.Node, value) -> float:
        if node.op == "placeholder":
            return 1.0 if isinstance(value, Tensor) else 0.0
        if node.op == "output":
            return self.bounds[node.args[0]] if isinstance(node.args[0], fx.Node) else math.nan
        varying = [used for used in node.all_input_nodes if self.bounds[used] > 0]
        if not varying:
            return 0.0
        if node.op == "call_module":
            bound = self._module_bound(node, value, varying)
        else:
            bound = self._function_bound(node, value, varying)
        if bound is None:
            raise ValueError(f"lipschitz: no bound is known for {_describe(node)}")
        return bound

    def _module_bound(self, node: fx.Node, value, varying: list[fx.Node]) -> float | None:
        module = self.fetch_attr(node.target)
        _check_forward(_describe(node), module)
        source = node.args[0] if node.args else None
        if varying != [source] or len(node.args) != 1 or node.kwargs:
            return None
        before = self.bounds[source]
        if is_plain(module, (*LINEAR, *CONV, *BATCH_NORM)):
            check_layer("lipschitz", node.target, module)
        if is_plain(module, (*LINEAR, *CONV)):
            norm = self._folded_norm(node, value)
            if norm:
                check_layer("lipschitz", norm.target, self.fetch_attr(norm.target))
            self.layers[node] = self._layer_bound(node, norm)
            return before * self.layers[node].bound
        if is_plain(module, BATCH_NORM):
            if source in self.layers and self._folded_norm(source, self.env[source]):
                return before
            low, high = (t.item() for t in batch_norm_scale(module).abs().aminmax())
            kappa = high / low if low else math.inf
            self.layers[node] = LayerBound(node.target, type(module).__name__, high, kappa, high, "matrix")
            return before * high
        constant = module_constant(module, self.env[source])
        return None if constant is None else before * constant

    def _folded_norm(self, node: fx.Node, value: Tensor) -> fx.Node | None:
        """Return the BatchNorm to fold into a layer: the only user of its output, scaling the rows of its weight."""
        user = next(iter(node.users)) if len(node.users) == 1 else None
        if user is None or user.op != "call_module" or not is_plain(self.fetch_attr(user.target), BATCH_NORM):
            return None
        # on tokens [B, T, m] a BatchNorm scales T
        return user if is_plain(self.fetch_attr(node.target), CONV) or value.ndim == 2 else None

    def _layer_bound(self, node: fx.Node, norm: fx.Node | None) -> LayerBound:
        module, value = self.fetch_attr(node.target), self.env[node.args[0]]
        scale = batch_norm_scale(self.fetch_attr(norm.target)) if norm else None
        if is_plain(module, LINEAR):
            bound, how = linear_bound(module, scale), "matrix"
        else:
            bound, how = conv_bound(module, value.shape[-len(module.kernel_size) :], scale, self.circulant)
        kind = parametrize.type_before_parametrizations(module).__name__
        return LayerBound(node.target, kind, *matrix_spectrum(module), bound, f"{how} + {norm.target}" if norm else how)

    def _function_bound(self, node: fx.Node, value, varying: list[fx.Node]) -> float | None:
        target = _METHODS.get(node.target, node.target) if node.op == "call_method" else node.target
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        if not node.args:
            return None
        if target is getattr and args[1] in _SHAPES or node.op == "call_method" and target in _SHAPES:
            return 0.0
        if target in (*_SUMS, *_PRODUCTS, *_QUOTIENTS):
            if kwargs or len(args) != 2:
                return None
            terms = [self._broadcast_bound(used, value) for used in node.args]
            if target in _SUMS:
                return sum(terms)
            constant = args[1] if isinstance(node.args[0], fx.Node) and self.bounds[node.args[0]] > 0 else args[0]
            if len(varying) > 1 or terms[0] > 0 < terms[1]:
                return None
            size = torch.as_tensor(constant, dtype=torch.float64, device="cpu").abs()
            if target in _PRODUCTS:
                return sum(terms) * size.amax().item()
            return sum(terms) / size.amin().item() if terms[0] > 0 and size.amin() > 0 else None
        if target in (torch.cat, torch.concat, torch.stack):
            if isinstance(node.args[0], fx.Node):  # all parts of one tensor
                return self.bounds[node.args[0]] if varying == [node.args[0]] else None
            return math.hypot(*(self.bounds[used] for used in node.args[0] if isinstance(used, fx.Node)))
        source = node.args[0]
        if varying != [source] or source in _nodes_in(node.args[1:]) or source in _nodes_in(node.kwargs.values()):
            return None
        before = self.bounds[source]
        if target is operator.getitem:
            items = args[1] if isinstance(args[1], tuple) else (args[1],)
            plain = all(i is None or i is ... or isinstance(i, (int, slice)) for i in items)
            return before if plain else None
        if target is F.linear:
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            matrix = isinstance(weight, Tensor) and weight.ndim == 2
            return before * largest_singular_value(weight.double()) if matrix else None
        constant = function_constant(target, args[0], args[1:], kwargs)
        return None if constant is None else before * constant

    def _broadcast_bound(self, used, value: Tensor) -> float:
        """Return the bound of an operand times the root of how often broadcasting repeats it."""
        if not isinstance(used, fx.Node) or not self.bounds[used]:
            return 0.0
        return self.bounds[used] * math.sqrt(value.numel() / self.env[used].numel())


def _nodes_in(arguments) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(tuple(arguments), found.append)
    return found


def _describe(node: fx.Node) -> str:
    """Name the operation as the user wrote it, and its module."""
    if node.op == "call_module":
        return f"module {node.target} ({type(node.graph.owning_module.get_submodule(node.target)).__name__})"
    stack = node.meta.get("nn_module_stack") or {"": None}
    owner = list(stack)[-1]
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f"{name} in {'module ' + owner if owner else 'the model'}"
