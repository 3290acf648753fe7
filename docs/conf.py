"""Sphinx: pages are MyST Markdown; those with a jupytext header are notebooks, run when the site is built."""

from __future__ import annotations

import os
from importlib.metadata import version as installed

project = "kdlib"
author = "The kdlib authors"
release = version = installed("kdlib")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
os.environ.setdefault("PYTHONPATH", os.path.abspath(".."))

autodoc_typehints = "description"
autodoc_member_order = "bysource"

html_theme = "furo"
html_title = "kdlib"
