"""Bring the tables and the figure of the documentation up to date with the results: python -m studies"""

import argparse

from . import figure, tables

if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m studies", description=__doc__.partition(":")[0] + ".").parse_args()
    for path in tables.pages():
        path.write_text(tables.rewrite(path.read_text(encoding="utf-8")), encoding="utf-8")
    figure.write()
