"""What the affine mixers learned: the distribution of their scales s, stage by stage (RIFormer, CVPR 2023, Fig. 6).

python recipes/riformer/measure/affine_scales.py runs/riformer --out scales.json
python recipes/riformer/measure/affine_scales.py runs/with runs/without --labels imitated "not imitated" --out s.json

A mixer computes A(z) = s z + t - z, so s = 1 adds nothing, s = 0 subtracts the normed input, and a negative s subtracts
more than that. A source is a run folder or any checkpoint of a RIFormer in its train form.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # so that this file can be started as a script

from recipes.riformer.measure import clock, tool, trained

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUANTILES = {"1%": 0.01, "25%": 0.25, "median": 0.5, "75%": 0.75, "99%": 0.99}


def statistics(scales: Tensor) -> dict[str, object]:
    """Count, mean, standard deviation (of the population), share below 0 and quantiles of (n,) scales."""
    wide = scales.double()
    return {
        "count": wide.numel(),
        "mean": float(wide.mean()),
        "std": float(wide.std(correction=0)),
        "negative": float((wide < 0).double().mean()),
        "quantiles": {name: float(wide.quantile(q)) for name, q in QUANTILES.items()},
    }


def measure(sources: Sequence[Path], labels: Sequence[str] | None = None) -> tool.Report:
    """The scales of each source, with their statistics, by stage and by block.

    Raises:
        ValueError: a source without affine mixers, or not one label for each source.
    """
    if labels and len(labels) != len(sources):
        raise ValueError(f"--labels: {len(labels)} given for {len(sources)} sources; give one each")
    report = clock.about(torch.device("cpu"), models=[])
    for source, label in zip(sources, labels or [source.resolve().stem for source in sources], strict=True):
        blocks = trained.affine_scales(source)
        stages: dict[str, list[Tensor]] = {}
        for name, scales in blocks.items():
            stages.setdefault(name.split(".")[1], []).append(scales)
        joined = {stage: torch.cat(parts) for stage, parts in sorted(stages.items(), key=lambda at: int(at[0]))}
        report["models"].append(
            {
                "label": label,
                "source": source.name,
                "stages": {
                    stage: statistics(scales) | {"scales": [float(f"{s:.5g}") for s in scales.tolist()]}
                    for stage, scales in joined.items()
                },
                "blocks": {name: statistics(scales) for name, scales in blocks.items()},
            }
        )
        for stage, found in report["models"][-1]["stages"].items():
            said = f"mean {found['mean']:+.4f}  std {found['std']:.4f}  negative {found['negative']:6.1%}"
            print(f"{label:24} stage {stage}  {found['count']:5} scales  {said}", flush=True)
    return report


def draw(report: tool.Report) -> Figure:
    """One histogram a stage, all sources over the same bins; a dashed line at each mean."""
    from matplotlib import pyplot

    models = report["models"]
    stages = sorted({stage for each in models for stage in each["stages"]}, key=int)
    columns = min(len(stages), 4)
    lines = -(-len(stages) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(3.3 * columns + 0.4, 2.9 * lines + 0.3), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(stages) :]:
        axis.remove()
    for axis, stage in zip(axes.flat, stages, strict=False):
        there = [
            (at, each["label"], each["stages"][stage]) for at, each in enumerate(models) if stage in each["stages"]
        ]
        ends = [end for _, _, found in there for end in (min(found["scales"]), max(found["scales"]), 0.0)]
        low, high = min(ends), max(ends)
        margin = 0.05 * (high - low) or 0.1  # scales that were never trained may be all the same
        bins = torch.linspace(low - margin, high + margin, 42).tolist()
        axis.axvline(0, color="black", linewidth=0.8)
        for at, label, found in there:
            colour = tool.COLOURS[at % len(tool.COLOURS)]
            weights = [1 / found["count"]] * found["count"]
            axis.hist(found["scales"], bins, weights=weights, histtype="stepfilled", color=colour, alpha=0.28)
            axis.hist(found["scales"], bins, weights=weights, histtype="step", color=colour, label=label)
            axis.axvline(found["mean"], color=colour, linestyle="--", linewidth=1.2)
        for line, (at, _, found) in enumerate(there):
            said = f"{found['mean']:+.3f}, {found['negative']:.0%} < 0"
            style = {"color": tool.COLOURS[at % len(tool.COLOURS)], "fontsize": 8, "ha": "right", "va": "top"}
            axis.text(1, 0.98 - 0.08 * line, said, transform=axis.transAxes, **style)
        axis.set_title(f"stage {stage}, {there[0][2]['count']} scales", fontsize=9)
        axis.set_xlabel("s")
        axis.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.flat[0].set_ylabel("share of the scales")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(models), 4))
    figure.suptitle(
        "affine scales s in A(z) = s z + t - z; dashed: the mean, also in figures, and the share below 0",
        fontsize=9,
        color="#555555",
    )
    return figure


def make_parser() -> tool.Parser:
    parser = tool.Parser(__doc__)
    parser.add_argument("sources", nargs="*", type=Path, metavar="SOURCE", help="a run folder or a file of weights")
    parser.add_argument("--labels", nargs="+", help="a name for each source (default: its folder's or file's)")
    return parser


def from_arguments(given: argparse.Namespace, _: Callable[[tool.Report], None]) -> tool.Report:
    if not given.sources:
        raise ValueError("name a run folder or a file of weights")
    return measure(given.sources, given.labels)


if __name__ == "__main__":
    sys.exit(tool.main(make_parser(), from_arguments, draw))
