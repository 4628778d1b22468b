"""`python -m bench`, from the root of a checkout."""

import argparse
import sys

from .command import TEXT, arguments, run


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message} (see {self.prog} --help)")


def main(argv: list[str] | None = None) -> int:
    parser = _Parser(prog="python -m bench", description=TEXT[0].upper() + TEXT[1:] + ".")
    arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except (ValueError, OSError, ImportError, ArithmeticError) as error:
        print(f"bench: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
