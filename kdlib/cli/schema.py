"""Prints the JSON schema of a config, with which editors complete and check YAML.

  kdlib schema > recipe.schema.json

It is kdlib/recipe/schema.json too; a config names it in its first line (the path is relative to the config):

  # yaml-language-server: $schema=../../../kdlib/recipe/schema.json

From Python: kdlib.recipe.json_schema().
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace


def arguments(parser: ArgumentParser) -> None:
    pass


def run(options: Namespace) -> None:
    import json

    from ..recipe import json_schema

    print(json.dumps(json_schema(), indent=1))
