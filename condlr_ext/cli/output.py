"""What the command prints reaches every stream: in ASCII where the encoding lacks a letter, nowhere if it is closed."""

import codecs
import os
import sys

ASCII = {
    "κ": "kappa", "τ": "tau", "σ": "sigma", "μ": "mu", "β": "beta", "ϑ": "theta", "ε": "eps", "ℓ": "l", "∞": "inf",
    "ᵀ": "^T", "⁻": "^-", "¹": "1", "‖": "||", "−": "-", "–": "-", "±": "+-", "≤": "<=",
}  # fmt: skip


def prepare() -> None:
    """Let stdout and stderr take any text."""
    codecs.register_error("condlr_ext.ascii", _to_ascii)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before the start
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="condlr_ext.ascii")


def _to_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(ASCII.get(x) or x.encode("ascii", "backslashreplace").decode() for x in letters), error.end
