"""FormedWeight: a computed weight that refuses to be written to, since the write would be lost."""

import copy
import warnings

import torch
from torch import Tensor, nn

_HARMLESS = {"detach_", "requires_grad_", "share_memory_"}
_VIEWS = (
    "__getitem__ adjoint as_strided broadcast_to chunk conj diagonal dsplit expand expand_as flatten hsplit moveaxis"
    " movedim narrow permute ravel reshape reshape_as select split split_with_sizes squeeze swapaxes swapdims t"
    " tensor_split transpose unbind unflatten unfold unsqueeze view view_as vsplit"
).split()


class _LikeAnyTensor(type(Tensor)):
    def __instancecheck__(cls, instance) -> bool:  # torch.testing compares only types of which one is the other
        return isinstance(instance, Tensor)


class FormedWeight(Tensor, metaclass=_LikeAnyTensor):
    """A weight that is formed from factors at each access. Methods that write into it or a view of it raise.

    After a function that wrote, torch.relu_(weight), a warning comes when it is freed, except in inference mode. In all
    else it is a plain tensor: results of functions are plain, and torch's fast paths take it. As data of an
    nn.Parameter it becomes plain, too, for then it is stored. NumPy gets it read-only.
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

    H = property(lambda self: self.t())  # the weights are real
    mH = mT
    real = property(lambda self: self.view_as(self))

    def detach(self) -> Tensor:
        return Tensor.detach(self).as_subclass(type(self))

    def numpy(self, **options):
        array = Tensor.numpy(self, **options)
        array.flags.writeable = False
        return array

    @property
    def _is_param(self) -> bool:
        return False

    @_is_param.setter
    def _is_param(self, value: bool) -> None:  # nn.Parameter(weight) sets this on the tensor that it returns
        self.__class__ = nn.Parameter

    def __del__(self):
        if type(self) is FormedWeight and not self.is_inference() and self._version:
            warnings.warn(_lost("what a function wrote into it"), stacklevel=2)

    def __deepcopy__(self, memo) -> Tensor:
        return copy.deepcopy(self.as_subclass(Tensor), memo)

    def __reduce_ex__(self, protocol):
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


class WatchedWeight(FormedWeight):
    """A FormedWeight that also sees functions which write: out=, torch.relu_, F.relu(inplace=True), nn.init.eye_.

    It costs each function that gets it a few microseconds, and torch's fused transformer kernels refuse it. Writes
    into its storage (untyped_storage, DLPack) or within vmap are not seen.
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if func.__name__ == "__get__" or torch.compiler.is_compiling():  # shape, dtype, ...
                return func(*args, **(kwargs or {}))
            weights = [x for x in _flat(args, kwargs) if type(x) is cls and not x.is_inference()]
            versions = [x._version for x in weights]
            result = func(*args, **(kwargs or {}))
            if versions != [x._version for x in weights]:
                raise _refusal(func.__name__)
            return _watched(result, weights) if weights else result


def formed(W: Tensor, training: bool) -> Tensor:
    """Return the weight of a layer so that writes into it raise; unchanged in traces and transforms.

    In training, and where gradients are recorded, also functions that write; torch's fused kernels run in neither.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(W) is not Tensor:
        return W
    if torch._C._are_functorch_transforms_active():
        return W
    return W.as_subclass(WatchedWeight if training or W.requires_grad else FormedWeight)


def _flat(args, kwargs=None) -> list:
    """Return what is in the arguments of a function and in lists among them."""
    found = []
    for x in (*args, *kwargs.values()) if kwargs else args:
        if type(x) in (list, tuple):
            found += _flat(x)
        else:
            found.append(x)
    return found


def _watched(result, weights: list[Tensor]):
    """Return the result of a function with the views of weights in it watched, too."""
    if type(result) in (list, tuple):
        return type(result)(_watched(x, weights) for x in result)
    if type(result) is Tensor and result._is_view() and any(result._base is W._base for W in weights):
        return result.as_subclass(WatchedWeight)
    return result


def _lost(write: str, verb: str = "is") -> str:
    return (
        f"the weight of a low-rank layer is formed from its factors at each access: {write} {verb} lost; change the"
        " factors, or make the layer dense first (condlr_ext.to_dense)"
    )


def _refusal(write: str) -> AttributeError:
    return AttributeError(_lost(write, "would be"))


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
    if torch.compiler.is_compiling() or type(x) is not Tensor or not x._is_view():  # reshape and indices may copy
        return x
    return x.as_subclass(FormedWeight)


for _name in dir(Tensor):
    in_place = _name.endswith("_") and not _name.startswith("_") and _name not in _HARMLESS
    operator = _name.startswith("__i") and hasattr(Tensor, f"__{_name[3:]}")
    if in_place or operator or _name == "__setitem__":
        setattr(FormedWeight, _name, _refuse(_name))
for _name in _VIEWS:
    setattr(FormedWeight, _name, _view(_name))
