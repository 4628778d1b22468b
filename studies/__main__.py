"""Bring the tables and the figure of the documentation up to date with the results: python -m studies"""

from . import figure, tables

if __name__ == "__main__":
    for path in tables.pages():
        path.write_text(tables.rewrite(path.read_text(encoding="utf-8")), encoding="utf-8")
    figure.write()
