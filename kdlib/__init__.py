"""kdlib: one model learns from another. ``import kdlib as kd``."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import losses
from .adapters import Project, Renormalize
from .distiller import Distilled, Distiller
from .pairing import Pair, pair
from .plan import Plan
from .schedules import Ramp, Window
from .sizing import fit
from .taps import Taps
from .teacher import Panel, Teacher
from .terms import Term

__version__ = "0.1.0"

__all__ = [
    "Distilled",
    "Distiller",
    "Pair",
    "Panel",
    "Plan",
    "Project",
    "Ramp",
    "Renormalize",
    "Taps",
    "Teacher",
    "Term",
    "Window",
    "fit",
    "losses",
    "pair",
]

VERBS = ("data", "doctor", "export", "inspect", "launch", "models", "pairs", "recipe", "report")
"""What stands behind the command; imported when it is first named, since it needs timm, accelerate or matplotlib."""

if not TYPE_CHECKING:  # to a type checker this would make every name of kdlib right

    def __getattr__(name: str) -> Any:
        if name in VERBS:
            return import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *VERBS})
