"""What a recipe may say, and the objects it becomes. The only folder that knows pydantic."""

from .check import load, load_children
from .editor import json_schema
from .schema import Recipe

__all__ = ["Recipe", "json_schema", "load", "load_children"]
