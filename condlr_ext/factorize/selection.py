"""Selection of the weights to factorize, with the reason why others cannot be."""

from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedTensorMixin
from torch.nn.utils import parametrize

from .._modules import chooser, is_peft_layer, not_plain
from ..nn import (
    LowRankAdapter,
    LowRankBilinear,
    LowRankConv1d,
    LowRankConv2d,
    LowRankConv3d,
    LowRankConvTranspose1d,
    LowRankConvTranspose2d,
    LowRankConvTranspose3d,
    LowRankEmbedding,
    LowRankLayer,
    LowRankLinear,
    LowRankMultiheadAttention,
    LowRankTransposedLinear,
)
from ..nn.attention import LowRankOutProjection, dense_projections
from ..nn.formed_parameters import matrices, views

_LOW_RANK = {
    nn.Linear: LowRankLinear,
    nn.Conv1d: LowRankConv1d,
    nn.Conv2d: LowRankConv2d,
    nn.Conv3d: LowRankConv3d,
    nn.ConvTranspose1d: LowRankConvTranspose1d,
    nn.ConvTranspose2d: LowRankConvTranspose2d,
    nn.ConvTranspose3d: LowRankConvTranspose3d,
    nn.Bilinear: LowRankBilinear,
    nn.Embedding: LowRankEmbedding,
    NonDynamicallyQuantizableLinear: LowRankOutProjection,
}
LEFT_OUT = "left out by include or exclude"
_BY_NAME = "is factorized where include or rank names it"
_LAZY = "its size is not known before its first forward"
COMPILED = "it is compiled on its own (torch.compile), which would keep what it is now: compile it afterwards"
_ATTENTION = nn.MultiheadAttention, LowRankMultiheadAttention
_KNOWN = {LowRankTransposedLinear, *_LOW_RANK.values()}
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


@dataclass(eq=False)
class Target:
    """A weight to factorize.

    Attributes:
        name: Name of the low-rank layer in the model.
        module: The dense layer; for a parameter of another module, a linear layer that holds it.
        cls: Class of the low-rank layer.
        attention: The nn.MultiheadAttention that it is a projection of, else None.
        owner: The other module that the weight is a parameter of, or a slice of one, else None.
        parameter: Its name there.
        child: Name of the low-rank layer in the owner.
        twins: Other layers with the same weight, which will share the factors.
    """

    name: str
    module: nn.Module
    cls: type[LowRankLayer]
    attention: nn.MultiheadAttention | None = None
    owner: nn.Module | None = None
    parameter: str = ""
    child: str = ""
    twins: list["Target"] = field(default_factory=list)

    @property
    def weight(self) -> Tensor:
        return self.module.weight

    @property
    def stored(self) -> Tensor:
        """The model's parameter that the weight is, or a slice of."""
        return self.owner._parameters[self.parameter] if self.owner is not None else self.weight

    @property
    def parents(self) -> list[tuple[str, nn.Module]]:
        """Names in the model and modules that stand for the layer, too."""
        if self.attention is not None:
            return [(self.name.rpartition(".")[0], self.attention)]
        if self.owner is None:
            return []
        path = self.name.removesuffix(self.child)
        return [(path.removesuffix("."), self.owner), (path + self.parameter, self.owner)]

    @property
    def by_name_only(self) -> str | None:
        """What the layer is, if it is factorized only where it is named: no vector of features passes an embedding, and
        what a stack of matrices does is its module's secret.
        """
        if isinstance(self.module, nn.Embedding):
            return "an embedding"
        return "a stack of matrices" if self.stored.dim() == 3 and self.owner is not None else None

    @property
    def shape(self) -> tuple[int, int]:
        """[m, n] of the weight as a matrix."""
        return tuple(self.cls.as_matrix(self.weight).shape)


def low_rank_class(module: nn.Module) -> type[LowRankLayer] | None:
    """Return the low-rank class for exactly this class of dense module, or None."""
    if LowRankTransposedLinear.serves(module):
        return LowRankTransposedLinear
    return _LOW_RANK.get(type(module))


def is_compiled(name: str) -> bool:
    """Return whether torch.compile wraps the module of this name; the wrapper would keep calling the old one."""
    return name.rpartition(".")[2] == "_orig_mod"


def forwards_as_its_base(layer: LowRankLayer) -> bool:
    """Return whether a layer has the forward of this package's class, be it of a subclass or parametrized."""
    known = next((cls for cls in type(layer).__mro__ if cls in _KNOWN), None)
    return known is not None and type(layer).forward is known.forward and "forward" not in vars(layer)


