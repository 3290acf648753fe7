"""Where a ViT's time goes: latency of its blocks as operations are added one by one (RIFormer, CVPR 2023, Fig. 1).

python recipes/riformer/measure/latency.py --out vit_latency.json                      the paper's batch, on a GPU
python recipes/riformer/measure/latency.py --size tiny --depth 2 --pixels 64 --batch 2 --runs 5     seconds on a CPU
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # so that this file can be started as a script

from recipes.riformer.fusion import Mlp
from recipes.riformer.measure import clock, tool

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STEPS = ("embedding", "norm 1", "token mixer", "shortcut 1", "norm 2", "channel MLP", "shortcut 2")
PAPER = (81.57, 232.42, 1666.01, 1725.61, 1874.02, 3070.33, 3096.26)
"""Cumulative milliseconds in Fig. 1: ViT-B, 12 layers, 2048 images of 224 px, one A100. Its precision and attention
kernel are not stated."""
SHADES = ("#bbbbbb", "#66ccee", "#ee6677", "#ccbb44", "#aaddee", "#4477aa", "#ddcc77")
"""One colour a step."""
ATTENTION = ("unfused", "fused")
SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12), "large": (1024, 16)}
"""Name to channels and heads."""
PATCH = 16


class Attention(nn.Module):
    """Multi-head self-attention on tokens (B, N, C): fused into one kernel, or softmax(q kᵀ / √d) v written out."""

    def __init__(self, dim: int, heads: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block cut off after its first ``steps`` operations; it owns no others."""

    def __init__(self, dim: int, heads: int, steps: int, fused: bool) -> None:
        super().__init__()
        self.steps = steps
        if steps >= 1:
            self.norm1 = nn.LayerNorm(dim)
        if steps >= 2:
            self.mixer = Attention(dim, heads, fused)
        if steps >= 4:
            self.norm2 = nn.LayerNorm(dim)
        if steps >= 5:
            self.mlp = Mlp(dim, 4 * dim, nn.Linear)

    def forward(self, x: Tensor) -> Tensor:
        kept, steps = x, self.steps
        if steps >= 1:
            x = self.norm1(x)
        if steps >= 2:
            x = self.mixer(x)
        if steps >= 3:
            x = kept = kept + x
        if steps >= 4:
            x = self.norm2(x)
        if steps >= 5:
            x = self.mlp(x)
        return kept + x if steps >= 6 else x


