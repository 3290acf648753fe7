"""The model card of a finished run: `model_card.md`, filled with what was measured and nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from string import Template

import torch

from kdlib.recipe import Recipe
from kdlib.results import Row
from kdlib.runs import Outcome

TEMPLATE = Path(__file__).with_name("model_card.md")
CODE = "The code is Apache-2.0"
LICENCES = {
    "fashion-mnist": f"{CODE}, the images are MIT (Zalando SE).",
    "fashion-mnist-5k": f"{CODE}, the images are MIT (Zalando SE).",
}
"""By data set; of any other the user knows the terms."""
MIXERS = {
    "affine": "RIFormer: a backbone without token mixer, trained with a per-channel affine map in its place.",
    "identity": "A MetaFormer whose token mixer is the identity, one of RIFormer's baselines.",
    "pool": "PoolFormer: a MetaFormer whose token mixer is average pooling, one of RIFormer's baselines.",
}


def model_card(recipe: Recipe, outcome: Outcome, rows: Sequence[Row], difference: float | None) -> str:
    """The card as Markdown.

    Args:
        rows: the table of the run.
        difference: the largest between logits of the fused and the unfused student; None where nothing was fused.
    """
    data, student = outcome.data, recipe.student
    sets = {"num_classes": len(data.classes)} | ({} if data.channels == 3 else {"in_chans": data.channels})
    arguments = {key: value for key, value in (sets | student.arguments).items() if key != "pretrained"}
    own = "the weights fall under the terms of the data and of whatever weights the run began from."
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        name=student.name,
        what=MIXERS.get(str(getattr(outcome.student, "token_mixer", None)), f"{student.name}, as timm makes it."),
        rows="\n".join(_row(row) for row in rows),
        test=f"{data.test.batches.images:,}",
        data=data.name,
        seed=recipe.seed,
        device=_device(outcome.accelerator.device),
        torch=torch.__version__,
        fused="" if difference is None else f"Fused and unfused logits differ by at most {difference:.1e}.",
        train=f"{data.train.samples * outcome.accelerator.num_processes:,}",
        size=data.image_size,
        classes=len(data.classes),
        teachers="; ".join(_teacher(recipe, name) for name in recipe.teachers) or "none, labels alone.",
        terms=", ".join(f"{term.weight:g} × {term.loss.name} ({name})" for name, term in recipe.terms.items()) + ".",
        epochs=recipe.epochs,
        seconds=f"{outcome.seconds:,.0f}",
        folder=outcome.folder.as_posix(),
        arguments=", ".join([repr(student.name), *(f"{key}={value!r}" for key, value in arguments.items())]),
        mean=_numbers(data.mean),
        std=_numbers(data.std),
        licence=LICENCES.get(data.name, f"{CODE}; {own}"),
    )


def _row(row: Row) -> str:
    top1 = "not measured" if math.isnan(row.top1) else f"{row.top1:.2f}"
    return f"| {row.what} | {row.model} | {top1} | {row.parameters:,} | {row.images_per_second:,.0f} |"


def _teacher(recipe: Recipe, name: str) -> str:
    spec = recipe.teachers[name]
    origin = f"weights from {spec.weights}" if spec.weights is not None else "timm's pretrained weights"
    start = ", whose weights the student began with" if recipe.student.init == name else ""
    return f"{name}, {spec.name} ({origin if spec.foreign else 'trained by this run'}){start}"


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"a CPU ({torch.get_num_threads()} threads)"


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
