"""What a recipe may say, and the objects it becomes. The only folder that knows pydantic."""

from .check import json_schema, load
from .schema import Recipe

__all__ = ["Recipe", "json_schema", "load"]