class PartialViT(nn.Module):
    """Images (B, 3, H, W) to tokens (B, N, C) by the operations of STEPS up to the number ``last``, in every block.

    16 px patches with a position embedding; no class token, pooling or classifier.
    """

    def __init__(self, last: int, size: str, depth: int, pixels: int, fused: bool) -> None:
        super().__init__()
        dim, heads = SIZES[size]
        self.patches = nn.Conv2d(3, dim, PATCH, PATCH)
        self.position = nn.Parameter(0.02 * torch.randn(1, (pixels // PATCH) ** 2, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, last, fused) for _ in range(depth if last else 0)))

    def forward(self, x: Tensor) -> Tensor:
        # tokens in their own order, as a class token's concatenation leaves them: the convolution's order would go down
        # the residual stream and make every sum of two layouts
        return self.blocks(self.patches(x).flatten(2).transpose(1, 2).contiguous() + self.position)


def measure(
    device: torch.device,
    *,
    size: str = "base",
    depth: int = 12,
    pixels: int = 224,
    batch: int = 2048,
    precision: str = "bf16",
    compiled: bool = False,
    runs: int = 30,
    repeats: int = 3,
    keep: Callable[[tool.Report], None] = lambda _: None,
) -> tool.Report:
    """The latency after each step, with both kinds of attention; ``keep`` is handed the report after each kind.

    The paper's protocol: the mean of ``runs`` passes, ``repeats`` times, of these the median.

    Raises:
        ValueError: an image that patches do not tile, or a batch that the device's memory does not hold.
    """
    if pixels < PATCH or pixels % PATCH:
        raise ValueError(f"--pixels {pixels}: patches of {PATCH} px must tile the image; give a multiple of {PATCH}")
    settings = {"size": size, "depth": depth, "pixels": pixels, "batch": batch, "precision": precision}
    protocol = {"compiled": compiled, "runs": runs, "repeats": repeats}
    report = clock.about(device, **settings, **protocol, steps=list(STEPS), paper_ms=list(PAPER), attention={})
    dtype = clock.set_precision(precision)
    images = torch.randn(batch, 3, pixels, pixels, device=device, dtype=dtype)
    print(f"{'':28}{'ms':>10} {'this step':>10} {'paper ms':>10}")
    for kind in ATTENTION:
        torch.compiler.reset()
        built = [PartialViT(last, size, depth, pixels, kind == "fused") for last in range(len(STEPS))]
        nets: list[Any] = [net.to(device, dtype).eval() for net in built]
        if compiled:
            nets = [torch.compile(net, fullgraph=True) for net in nets]
        try:
            for net in nets:
                clock.mean_milliseconds(net, images, clock.WARM_UP)
            # by turns, so that a machine that slows down slows every step
            rounds = [[clock.mean_milliseconds(net, images, runs) for net in nets] for _ in range(repeats)]
        except torch.OutOfMemoryError:
            raise ValueError(f"--batch {batch}: {kind} attention does not fit {report['device']}; halve it") from None
        taken = [statistics.median(times) for times in zip(*rounds, strict=True)]
        report["attention"][kind] = {"ms": taken} | shares(taken)
        keep(report)
        for number, (step, added) in enumerate(report["attention"][kind]["added_ms"].items()):
            print(f"{kind:8} + {step:17}{taken[number]:>10.2f} {added:>10.2f} {PAPER[number]:>10.2f}")
        found, theirs = report["attention"][kind]["share"]["token mixer"], shares(PAPER)["share"]["token mixer"]
        print(f"{kind:8} token mixer's share {found:>7.1%}   (paper {theirs:.1%})", flush=True)
    return report


def shares(cumulative: tuple[float, ...] | list[float]) -> dict[str, Any]:
    """Of cumulative times: what each step added, and as a share of the last one."""
    added = [now - before for now, before in zip(cumulative, [0.0, *cumulative], strict=False)]
    return {
        "added_ms": dict(zip(STEPS, added, strict=False)),
        "share": {step: ms / cumulative[-1] for step, ms in zip(STEPS, added, strict=False)},
    }


def draw(report: tool.Report) -> Figure:
    """Left: cumulative milliseconds, step by step. Right: each operation's share of the whole."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11.5, 4.4), layout="constrained", width_ratios=[1.15, 1])
    _draw_curves(left, report)
    _draw_shares(right, report)
    figure.suptitle(tool.where(report, "precision", "compiled"), fontsize=8, color="#555555")
    return figure


def _draw_curves(axis: Axes, report: tool.Report) -> None:
    end, paper = max(part["ms"][-1] for part in report["attention"].values()), report["paper_ms"]
    curves = {kind: (f"{kind} attention, here", part["ms"]) for kind, part in report["attention"].items()}
    # its card is slower by so much that beside it, as it is, the curves here would lie on the axis
    scaled = [end * ms / paper[-1] for ms in paper]
    curves["paper"] = f"paper, A100, scaled from {paper[-1]:,.0f} ms", scaled
    looks = {"unfused": (tool.COLOURS[0], "-", 4), "fused": (tool.COLOURS[2], "-", -10), "paper": ("#777777", "--", 4)}
    for kind, (label, ms) in curves.items():
        colour, line, shift = looks[kind]
        axis.step(range(len(ms)), ms, where="mid", color=colour, label=label, linestyle=line)
        axis.plot(range(len(ms)), ms, "o", color=colour, markersize=4)
        if kind != "paper":
            place = (len(ms) - 1, ms[-1])
            axis.annotate(f"{ms[-1]:,.0f}", place, (5, shift), textcoords="offset points", color=colour)
    axis.set_xticks(range(len(STEPS)), [STEPS[0], *(f"+ {step}" for step in STEPS[1:])], rotation=30, ha="right")
    axis.set(ylabel="ms a batch, cumulative", ylim=(0, None), xlim=(-0.5, len(STEPS) - 0.1))
    axis.set_title(f"ViT-{report['size']}, {report['depth']} layers, {report['batch']} images of {report['pixels']} px")
    axis.legend(loc="upper left")
    axis.grid(axis="y", alpha=0.25)


def _draw_shares(axis: Axes, report: tool.Report) -> None:
    bars = {"paper, A100": report["paper_ms"]}
    bars |= {f"{kind}, here": part["ms"] for kind, part in report["attention"].items()}
    for place, ms in enumerate(bars.values()):
        start = 0.0
        for (step, share), colour in zip(shares(ms)["share"].items(), SHADES, strict=True):
            width = max(share, 0.0)  # a difference of two times can fall below zero by noise
            axis.barh(place, width, left=start, color=colour, edgecolor="white", label=None if place else step)
            if width > 0.055 and start + width / 2 < 1:
                axis.text(start + width / 2, place, f"{share:.0%}", ha="center", va="center", fontsize=8)
            start += width
    axis.set_yticks(range(len(bars)), [f"{label}\n({ms[-1]:,.0f} ms)" for label, ms in bars.items()])
    axis.invert_yaxis()
    axis.set(xlim=(0, 1), title="share of the time")
    axis.xaxis.set_major_formatter("{x:.0%}")
    axis.spines["left"].set_visible(False)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=4, fontsize=8)


def make_parser() -> tool.Parser:
    parser = tool.Parser(__doc__)
    parser.add_argument("--size", choices=SIZES, default="base", help="of the ViT (default: base)")
    parser.add_argument("--depth", type=tool.at_least(1), default=12, help="layers (default: 12)")
    parser.add_argument("--pixels", type=tool.at_least(1), default=224, help="side of the images (default: 224)")
    parser.add_argument("--batch", type=tool.at_least(1), help="images (default: 2048 on a GPU, 8 on a CPU)")
    parser.add_argument("--dtype", choices=clock.PRECISIONS, help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--compile", action="store_true", help="torch.compile each step's model")
    parser.add_argument("--device", help="cpu or cuda (default: the GPU if there is one)")
    parser.add_argument("--runs", type=tool.at_least(1), default=30, help="passes per mean (default: 30)")
    parser.add_argument("--repeats", type=tool.at_least(1), default=3, help="means per median (default: 3)")
    return parser


def from_arguments(given: argparse.Namespace, keep: Callable[[tool.Report], None]) -> tool.Report:
    device = clock.get_device(given.device)
    on_gpu = device.type == "cuda"
    return measure(
        device,
        size=given.size,
        depth=given.depth,
        pixels=given.pixels,
        batch=given.batch or (2048 if on_gpu else 8),
        precision=given.dtype or ("bf16" if on_gpu else "fp32"),
        compiled=given.compile,
        runs=given.runs,
        repeats=given.repeats,
        keep=keep,
    )


if __name__ == "__main__":
    sys.exit(tool.main(make_parser(), from_arguments, draw))
