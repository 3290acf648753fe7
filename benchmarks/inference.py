"""Forward passes: the forms of a RIFormer and its rivals against its train form, within one run.

    python benchmarks/inference.py --budget 300 --out inference.json     one GPU, 224 px, bf16, 128 images
    python benchmarks/inference.py --cpu                                 64 px, float32, 8 images, a minute on two cores

train is the student as it was trained, norm the paper's fusion, full also without layer scales and the second norm's
affine, kernels that by Triton kernels. Each runs eager and, on a GPU, compiled; of_train is its images a second over
those of the train form at that form's best setting. recipes/riformer/measure/throughput.py measures, in every setting
and against the paper's numbers; here are those that are likely the best.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipes.riformer.measure import throughput
from recipes.riformer.measure.throughput import Setting

LARGE = ("riformer_s12", "poolformer_s12:timm"), ("riformer_m36", "poolformer_m36:timm", "gfnet_h_b:real")
SMALL = (("riformer_micro", "metaformer_pool_micro:plain"),)


def jobs(cpu: bool) -> list[list[str]]:
    """Models with their forms, a group for each RIFormer."""
    forms = ("train", "norm", "full") if cpu else ("train", "norm", "full", "kernels")
    return [[*(f"{own}:{form}" for form in forms), *rivals] for own, *rivals in (SMALL if cpu else LARGE)]


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a group, those that ran, each with its ratio to the first form's best."""
    ran = [row for row in rows if "images_per_second" in row]
    own = [row["images_per_second"] for row in ran if row["form"] == "train"]
    return [row | {"of_train": row["images_per_second"] / max(own) if own else None} for row in ran]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="small models")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds for each RIFormer and its rivals")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    given = parser.parse_args()
    if not given.cpu and not torch.cuda.is_available():
        parser.error("no GPU here: give --cpu")
    device = torch.device("cpu" if given.cpu else "cuda")
    how = ("fp32", "contiguous") if given.cpu else ("bf16", "channels_last")
    settings = [Setting(mode, *how) for mode in (("eager",) if given.cpu else ("compiled", "eager"))]
    reports: list[dict[str, Any]] = []
    for group in jobs(given.cpu):
        report = throughput.measure(
            group, device, settings=settings, batch=8 if given.cpu else 128, pixels=64 if given.cpu else None,
            runs=10 if given.cpu else 30, budget=given.budget,
            keep=lambda so_far: write(given.out, [*reports, so_far]),
        )  # fmt: skip
        reports.append(report)
        write(given.out, reports)
    for row in (row for report in reports for row in compared(report["rows"])):
        ratio = f"{row['of_train']:.2f}" if row["of_train"] else "-"
        print(
            f"{row['model']:24}{row['form']:9}{row['setting']:30}{row['images_per_second']:>10,.0f} images/s{ratio:>7}"
        )


def write(out: Path | None, reports: list[dict[str, Any]]) -> None:
    """What there is so far, so that a run that is cut off has it."""
    if out is None:
        return
    apart = ("rows", "best", "ratios", "skipped", "seconds")  # these are of one group
    kept = {key: value for key, value in reports[0].items() if key not in apart}
    kept["rows"] = [row for report in reports for row in compared(report["rows"])]
    kept["skipped"] = [row for report in reports for row in report["skipped"]]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