def select(model: nn.Module, include, exclude, names=None) -> tuple[list[Target], dict[str, str]]:
    """Return the targets in the model's order, and all other layers and matrix parameters with the reason.

    Args:
        model: The model.
        include: As in factorize.
        exclude: As in factorize.
        names: If not None, only layers with these names.

    Raises:
        ValueError: A pattern matches no module, one of `names` is no target, or a chosen layer is low-rank already.
        TypeError: include or exclude is no pattern.
    """
    candidates, skipped, low_rank = _candidates(model, include, exclude, names or ())
    if names is not None:
        unknown = sorted(set(names) - set(candidates))
        if unknown:
            detail = ", ".join(f"{name} ({skipped[name]})" if name in skipped else name for name in unknown)
            raise ValueError(f"factorize: rank names layers that are not there or not eligible: {detail}")
        skipped |= {name: "rank does not name it" for name in candidates if name not in names}
        candidates = {name: candidates[name] for name in candidates if name in names}
    elif low_rank:
        raise ValueError(
            f"factorize: these layers are low-rank already: {', '.join(low_rank)}; call to_dense first for new ranks,"
            " or leave them out, by exclude=condlr_ext.nn.LowRankLayer, say"
        )
    return _tie(model, candidates, skipped), skipped


def _candidates(model, include, exclude, names) -> tuple[dict[str, Target], dict[str, str], list[str]]:
    """Return the targets, the reasons to skip the rest, and the chosen layers that are low-rank already."""
    found = []  # (name, module, target or None, reason to skip it or None)
    attentions = {}  # id of an out_proj: name and module of its attention
    inside = {}  # id of a module in a layer of PEFT's or in a LowRankAdapter: reason to skip it
    for name, module in model.named_modules():
        if id(module) not in inside and is_peft_layer(module):
            reason = f"it is in PEFT's {type(module).__name__}: call merge_and_unload first"
            inside |= {id(part): reason for part in module.modules()}
        elif isinstance(module, LowRankAdapter):
            inside[id(module.layer)] = "it is the frozen layer of a LowRankAdapter: merge_adapters first"
            inside[id(module.delta)] = "it is the change of a LowRankAdapter"
        if id(module) in inside:
            if next(module.parameters(recurse=False), None) is not None:
                found.append((name, module, None, inside[id(module)]))
        elif isinstance(module, nn.MultiheadAttention):
            found += _attention_candidates(name, module)
            attentions[id(module.out_proj)] = name, module
        else:
            found += _candidate(name, module, attentions.get(id(module), ("", None))[1])
            found += _owned_candidates(name, module)
    parents = [parent for _, _, target, _ in found if target for parent, _ in target.parents]
    known = [name for name, _ in model.named_modules()] + [name for name, *_ in found] + parents
    chosen = chooser("factorize", include, exclude, known)
    targets, skipped, low_rank = {}, {}, []
    for name, module, target, reason in found:
        if not chosen(name, module, target.parents if target else ()):
            skipped[name] = LEFT_OUT
        elif reason:
            skipped[name] = reason
            if isinstance(module, LowRankLayer) and id(module) not in inside:
                low_rank.append(name)
        elif target.by_name_only and include is None and name not in names:
            path = target.parents[1][0] if target.owner is not None else name
            skipped[path] = f"{target.by_name_only} {_BY_NAME}"
        else:
            targets[name] = target
    there, wanted = (
        Counter((id(t.owner), t.parameter) for t in some if t and t.owner is not None)
        for some in ([target for *_, target, _ in found], targets.values())
    )
    for name, target in targets.items():
        if there[id(target.owner), target.parameter] > wanted[id(target.owner), target.parameter]:
            skipped[name] = "all matrices of its stack are factorized, or none"
    targets = {name: target for name, target in targets.items() if name not in skipped}
    listed = {id(part) for _, module, *_ in found for part in module.modules()}
    owned = {id(target.stored) for _, _, target, _ in found if target and target.owner is not None}
    return targets, skipped | _unsupported(model, listed, owned), low_rank


