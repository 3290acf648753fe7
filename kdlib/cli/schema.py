"""Prints the JSON schema of a config, with which editors complete and check YAML.

  kdlib schema > recipe.schema.json
  kdlib schema --into recipes my.yaml          name it in the first line of these files, and of all YAML in folders

The line is # yaml-language-server: $schema=PATH, the path relative to the config; editors with the YAML language server
(VS Code, Neovim, Emacs, Helix) read it. The schema lies beside the code, in kdlib/recipe/schema.json.

From Python: kdlib.recipe.json_schema().
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--into", nargs="+", type=Path, metavar="PATH", help="configs, or folders of them, to mark")


def run(options: Namespace) -> None:
    import json

    from ..progress import say
    from ..recipe import json_schema
    from ..recipe.editor import mark

    if options.into is None:
        print(json.dumps(json_schema(), indent=1))
        return
    files = [file for path in options.into for file in (sorted(path.rglob("*.y*ml")) if path.is_dir() else [path])]
    if not files:
        raise ValueError(f"--into: no YAML in {', '.join(map(str, options.into))}")
    changed = [file for file in files if mark(file)]
    say(f"{len(changed)} of {len(files)} files marked anew")
