"""Registration of the ops, and the choice of the implementation that serves a call."""

import contextlib
import importlib
import os
import threading
from collections.abc import Callable, Iterable

import torch

from .. import _load
from ..errors import BackendError
from ..kernels.triton import devices

BACKENDS = ("auto", "reference", "cpu", "triton")
COMPILED = _load.load()
LIB = torch.library.Library("condlr_ext", "FRAGMENT")
OPS: dict[str, "Op"] = {}
NO_CHOICE = "only one serves it"


class _Choice(threading.local):
    """Backend that a thread has chosen, and those it goes back to. Compiled code guards on `name`."""

    def __init__(self):
        self.name = os.environ.get("CONDLR_EXT_BACKEND", "auto")
        self.previous = []


_choice = _Choice()


def current_backend() -> str:
    """Return the name of the backend that this thread has chosen.

    Raises:
        ValueError: CONDLR_EXT_BACKEND names no backend.
    """
    name = _choice.name
    if name not in BACKENDS:
        raise ValueError(f"CONDLR_EXT_BACKEND must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def check_environment() -> None:
    """Raise ValueError if CONDLR_EXT_BACKEND or CONDLR_EXT_ISA names nothing, before something else is blamed."""
    current_backend()
    if COMPILED.host:
        COMPILED.host.isa()


class backend:
    """Context manager that chooses the implementation of every op inside its block.

    A named backend is strict: a call that it cannot serve raises BackendError with the reason. The choice is that
    of one thread; forward remembers it for its backward, which runs in another.

    Args:
        name: "auto" (the fastest that can serve each call), "reference" (plain PyTorch), "cpu" (compiled kernels
            and torch's CPU products) or "triton".

    Raises:
        ValueError: The name is unknown.
    """

    def __init__(self, name: str):
        if name not in BACKENDS:
            raise ValueError(f"condlr_ext.backend: name must be one of {', '.join(BACKENDS)}, got {name!r}")
        self._name = name

    def __enter__(self) -> "backend":
        _choice.previous.append(_choice.name)
        _choice.name = self._name
        return self

    def __exit__(self, *exc: object) -> None:
        _choice.name = _choice.previous.pop()


class Op:
    """An op and its implementations.

    Registers `condlr_ext::name`, for which torch's dispatcher chooses, `condlr_ext::_reference_name` and, if there is a
    Triton kernel, `condlr_ext::_triton_name`.

    Args:
        schema: Schema string without namespace.
        reference: Plain PyTorch implementation, registered for every device.
        fake: Shape and dtype propagation.
        cpu_unsupported: Returns the reasons why the CPU implementation cannot serve the arguments.
        cpu_is: Description of that implementation.
        triton: "module.function" in kernels.triton that launches the kernels, imported when first called.
        triton_unsupported: Returns the reasons why the kernels cannot serve the arguments, beyond those that hold for
            all kernels.
        prefer_reference: Returns the reason why "auto" takes the reference although the implementation for the
            device can serve the arguments; empty if it does not.
        rests_on: Returns what the choice for a kind of device, "cpu" or "cuda", rests on.
        vmap: Makes the torch.func.vmap rule (info, in_dims, *args) -> (outputs, out_dims) of an overload.
    """

    def __init__(
        self,
        schema: str,
        *,
        reference: Callable,
        fake: Callable,
        cpu_unsupported: Callable[..., list[str]],
        cpu_is: str = "compiled kernel",
        triton: str | None = None,
        triton_unsupported: Callable[..., list[str]] = lambda *args: [],
        prefer_reference: Callable[..., str] = lambda *args: "",
        rests_on: Callable[[str], str] = lambda device: NO_CHOICE,
        vmap: Callable | None = None,
    ):
        self.name = schema.split("(")[0]
        self._cpu_unsupported, self.cpu_is, self._prefer_reference = cpu_unsupported, cpu_is, prefer_reference
        self.rests_on = rests_on
        self.has_triton, self._triton_unsupported = triton is not None, triton_unsupported
        self._implementations = {"reference": _as_op(reference)}
        if triton is not None:
            self._implementations["triton"] = _as_op(_on_first_call(triton))
        self._overloads = {}
        for backend_name in ("dispatched", *self._implementations):
            name = self.name if backend_name == "dispatched" else f"_{backend_name}_{self.name}"
            LIB.define(schema.replace(self.name, name, 1), tags=(torch.Tag.pt2_compliant_tag,))
            implementation = self._implementations.get(backend_name, self._implementations["reference"])
            LIB.impl(name, implementation, "CompositeExplicitAutograd")
            torch.library.register_fake(f"condlr_ext::{name}", fake, lib=LIB)
            overload = getattr(torch.ops.condlr_ext, name).default
            if vmap is not None:
                torch.library.register_vmap(f"condlr_ext::{name}", vmap(overload), lib=LIB)
            self._overloads[backend_name] = overload
        if triton is not None:
            LIB.impl(self.name, lambda *args: self._implementations[self.automatic(*args)](*args), "CUDA")
        self.dispatched, self.reference = self._overloads["dispatched"], self._overloads["reference"]
        OPS[self.name] = self

    def unsupported_reasons(self, backend_name: str, *args) -> list[str]:
        """Return the reasons why this backend cannot serve these arguments."""
        if backend_name == "cpu":
            return self._cpu_unsupported(*args)
        if backend_name == "triton":
            if not self.has_triton:
                return [f"there is no Triton kernel for {self.name} in this version"]
            return devices.unsupported_reasons(list(_tensors(args))) + self._triton_unsupported(*args)
        return []

    def explain(self, *args) -> tuple[str, str]:
        """Return the backend that "auto" takes for these arguments, and the reason."""
        candidate = "cpu" if _first(args).is_cpu else "triton"
        why = "; ".join(self.unsupported_reasons(candidate, *args)) or self._prefer_reference(*args)
        return ("reference", why) if why else (candidate, "it serves these arguments, and nothing faster is known")

    def automatic(self, *args) -> str:
        """Return the backend that "auto" takes for these arguments."""
        return self.explain(*args)[0]

    def choose(self, *args) -> str:
        """Return the backend for these arguments; "auto" on a GPU, where the op chooses when it runs.

        The choice there looks up what cannot be traced.

        Raises:
            BackendError: The named backend cannot serve them.
        """
        name = current_backend()
        if name == "auto":
            return "auto" if self.has_triton and _first(args).is_cuda else self.automatic(*args)
        reasons = self.unsupported_reasons(name, *args)
        if reasons:
            raise BackendError(f"condlr_ext: backend {name!r} cannot serve {self.name}: {'; '.join(reasons)}")
        return name

    def run(self, backend_name: str, *args):
        """Call the implementation that `choose` named."""
        return self._overloads.get(backend_name, self.dispatched)(*args)

    def __call__(self, *args):
        return self.run(self.choose(*args), *args)


def _first(args) -> torch.Tensor:
    return args[0] if isinstance(args[0], torch.Tensor) else next(_tensors(args))


def _tensors(args) -> Iterable[torch.Tensor]:
    for a in args:
        if isinstance(a, torch.Tensor):
            yield a
        elif isinstance(a, (list, tuple)):
            yield from _tensors(a)


def _on_first_call(path: str) -> Callable:
    """Return a function of kernels.triton that imports its module, and with it Triton, when first called."""
    module, function = path.rsplit(".", 1)

    def run(*args):
        return getattr(importlib.import_module(f"condlr_ext.kernels.triton.{module}"), function)(*args)

    return run


def is_plain(t: torch.Tensor) -> bool:
    """Return whether a layer's call on t is an ordinary one: not traced, no backend chosen, no autocast."""
    return (
        not torch.compiler.is_compiling()
        and _choice.name == "auto"
        and not autocast_enabled(t.device.type)
        and not torch.jit.is_tracing()
    )


def autocast_enabled(device_type: str) -> bool:
    """Return whether an autocast region is active; torch raises when asked about the meta device, which has none."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def no_autocast(device_type: str):
    """Return a context in which autocast is off."""
    if autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _as_op(fn: Callable) -> Callable:
    """Wrap fn to ignore autocast and to return no views.

    Autograd forbids in-place changes of a view that a Function returns, but a layer's output may go to
    ReLU(inplace=True).
    """

    def run(*args):
        first = args[0][0] if isinstance(args[0], (list, tuple)) and args[0] else args[0]
        with no_autocast(first.device.type if isinstance(first, torch.Tensor) else "cpu"):
            out = fn(*args)
        return tuple(map(_no_view, out)) if isinstance(out, tuple) else _no_view(out)

    return run


def _no_view(t):
    """Return the same memory as a tensor that autograd does not take for a view."""
    return torch.ops.aten._unsafe_view(t, t.shape) if isinstance(t, torch.Tensor) and t._is_view() else t


def unsupported_by_compiled(tensors, dtypes=(torch.float32, torch.float64)) -> list[str]:
    """Return the reasons why no kernel of the compiled CPU library can serve these tensors."""
    reasons = []
    if COMPILED.ops_reason:
        reasons.append(COMPILED.ops_reason)
    for t in tensors:
        if t.device.type != "cpu":
            reasons.append(f"a tensor is on {t.device}")
            break
    for t in tensors:
        if t.dtype not in dtypes:
            reasons.append(f"a tensor is {t.dtype}, the kernel serves {', '.join(map(str, dtypes))}")
            break
    return reasons


def transforms_active() -> bool:
    """Return whether torch.func or forward-mode AD is active."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def can_check(t: torch.Tensor) -> bool:
    """Return whether values can be read without waiting for a device or breaking a trace or a transform."""
    return (
        t.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and type(t) in (torch.Tensor, torch.nn.Parameter)
        and not torch._C._are_functorch_transforms_active()
    )
