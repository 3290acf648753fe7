"""The catalogue of losses: ``LOSSES`` maps the names that a recipe may use to classes."""

from __future__ import annotations

import re
from typing import TypeVar

from torch import nn

from .base import Loss, Sum, View
from .features import FeatureMSE
from .logits import CrossEntropy, HardLabel, SoftTarget
from .relations import GramRelation

__all__ = [
    "LOSSES",
    "CrossEntropy",
    "FeatureMSE",
    "GramRelation",
    "HardLabel",
    "Loss",
    "SoftTarget",
    "Sum",
    "View",
    "register",
]

AnyLoss = TypeVar("AnyLoss", bound=type[nn.Module])

LOSSES: dict[str, type[nn.Module]] = {}


def register(loss: AnyLoss, name: str | None = None) -> AnyLoss:
    """Lets recipes name a loss; the name is the class's in snake_case (``FeatureMSE`` is ``feature_mse``).

    Returns the class, so that it also serves as a decorator.

    Raises:
        ValueError: another class has that name already.
    """
    name = name or re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", loss.__name__).lower()
    if LOSSES.setdefault(name, loss) is not loss:
        raise ValueError(f"the name {name!r} belongs to {LOSSES[name].__qualname__}; register with name=...")
    return loss


for _loss in (SoftTarget, HardLabel, CrossEntropy, FeatureMSE, GramRelation):
    register(_loss)
