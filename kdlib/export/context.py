"""What is exported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..models import Found

Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Context:
    """A student on its way out."""

    found: Found
    model: nn.Module
    """The student, fused where it could be; in eval mode."""
    arguments: dict[str, Any]
    """With which timm builds it, beside those in the recipe."""
    batch_size: int | None

    @property
    def name(self) -> str:
        """Of the architecture."""
        assert self.found.recipe is not None
        return self.found.recipe.student.name