def _unsupported(model: nn.Module, known: set[int], owned: set[int]) -> dict[str, str]:
    """Return the matrix parameters of modules that no low-rank layer can replace, by name, with the reason."""
    reasons = {}
    for name, module in model.named_modules():
        for key, p in module._parameters.items() if id(module) not in known else ():
            if isinstance(module, nn.MultiheadAttention) and key.endswith("_proj_weight"):
                continue  # one of its projections
            if id(p) in owned:
                continue
            path = f"{name}.{key}" if name else key
            if isinstance(p, UninitializedTensorMixin):
                reasons[path] = _LAZY
            elif p is not None and p.dim() >= 2:
                whole = type(module).__module__.startswith("torch.nn.") and not isinstance(
                    module, nn.MultiheadAttention
                )
                what = type(module).__name__ if whole else f"{type(module).__name__}.{key}"
                reasons[path] = f"{what} is not supported"
    return reasons


def _candidate(name: str, module: nn.Module, attention: nn.MultiheadAttention | None):
    """Yield the candidate, or the reason to skip it; `attention` is that whose out_proj the module is, if any."""
    cls = low_rank_class(module)
    if isinstance(module, LowRankLayer):
        yield name, module, None, f"it is low-rank already, of rank {module.rank}: to_dense first"
    elif attention is not None and type(attention) not in _ATTENTION:
        yield name, module, None, _subclass_reason(attention)
    elif cls is not None:
        reason = COMPILED if is_compiled(name) else _reason_to_skip(module, module._parameters.get("weight"))
        yield name, module, Target(name, module, cls, attention), reason
    elif isinstance(module, tuple(_LOW_RANK)):
        yield name, module, None, _not_plain(module._parameters.get("weight")) or _subclass_reason(module)


def _attention_candidates(name: str, attention: nn.MultiheadAttention):
    """Yield the input projections of an attention, or the reason to skip it."""
    if type(attention) not in _ATTENTION:
        yield name, attention, None, _subclass_reason(attention)
        return
    for child, view in dense_projections(attention).items():
        path = f"{name}.{child}" if name else child
        yield path, view, Target(path, view, LowRankLinear, attention), _reason_to_skip(attention, view.weight)


def _owned_candidates(name: str, module: nn.Module):
    """Yield the matrices among the parameters of an RNN, or of stacks of matrices, or the reason to skip them."""
    for parameter in matrices(module):
        reason = _reason_to_skip(module, module._parameters[parameter])
        if reason:
            path = f"{name}.{parameter}" if name else parameter
            yield path, module, None, COMPILED if is_compiled(name) else reason
            continue
        for child, view in views(module, parameter).items():
            path = f"{name}.{child}" if name else child
            yield path, view, Target(path, view, LowRankLinear, owner=module, parameter=parameter, child=child), None


def _subclass_reason(module: nn.Module) -> str:
    if parametrize.is_parametrized(module):
        what = " and ".join(module.parametrizations)
        return f"its {what} is parametrized (torch.nn.utils.parametrize)"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return _LAZY
    return f"a {type(module).__name__} may do more than its base class"


def _reason_to_skip(module: nn.Module, weight: Tensor | None) -> str | None:
    if weight is None:
        return "its weight is not a plain parameter (pruned, or normalized by a hook)"
    if reason := _not_plain(weight):
        return reason
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    if weight.numel() == 0:
        return "its weight is empty"
    if isinstance(module, nn.Embedding) and (reason := LowRankEmbedding.unsupported(module)):
        return reason
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if any(getattr(module, hooks) for hooks in _STATE_HOOKS):
        return "it has state_dict hooks, which know its dense weight"
    return None


def _not_plain(weight: Tensor | None) -> str | None:
    reason = None if weight is None else not_plain(weight)
    return reason and f"its weight {reason}: factorize before sharding or quantizing"


def _tie(model: nn.Module, candidates: dict[str, Target], skipped: dict[str, str]) -> list[Target]:
    """Return targets with layers of one weight as twins; skip weights that are also used elsewhere."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, p in module._parameters.items():
            if p is not None:
                path = name if key == "weight" else f"{name}.{key.removesuffix('_weight')}".lstrip(".")
                owners.setdefault(id(p), []).append(path)
    sharing: dict[int, list[Target]] = {}
    for target in candidates.values():
        sharing.setdefault(id(target.weight), []).append(target)  # slices of a stack are shared by none
    targets = []
    for group in sharing.values():
        (first, *twins), key = group, id(group[0].stored)
        if len(owners[key]) == len(group) and all(t.cls.as_matrix is first.cls.as_matrix for t in twins):
            first.twins = twins
            targets.append(first)
            continue
        for target in group:
            others = [name for name in owners[key] if name != target.name]
            skipped[target.name] = f"its weight is tied to that of {', '.join(others)}"
    return targets
