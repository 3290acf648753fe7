"""RIFormer from end to end: teachers, baseline, distilled student, fusion, one table.

accelerate launch recipes/riformer/run.py [CONFIG.yaml …] [key=value …]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # so that `recipes` is found when this file is started as a script

from kdlib import launch, runs  # noqa: E402
from kdlib.conclude import conclude  # noqa: E402
from kdlib.progress import say  # noqa: E402
from kdlib.recipe import Recipe  # noqa: E402
from kdlib.training import checkpoint  # noqa: E402
from kdlib.training.evaluation import evaluate  # noqa: E402
from recipes.riformer import card, gfnet, model  # noqa: E402, F401  registers the models with timm
from recipes.riformer.convert import convert  # noqa: E402


def main(recipe: Recipe) -> None:
    outcome = runs.run(recipe, convert=convert)
    fused, fused_top1, difference = None, None, None
    student = outcome.student.eval()
    if isinstance(student, model.MetaFormer) and student.token_mixer != "pool":  # others read their neighbours
        fused = model.fuse(student, level="full")
        difference = largest_difference(outcome, fused)
        fused_top1 = evaluate(fused, outcome.data.test, outcome.accelerator)["top1"]
    if outcome.accelerator.is_main_process:
        finish(recipe, outcome, fused, fused_top1, difference)


@torch.no_grad()
def largest_difference(outcome: runs.Outcome, fused: nn.Module) -> float:
    """Between any two logits of the fused and the unfused student, over every test image of every rank."""
    largest = torch.zeros((), device=outcome.accelerator.device)
    with exact():
        for images, _ in outcome.data.test.epoch(0):
            largest = torch.maximum(largest, (outcome.student(images) - fused(images)).abs().max())
    return float(outcome.accelerator.gather(largest).max())


@contextmanager
def exact() -> Iterator[None]:
    """Convolutions and products in float32 throughout: TF32 alone would make 1e-2 of the difference."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def finish(
    recipe: Recipe, outcome: runs.Outcome, fused: nn.Module | None, fused_top1: float | None, difference: float | None
) -> None:
    """Writes the fused weights, the curves, the summary and the model card; prints the table."""
    derived = {}
    if fused is not None and fused_top1 is not None:
        checkpoint.save_weights(fused, outcome.folder / "student_fused.safetensors")
        derived["fused"] = (fused, fused_top1)
    rows = conclude(outcome, derived, {"fused_top1": fused_top1, "fused_max_abs_diff": difference})
    with checkpoint.whole(outcome.folder / "model_card.md") as draft:
        draft.write_text(card.model_card(recipe, outcome, rows, difference), encoding="utf-8")
    if difference is not None:
        say(f"fused and unfused student differ by at most {difference:.1e} in any logit; all in {outcome.folder}/")


if __name__ == "__main__":
    sys.exit(launch.main(main, default=HERE / "configs" / "default.yaml", convert=convert))
