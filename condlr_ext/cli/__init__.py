"""Command line `condlr`: arguments, and errors as one line."""

import argparse
import contextlib
import os
import sys
import typing
from types import UnionType
from typing import Annotated, Union

import torch

import condlr_ext

from .. import ops
from . import commands, output

MOST_THREADS = 1024


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message} (see {self.prog} --help)")


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; default sys.argv[1:].

    Returns:
        Exit code: 0; 2 after a user's error (one line on stderr); 130 when interrupted.
    """
    argv = [_dashes(a) for a in (sys.argv[1:] if argv is None else argv)]
    output.prepare()
    try:
        arguments = _parser(argv).parse_args(argv)
        backend = condlr_ext.backend(arguments.backend) if arguments.backend else contextlib.nullcontext()
        with backend, _threads(getattr(arguments, "threads", None)):
            ops.check_environment()
            code = arguments.command(arguments) or 0
            sys.stdout.flush()
    except BrokenPipeError:  # the reader, head for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError, RuntimeError, ArithmeticError, MemoryError) as error:
        text = " ".join(str(error).split()) or ("out of memory" if isinstance(error, MemoryError) else repr(error))
        print(f"condlr: error: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("condlr: interrupted", file=sys.stderr)
        return 130
    return code


def _dashes(argument: str) -> str:
    """Return --batch_size as --batch-size."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if argument.startswith("--") else argument


@contextlib.contextmanager
def _threads(count: int | None):
    before = torch.get_num_threads()
    if count is not None:
        if not 1 <= count <= MOST_THREADS:
            raise ValueError(f"--threads must be in 1..{MOST_THREADS}, got {count}")
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """Add an argument for each field of TrainConfig, which has the defaults and checks the values."""
    from ..experiments.config import TrainConfig

    special = {"runs": ("--run", {"action": "append", "metavar": "SPEC"}), "seeds": ("--seed", {})}
    for name, field in TrainConfig.model_fields.items():
        flag, options = special.get(name, (f"--{name.replace('_', '-')}", {}))
        default = _text(field.get_default())
        text = f"{field.description}; default: {default}" if default else field.description
        options = options or _type(field.annotation)
        parser.add_argument(flag, dest=name, default=None, help=text.replace("%", "%%"), **options)


def _type(annotation) -> dict:
    """Return the arguments of add_argument for a field of this type."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, UnionType, Annotated):  # of something and None, or with constraints
        return _type(parts[0])
    if origin is tuple:
        return _type(parts[0]) | {"nargs": "*"}
    if annotation is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"type": annotation, "metavar": "N" if annotation is int else "X"} if annotation in (int, float) else {}


def _text(default) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    if isinstance(default, tuple):
        return " ".join(filter(None, map(_text, default)))
    return str(default) if isinstance(default, (int, float, str)) else ""


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--backend", help="implementation of the kernels: auto, reference, cpu or triton")

    parser = _Parser(prog="condlr", description="Robust low-rank training: W = U S Vᵀ with bounded condition number.")
    parser.add_argument("--version", action="version", version=f"condlr_ext {condlr_ext.__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    # small layers leave a second thread waiting, and with one the sums do not depend on the number of cores
    threaded = argparse.ArgumentParser(add_help=False)
    threaded.add_argument("--threads", type=int, default=1, metavar="N", help="torch threads; default: %(default)s")

    def command(name: str, function, text: str, *parents):
        sub = subparsers.add_parser(
            name, parents=[common, *parents], help=text, description=text[0].upper() + text[1:] + "."
        )
        sub.set_defaults(command=function)
        return sub

    train = command(
        "train", commands.train, "train networks dense, low-rank and constrained, and attack them", threaded
    )
    train.add_argument("--config", metavar="TOML", help="settings; what is given here beside it takes precedence")
    if argv[:1] == ["train"]:  # other commands need none of the packages of experiments
        _add_settings(train)

    evaluate = command("evaluate", commands.evaluate, "attack a checkpoint of train", threaded)
    evaluate.add_argument("checkpoint", metavar="CHECKPOINT")
    evaluate.add_argument("--data", help="instead of the data set it was trained on")
    evaluate.add_argument("--folder", help="where the files of the data set lie")
    evaluate.add_argument("--eps", type=float, nargs="+", help="instead of the budgets of its training run")
    evaluate.add_argument(
        "--attacks", nargs="+", metavar="NAME", help="worst, or names; instead of those of its training run"
    )
    evaluate.add_argument("--attack-steps", type=int, metavar="N", help="instead of those of its training run")
    evaluate.add_argument("--attack-restarts", type=int, metavar="N", help="instead of those of its training run")
    evaluate.add_argument("--attack-samples", type=int, metavar="N", help="instead of those of its training run")
    evaluate.add_argument("--device", default="cpu", help="default: %(default)s")
    evaluate.add_argument("--json", action="store_true", help="print every number as JSON")

    inspect = command(
        "inspect", commands.inspect, "show the layers of a checkpoint: rank, spectrum, orthonormality, route"
    )
    inspect.add_argument("checkpoint", metavar="CHECKPOINT")
    inspect.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="for route and gain; default: %(default)s"
    )
    inspect.add_argument("--json", action="store_true", help="print every number as JSON")

    info = command("info", commands.info, "show versions, what is compiled and which backend serves which op")
    info.add_argument("--json", action="store_true", help="print it as JSON")
    return parser
