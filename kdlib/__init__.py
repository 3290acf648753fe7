"""kdlib: one model learns from another. ``import kdlib as kd``."""

from . import losses
from .adapters import Project, Renormalize
from .distiller import Distilled, Distiller, Panel, Teacher
from .pairing import Pair, pair
from .plan import Plan, fit
from .schedules import Ramp, Window
from .taps import Taps
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
