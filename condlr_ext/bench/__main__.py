"""`python -m condlr_ext.bench`: `condlr bench` where the command `condlr` may be older than the benchmark."""

import argparse
import sys

from .command import TEXT, arguments, run


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message} (see {self.prog} --help)")


def main() -> int:
    parser = _Parser(prog="python -m condlr_ext.bench", description=TEXT[0].upper() + TEXT[1:] + ".")
    arguments(parser)
    try:
        return run(parser.parse_args())
    except (ValueError, OSError, ImportError, ArithmeticError) as error:
        print(f"condlr: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("condlr: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
