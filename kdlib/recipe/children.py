"""The runs that a run needs: what trains its teachers, and the baseline it is compared with."""

from __future__ import annotations

from typing import Any

from ..config import Document, Key
from .schema import Recipe

SHARED = (
    *("data", "seed", "precision", "tf32", "channels_last", "compile", "threads"),
    *("log_every", "trackers", "eval_every", "save_every", "on_nonfinite"),
)
"""What every child takes over unless it says otherwise."""
SAME_TRAINING = ("epochs", "optimizer", "schedule", "accumulate", "ema", "metric", "patience")
"""What the baseline takes over besides, so that it differs in the objective alone."""


def children(recipe: Recipe) -> dict[Key, dict[str, Any]]:
    """The raw recipe of each child, by the key at which it stands: ``("teachers", name, "recipe")``, ``("baseline",)``.

    A teacher with weights of its own has none.
    """
    plain = recipe.model_dump(mode="json")
    shared = {key: plain[key] for key in SHARED}
    shared["compile"] = {"mode": plain["compile"]["mode"]}  # the rest is about teachers, which a child has of its own
    found: dict[Key, dict[str, Any]] = {}
    for name, spec in recipe.teachers.items():
        if spec.recipe is not None and not spec.foreign:
            found["teachers", name, "recipe"] = _over(shared | {"student": spec.whole}, spec.recipe)
    if recipe.baseline is not None:
        kept = {key: plain[key] for key in SAME_TRAINING}
        found[("baseline",)] = _over(shared | kept | {"student": recipe.student.whole}, recipe.baseline)
    return found


def _over(under: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    document = Document()
    document.overlay(under, "")
    document.overlay(own, "")
    return document.data
