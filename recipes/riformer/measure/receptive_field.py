"""Which pixels a feature depends on: the effective receptive field of models, before and after imitation.

python recipes/riformer/measure/receptive_field.py runs/riformer --out field.json          every model of a run
python recipes/riformer/measure/receptive_field.py riformer_s12=a.pth poolformer_s12=b.pth \\
    --data name=folder root=/data/imagenet --stage 3 --out field.json

The map is the mean over images and channels of |d (sum over channels of the feature's centre) / d pixel|, over its
largest value (Luo et al., NeurIPS 2016, arXiv 1701.04128). A threshold's number is the share of the image's area that
the smallest square around the middle of the map's bright part needs to hold that share of the map (Ding et al., CVPR
2022, arXiv 2203.06717).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # so that this file can be started as a script

from kdlib import config, data
from recipes.riformer.measure import clock, tool, trained

if TYPE_CHECKING:
    from matplotlib.figure import Figure

THRESHOLDS = (0.2, 0.3, 0.5, 0.99)
LARGEST = 64
"""Cells a side of the map that is kept; one of a larger image is averaged down."""


def receptive_field(features: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """The sum over images of the map of one batch.

    Args:
        features: images (B, C, H, W) to maps (B, D, h, w); the models it runs are in eval mode.
        images: (B, C, H, W).

    Returns:
        (H, W) in float64, the mean over C, for the cell [h // 2, w // 2].

    Raises:
        ValueError: that cell does not depend on the image.
    """
    images = images.detach().requires_grad_()
    with torch.enable_grad():
        maps = features(images)
        height, width = maps.shape[-2:]
        centre = maps[:, :, height // 2, width // 2].float().sum()
        (gradient,) = torch.autograd.grad(centre, images, allow_unused=True) if centre.requires_grad else (None,)
    if gradient is None or not gradient.any():
        raise ValueError("the centre of the feature map does not depend on the image; choose another --stage or model")
    return gradient.double().abs().mean(1).sum(0)


def middle(field: Tensor) -> tuple[float, float]:
    """(y, x) in pixels of the middle of a field's bright part, to half a pixel: its mean place, weighted by its square.

    Not the middle of the cell: convolutions with less padding than half of their kernel look elsewhere.
    """
    weight = field.double().square()
    places = []
    for sums in (weight.sum(1), weight.sum(0)):
        pixels = torch.arange(len(sums), device=field.device) + 0.5
        places.append(round(2 * float((sums * pixels).sum() / sums.sum())) / 2)
    return places[0], places[1]


def shares(field: Tensor, centre: tuple[float, float]) -> dict[str, float]:
    """For each of THRESHOLDS, the share of the area inside the smallest square around ``centre`` that holds as much.

    Squares are cut at the border. Of one pixel's field in an H x W image this is 1 / (H W).

    Args:
        field: (H, W), nowhere negative.
        centre: (y, x) in pixels; the first pixel's middle is (0.5, 0.5).
    """
    rows = (torch.arange(field.shape[0], device=field.device) + 0.5 - centre[0]).abs()
    columns = (torch.arange(field.shape[1], device=field.device) + 0.5 - centre[1]).abs()
    distance = torch.maximum(rows[:, None], columns).flatten()
    sides, ring = distance.unique(return_inverse=True)
    held = torch.zeros(len(sides), dtype=torch.float64, device=field.device)
    held = held.index_add(0, ring, field.double().flatten()).cumsum(0)
    area = torch.bincount(ring).cumsum(0).double() / field.numel()
    found = {}
    for threshold in THRESHOLDS:
        first = int((held >= threshold * held[-1] * (1 - 1e-9)).nonzero()[0])
        found[f"{threshold:.0%}"] = float(area[first])
    return found


def radius(field: Tensor, centre: tuple[float, float]) -> float:
    """Mean distance from ``centre`` in pixels, weighted by the field; finer than squares where images are small."""
    rows = torch.arange(field.shape[0], device=field.device) + 0.5 - centre[0]
    columns = torch.arange(field.shape[1], device=field.device) + 0.5 - centre[1]
    return float((torch.hypot(rows[:, None], columns) * field).sum() / field.sum())


def measure_one(each: trained.Trained, loader: data.Loader, count: int, stage: int) -> tool.Report:
    """One model's row of the report: its map from ``count`` images, largest value 1, and its shares of the area.

    Raises:
        ValueError: a model without feature maps, or without that stage.
    """
    for parameter in each.net.parameters():
        parameter.requires_grad_(False)
    stages = len(getattr(each.net, "feature_info", None) or [])
    if not -stages <= stage < stages:
        raise ValueError(f"--stage {stage}: {each.label} has the stages 0 to {stages - 1}, or -1 for its last")
    net: nn.Module = each.net

    def features(images: Tensor) -> Tensor:
        prepared = each.prepare(images)
        maps = net.forward_intermediates(prepared, [stage % stages], output_fmt="NCHW", intermediates_only=True)  # type: ignore[operator]
        return maps[0]

    total, seen = torch.zeros(()), 0
    for images, _ in loader.epoch(0):
        images = images[: count - seen]
        for some in images.split(64):
            field = receptive_field(features, some)
            total = total.to(field) + field
        seen += len(images)
        if seen == count:
            break
    side, centre = total.shape[-1], middle(total)
    cells = total[None] if side <= LARGEST else F.adaptive_avg_pool2d(total[None], side // -(-side // LARGEST))
    shown = (cells[0] / cells.max()).cpu()
    return {
        "model": each.label,
        "source": each.source.name,
        "images": seen,
        "pixels": side,
        "centre": [float(c) for c in centre],
        "area": shares(total, centre),
        "radius": radius(total, centre),
        "map": [[float(f"{value:.4g}") for value in row] for row in shown.tolist()],
    }


def measure(
    sources: list[str],
    device: torch.device,
    *,
    images: int = 256,
    stage: int = -1,
    said: list[str] | None = None,
    labels: list[str] | None = None,
) -> tool.Report:
    """The receptive fields of the models in run folders and weight files, on test images of one data set.

    Args:
        sources: run folders, or ``NAME=FILE``.
        images: how many to average over.
        stage: the stage whose output is looked at, -1 for the last.
        said: the data set as ``key=value`` of ``kdlib.data.load``; else that of the first run folder, else the embedded
            images.
        labels: what each ``NAME=FILE`` is called, in their order; else its NAME.

    Raises:
        ValueError: a source, data set, stage or number of labels that does not fit.
    """
    files = sum("=" in source for source in sources)
    if labels and len(labels) != files:
        raise ValueError(f"--labels: {len(labels)} given for {files} sources NAME=FILE; give one each")
    names = iter(labels or [])
    folders = {source: trained.read_run(Path(source), device) for source in sources if "=" not in source}
    found = next((found for _, found in folders.values()), None)
    if found is None or said:
        found = _open(said or ["name=fashion-mnist-5k"], device)
    models: list[trained.Trained] = []
    for source in sources:
        if "=" in source:
            read = trained.read_weights(source, found.channels, device)
            read.label = next(names, read.label)
            models.append(read)
            continue
        for each in folders[source][0]:
            if any((each.source, each.label) == (other.source, other.label) for other in models):
                continue  # two runs share a teacher
            if len(folders) > 1 and each.label.startswith("student"):
                each.label = f"{Path(source).name}: {each.label}"
            models.append(each)
    report = clock.about(device, data=found.name, pixels=found.image_size, images=images, stage=stage, rows=[])
    for each in models:
        try:
            row = measure_one(each, found.test, images, stage)
        except (RuntimeError, AttributeError, AssertionError) as error:
            raise ValueError(f"{each.label}: its feature maps cannot be had: {' '.join(str(error).split())}") from None
        report["rows"].append(row)
        print(f"{each.label:32} {'  '.join(f'{k}: {v:6.1%}' for k, v in row['area'].items())} of the area", end="")
        print(f"   mean distance {row['radius']:.2f} px", flush=True)
    return report


def _open(said: list[str], device: torch.device) -> data.Data:
    document = config.Document()
    for each in said:
        if not config.is_assignment(each):
            raise ValueError(f"--data {each}: expected key=value, as name=folder root=/data/imagenet")
        document.assign(each)
    try:
        return data.load(**document.data, device=device)
    except TypeError as error:
        raise ValueError(f"--data: {error}") from None


def draw(report: tool.Report) -> Figure:
    """One heat map a model on a common logarithmic scale, with the squares that hold 50 % and 99 %."""
    from matplotlib import colors, pyplot
    from matplotlib.patches import Rectangle

    rows = report["rows"]
    columns = min(len(rows), 5)
    lines = -(-len(rows) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(2.55 * columns + 0.9, 3.0 * lines + 0.3), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(rows) :]:
        axis.remove()
    every = sorted(max(value, 1e-6) for row in rows for line in row["map"] for value in line)
    scale = colors.LogNorm(10 ** math.floor(math.log10(every[len(every) // 100])), 1, clip=True)
    shown = None
    for axis, row in zip(axes.flat, rows, strict=False):
        side, (y, x) = row["pixels"], row["centre"]
        shown = axis.imshow(row["map"], norm=scale, cmap="magma", extent=(0, side, side, 0), interpolation="nearest")
        for share, line in (("50%", "-"), ("99%", ":")):
            half = _half_side(row["area"][share], side, (y, x))
            style: dict[str, Any] = {"fill": False, "edgecolor": "white", "linestyle": line, "linewidth": 1.1}
            axis.add_patch(Rectangle((x - half, y - half), 2 * half, 2 * half, **style))
        axis.set(xticks=[], yticks=[], xlim=(0, side), ylim=(side, 0))
        axis.set_title(row["model"], fontsize=9)
        held = "  ".join(f"{share} in {row['area'][share]:.1%}" for share in ("50%", "99%"))
        axis.set_xlabel(f"{held}\nmean distance {row['radius']:.2f} px", fontsize=8)
        axis.spines[["left", "bottom"]].set_visible(False)
    assert shown is not None
    figure.colorbar(shown, ax=list(axes.flat[: len(rows)]), label="mean |gradient|, largest = 1", shrink=0.8, pad=0.015)
    figure.suptitle(
        f"effective receptive field of the centre of {_stage(report['stage'])}, {report['images']} images of "
        f"{report['data']};\n"
        "solid: the square that holds 50 %, dotted: 99 %, below: their share of the area; "
        f"{tool.where(report)}", fontsize=8, color="#555555",
    )  # fmt: skip
    return figure


def _stage(number: int) -> str:
    return "the last stage" if number == -1 else f"stage {number}"


def _half_side(area: float, side: int, centre: tuple[float, float]) -> float:
    """Half the side of the square around ``centre`` that, cut at the border, has this share of the area."""
    low, high = 0.0, float(side)
    for _ in range(40):
        half = (low + high) / 2
        y, x = (min(c + half, side) - max(c - half, 0) for c in centre)
        low, high = (low, half) if y * x >= area * side * side else (half, high)
    return high


def make_parser() -> tool.Parser:
    parser = tool.Parser(__doc__)
    parser.add_argument(
        "sources", nargs="*", metavar="SOURCE", help="a run folder, or NAME=FILE: a model and its weights"
    )
    parser.add_argument("--images", type=tool.at_least(1), default=256, help="test images (default: 256)")
    parser.add_argument("--stage", type=int, default=-1, help="whose output is looked at (default: -1, the last)")
    parser.add_argument(
        "--data", nargs="+", metavar="KEY=VALUE", help="test images of another set, as a recipe's data:"
    )
    parser.add_argument("--labels", nargs="+", help="a name for each NAME=FILE (default: its NAME)")
    parser.add_argument("--device", help="cpu or cuda (default: the GPU if there is one)")
    return parser


def from_arguments(given: argparse.Namespace, _: Callable[[tool.Report], None]) -> tool.Report:
    if not given.sources:
        raise ValueError("name a run folder, or NAME=FILE")
    more = {"images": given.images, "stage": given.stage, "said": given.data, "labels": given.labels}
    return measure(given.sources, clock.get_device(given.device), **more)


if __name__ == "__main__":
    sys.exit(tool.main(make_parser(), from_arguments, draw))
