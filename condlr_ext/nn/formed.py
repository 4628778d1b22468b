"""FormedWeight: a computed weight that refuses to be written to, since the write would be lost."""

import copy

import torch
from torch import Tensor, nn

_HARMLESS = {"detach_", "requires_grad_", "share_memory_"}
_VIEWS = (
    "__getitem__ chunk diagonal flatten narrow permute reshape select split squeeze swapaxes t transpose unbind"
    " unflatten unsqueeze view view_as"
).split()


class _LikeAnyTensor(type(Tensor)):
    def __instancecheck__(cls, instance) -> bool:  # torch.testing compares only types of which one is the other
        return isinstance(instance, Tensor)


class FormedWeight(Tensor, metaclass=_LikeAnyTensor):
    """A weight that is formed from factors at each access. Methods that write into it or a view of it raise.

    In all else it is a plain tensor: results of functions are plain, and torch's fast paths take it. As data of an
    nn.Parameter it becomes plain, too, for then it is stored. Functions that get it as `out` (so nn.init.eye_) or end
    in an underscore (torch.clamp_) are not seen.
    """

    # unlike a __torch_function__ of its own, this costs nothing and keeps torch's fused transformer kernels
    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value) -> None:
        raise _refusal("an assignment to its data")

    @property
    def T(self) -> Tensor:
        return self.permute(*reversed(range(self.dim())))

    @property
    def mT(self) -> Tensor:
        return self.transpose(-2, -1)

    def detach(self) -> Tensor:
        return Tensor.detach(self).as_subclass(FormedWeight)

    @property
    def _is_param(self) -> bool:
        return False

    @_is_param.setter
    def _is_param(self, value: bool) -> None:  # nn.Parameter(weight) sets this on the tensor that it returns
        self.__class__ = nn.Parameter

    def __deepcopy__(self, memo) -> Tensor:
        return copy.deepcopy(self.as_subclass(Tensor), memo)

    def __reduce_ex__(self, protocol):
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


def formed(W: Tensor) -> Tensor:
    """Return the weight as a FormedWeight; unchanged where nothing can be written into it: in traces and transforms."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(W) is not Tensor:
        return W
    return W if torch._C._are_functorch_transforms_active() else W.as_subclass(FormedWeight)


def _refusal(write: str) -> AttributeError:
    return AttributeError(
        f"the weight of a low-rank layer is formed from its factors at each access: {write} would be lost; change the"
        " factors, or make the layer dense first (condlr_ext.to_dense)"
    )


def _refuse(name: str):
    def method(self, *args, **kwargs):
        raise _refusal(name)

    return method


def _view(name: str):
    def method(self, *args, **kwargs):
        result = getattr(Tensor, name)(self, *args, **kwargs)
        return tuple(map(_protected, result)) if isinstance(result, tuple) else _protected(result)

    return method


def _protected(x: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or not x._is_view():  # reshape and indices may copy
        return x
    return x.as_subclass(FormedWeight)


for _name in dir(Tensor):
    in_place = _name.endswith("_") and not _name.startswith("_") and _name not in _HARMLESS
    operator = _name.startswith("__i") and hasattr(Tensor, f"__{_name[3:]}")
    if in_place or operator or _name == "__setitem__":
        setattr(FormedWeight, _name, _refuse(_name))
for _name in _VIEWS:
    setattr(FormedWeight, _name, _view(_name))
