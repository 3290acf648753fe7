"""RIFormer from end to end: teachers, baseline, distilled student, fusion, one table.

accelerate launch recipes/riformer/run.py [CONFIG.yaml …] [key=value …]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # so that `recipes` is found when this file is started as a script

from kdlib import checkpoint, launch, results, runs  # noqa: E402
from kdlib.progress import console  # noqa: E402
from kdlib.recipe import Recipe  # noqa: E402
from recipes.riformer import gfnet, model  # noqa: E402, F401  registers the models with timm
from recipes.riformer.convert import convert  # noqa: E402


def main(recipe: Recipe) -> None:
    outcome = runs.run(recipe, convert=convert)
    if outcome.accelerator.is_main_process:
        conclude(outcome)


@torch.no_grad()
def conclude(outcome: runs.Outcome) -> None:
    """Fuses the student, checks it against the unfused one on every test image, and writes and prints what came out."""
    student = outcome.student.eval()
    fused = model.fuse(student, level="full")
    difference = 0.0
    for images, _ in outcome.data.test.epoch(0):
        difference = max(difference, (student(images) - fused(images)).abs().max().item())
    checkpoint.save_weights(fused, outcome.folder / "student_fused.safetensors")
    fused_top1 = runs.evaluate(fused, outcome.data.test, outcome.accelerator)["top1"]

    shown = [
        (f"teacher {name}", o.name, o.student, o.result.get("top1", float("nan")))
        for name, o in outcome.teachers.items()
    ]
    if outcome.baseline is not None:
        shown.append(("baseline", outcome.baseline.name, outcome.baseline.student, outcome.baseline.result["top1"]))
    shown += [("student", outcome.name, student, outcome.result["top1"]), ("fused", outcome.name, fused, fused_top1)]
    images = next(outcome.data.test.epoch(0))[0]
    speeds = results.throughput([m for _, _, m, _ in shown], images)
    rows = [
        results.Row(what, name, top1, results.count_parameters(m), speed)
        for (what, name, m, top1), speed in zip(shown, speeds, strict=True)
    ]
    folders = {"baseline": outcome.baseline.folder} if outcome.baseline else {}
    folders = {name: o.folder for name, o in outcome.teachers.items()} | folders | {"student": outcome.folder}
    results.curves(
        {name: folder for name, folder in folders.items() if (folder / "metrics.jsonl").exists()},
        outcome.folder / "curves.png",
    )
    summary = {
        "teacher_top1": rows[0].top1 if outcome.teachers else None,
        "baseline_top1": outcome.baseline.result["top1"] if outcome.baseline else None,
        "student_top1": outcome.result["top1"],
        "fused_top1": fused_top1,
        "fused_max_abs_diff": difference,
        "seconds": outcome.seconds,
        "result": outcome.result,
        "rows": [vars(row) for row in rows],
    }
    checkpoint.write_json(outcome.folder / "summary.json", summary)
    console.print(results.table(rows, f"{outcome.data.name}, {outcome.seconds:.0f} s"))
    console.print(
        f"fused and unfused student differ by at most {difference:.1e} in any logit; all in {outcome.folder}/",
        markup=False,
    )


if __name__ == "__main__":
    sys.exit(launch.main(main, default=HERE / "configs" / "default.yaml"))
