"""Sphinx: pages are MyST Markdown; those with a jupytext header are notebooks, run when the site is built."""

from __future__ import annotations

import os
import re
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from docutils import nodes
from pydantic import BaseModel
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx

project = "kdlib"
author = "The kdlib authors"
release = version = installed("kdlib")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
default_role = "code"

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 900
nb_output_stderr = "remove"  # progress bars, and warnings that name places of this machine
os.environ.setdefault("PYTHONPATH", str(Path(__file__).resolve().parents[1]))
for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):  # of the notebooks: glibc gives large tensors back to
    os.environ.setdefault(name, "1073741824")  # the system at each step, and 224 px then cost several times as long

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
napoleon_use_rtype = False
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!kdlib\.).*"), ("py:.*", r"kdlib\..*\b(_\w+|AnyLoss|Compute)")]

html_theme = "furo"
html_title = "kdlib"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["kdlib.css"]


def link_classes(app: Sphinx, tree: nodes.document) -> None:
    """In the catalogue's table, makes each class a link to its entry in the API reference."""
    if app.env.docname != "losses":
        return
    for row in tree.findall(nodes.row):
        cell = row.children[1]
        for literal in list(cell.findall(nodes.literal)):
            target = f"kdlib.losses.{literal.astext()}"
            link = pending_xref("", refdomain="py", reftype="class", reftarget=target, refwarn=True, refexplicit=True)
            literal.replace_self(link)
            link += literal


def signature_of(app: Sphinx, what: str, name: str, thing: Any, options: Any, given: str, returns: str) -> Any:
    """Recipe sections are written in YAML (keys.md lists their keys), and ``<factory>`` is no Python."""
    if isinstance(thing, type) and issubclass(thing, BaseModel):
        return "", None
    return (given.replace("<factory>", "..."), returns) if given and "<factory>" in given else None


def mend(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Text before a colon would be taken for an attribute's type; a comment in front prevents it. Papers link."""
    lines[:] = [re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"`arXiv:\1 <https://arxiv.org/abs/\1>`__", line) for line in lines]
    if what in ("attribute", "property", "data"):
        lines[:0] = ["..", ""]


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("doctree-read", link_classes)
    app.connect("autodoc-process-signature", signature_of)
    app.connect("autodoc-process-docstring", mend, priority=400)  # before napoleon's
    return {"parallel_read_safe": True}
