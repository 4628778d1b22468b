"""The command `condlr`: arguments, and errors as one line."""

import argparse
import contextlib
import os
import sys

import torch

import condlr_ext

from . import commands


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message} (see {self.prog} --help)")


def main(argv: list[str] | None = None) -> int:
    """Run one command; argv without the program's name, default sys.argv[1:].

    Returns:
        Exit code: 0; 2 after a user's error (one line on stderr); 130 when
        interrupted.
    """
    argv = [_dashes(a) for a in (sys.argv[1:] if argv is None else argv)]
    try:
        arguments = _parser().parse_args(argv)
        backend = condlr_ext.backend(arguments.backend) if arguments.backend else contextlib.nullcontext()
        with backend, _threads(getattr(arguments, "threads", None)):
            code = arguments.command(arguments) or 0
            sys.stdout.flush()
    except BrokenPipeError:  # the reader, head for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError, NotImplementedError, ArithmeticError) as error:
        print(f"condlr: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("condlr: interrupted", file=sys.stderr)
        return 130
    return code


def _dashes(argument: str) -> str:
    """--batch_size is --batch-size."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if argument.startswith("--") else argument


@contextlib.contextmanager
def _threads(count: int | None):
    before = torch.get_num_threads()
    if count is not None:
        if count < 1:
            raise ValueError(f"--threads must be >= 1, got {count}")
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--backend", help="implementation of the kernels: auto, reference, cpu or triton")

    parser = _Parser(prog="condlr", description="Robust low-rank training: W = U S Vᵀ with bounded condition number.")
    parser.add_argument("--version", action="version", version=f"condlr_ext {condlr_ext.__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    # small layers leave a second thread waiting, and with one the sums do not depend on the number of cores
    threaded = argparse.ArgumentParser(add_help=False)
    threaded.add_argument("--threads", type=int, default=1, metavar="N", help="torch threads; default 1")

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
    train.add_argument(
        "--data", help='"digits", a .npz file with x [N, ...] in [0, 1] and integer y [N], or mnist, fashion-mnist, '
        "kmnist, cifar10, cifar100, svhn"
    )  # fmt: skip
    train.add_argument("--folder", help="where the files of such a data set lie; nothing is downloaded")
    train.add_argument("--network", help="mlp (default), cnn, lenet5, vgg16, wrn16-4 or vit")
    train.add_argument(
        "--run", dest="runs", action="append", metavar="SPEC",
        help="a network to train, may be given again: dense, vanilla:budget=0.27, "
        "condlr:tau=0.1,budget=0.27,sigma_max=1.5, condlr:tau=0.1,rank=0.2, released, cayley, projected, dlrt, "
        "robust-dlrt, svd-prune, tscnc (default: those of the demo)",
    )  # fmt: skip
    train.add_argument("--epochs", type=int, metavar="N", help="default 60")
    train.add_argument("--batch-size", type=int, metavar="N", help="default 32")
    train.add_argument("--lr", type=float, help="default 0.2; multiplied by 0.3 at 58 %% and 83 %% of the epochs")
    train.add_argument("--lr-drop", type=float, help="what it is multiplied by, default 0.3")
    train.add_argument("--drop-at", type=float, nargs="*", metavar="SHARE", help="of the epochs, default 0.58 0.83")
    train.add_argument("--momentum", type=float, help="default 0.3")
    train.add_argument("--weight-decay", type=float, help="default 0")
    train.add_argument(
        "--seed", dest="seeds", type=int, nargs="+", metavar="N",
        help="of split, weights, batch order and attacks; every run is repeated for each; default 0",
    )  # fmt: skip
    train.add_argument(
        "--validation", type=float, metavar="SHARE", help="of the training set, for the best epoch; default 0"
    )
    train.add_argument(
        "--no-test", dest="test", action="store_false", default=None, help="attack on the validation part instead"
    )
    train.add_argument(
        "--augment", action=argparse.BooleanOptionalAction, help="random crops and flips; default as published"
    )
    train.add_argument("--adversarial", metavar="ATTACK", help="train on attacked batches: pgd or low-rank-pgd")
    train.add_argument("--adversarial-eps", type=float, metavar="EPS", help="default 0.1")
    train.add_argument("--adversarial-steps", type=int, metavar="N", help="default 7")
    train.add_argument(
        "--eps", type=float, nargs="+", help="attack budgets, in the units of x in [0, 1]; default 0.05 0.1 0.2"
    )
    train.add_argument("--attacks", nargs="+", metavar="NAME", help="default all that robustness.evaluate knows")
    train.add_argument("--attack-steps", type=int, metavar="N", help="of PGD; default 30")
    train.add_argument("--attack-restarts", type=int, metavar="N", help="default 2")
    train.add_argument("--device", help="default cpu")
    train.add_argument("--tensorboard", action="store_true", default=None, help="log for TensorBoard too")
    train.add_argument("--out", metavar="DIR", help="folder of the results; default runs/<data>")
    train.add_argument(
        "--overwrite", action="store_true", default=None, help="replace results of other settings in that folder"
    )

    evaluate = command("evaluate", commands.evaluate, "attack a checkpoint of train", threaded)
    evaluate.add_argument("checkpoint", metavar="CHECKPOINT")
    evaluate.add_argument("--data", help="instead of the data set it was trained on")
    evaluate.add_argument("--folder", help="where the files of the data set lie")
    evaluate.add_argument("--eps", type=float, nargs="+", help="instead of the budgets of its training run")
    evaluate.add_argument("--attacks", nargs="+", metavar="NAME", help="instead of those of its training run")
    evaluate.add_argument("--attack-steps", type=int, metavar="N", help="instead of those of its training run")
    evaluate.add_argument("--attack-restarts", type=int, metavar="N", help="instead of those of its training run")
    evaluate.add_argument("--device", default="cpu", help="default cpu")
    evaluate.add_argument("--json", action="store_true", help="print every number as JSON")

    inspect = command(
        "inspect", commands.inspect, "show the layers of a checkpoint: rank, spectrum, orthonormality, route"
    )
    inspect.add_argument("checkpoint", metavar="CHECKPOINT")
    inspect.add_argument("--batch-size", type=int, default=32, metavar="N", help="for route and gain; default 32")
    inspect.add_argument("--json", action="store_true", help="print every number as JSON")

    info = command("info", commands.info, "show versions, what is compiled and which backend serves which op")
    info.add_argument("--json", action="store_true", help="print it as JSON")
    return parser
