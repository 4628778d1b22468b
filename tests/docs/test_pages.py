"""The README and the documentation: links and names exist, tables are those of the results, nothing is left out."""

import pkgutil
import re
from pathlib import Path

import pytest

import condlr_ext
from bench import markdown
from studies import tables

ROOT = Path(__file__).parents[2]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
AREAS = (
    "attacks", "baselines", "errors", "functional", "linalg", "nn", "optim", "pruning", "regularizers", "robustness",
)  # fmt: skip
CODE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    return CODE.sub("", page.read_text())


def resolve(name: str):
    """The object of a dotted name in condlr_ext, the package's own name left out or not."""
    return pkgutil.resolve_name(name if name.startswith("condlr_ext") else f"condlr_ext.{name}")


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


@every_page
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", prose(page)):
        if not re.match(r"https?://|mailto:", target):
            assert (page.parent / target).exists(), target


def test_every_page_is_in_the_navigation():
    named = re.findall(r"^ +- ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(named) == len(set(named))
    assert set(named) == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}


def mentioned(page: Path) -> set[str]:
    """Names of the package in inline code, as `optim.CondLRSGD(model)`, and in cross references."""
    found = set(re.findall(r"`([\w.]+)(?:\([^`\n]*)?`", prose(page)))
    roots = {"condlr_ext", "importers", *AREAS} - {"nn"}  # which is torch's in prose
    dotted = {name for name in found if name.partition(".")[0] in roots and not name.endswith(".py")}
    return dotted | set(re.findall(r"\]\[(condlr_ext[\w.]*)\]", prose(page)))


@every_page
def test_names_exist(page):
    for name in mentioned(page):
        resolve(name)


def test_enough_names_are_looked_at():
    names = set().union(*map(mentioned, PAGES))
    assert {"condlr_ext.optim.CondLRSGD", "attacks.pgd", "baselines.DLRT", "importers.polar"} <= names
    assert len(names) > 60


def documented() -> set[int]:
    """Objects that the reference shows, by identity."""
    shown = set()
    for page in (DOCS / "reference").glob("*.md"):
        for name, options in re.findall(r"^::: (\S+)\n((?: +.*\n)*)", page.read_text() + "\n", re.MULTILINE):
            target, members = resolve(name), re.search(r"members: \[(.*)\]", options)
            shown.add(id(target))
            shown |= {id(getattr(target, member)) for member in (members[1].split(", ") if members else ())}
    return shown


def test_reference_shows_every_public_name():
    shown = documented()
    missing = []
    for area in ("", *AREAS):
        module = resolve(area) if area else condlr_ext
        for name in getattr(module, "__all__", None) or [n for n in vars(module) if n[0].isupper()]:
            value = getattr(module, name)
            if (callable(value) or isinstance(value, type)) and id(value) not in shown:
                missing.append(f"{area}.{name}")
    assert not missing


@every_page
def test_tables_are_those_of_the_results(page):
    text = page.read_text()
    assert markdown.rewrite(text) == text
    assert tables.rewrite(text) == text


def test_changed_tables_are_seen():
    text = README.read_text()
    for comment, rewrite in (("study digits-mlp", tables.rewrite), ("python -m bench networks", markdown.rewrite)):
        broken = re.sub(rf"(<!-- {comment}.*?\| )(\d+\.\d)", r"\g<1>0.0", text, count=1, flags=re.DOTALL)
        assert broken != text and rewrite(broken) == text
