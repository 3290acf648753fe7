"""From measured rows to each model's best, the ratios between models, and how both are shown beside the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from recipes.riformer.measure import contestants, tool
from recipes.riformer.measure.contestants import PAPER

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def best_of(rows: Sequence[tool.Report]) -> list[tool.Report]:
    """Each model's fastest row, with the paper's number and what share of it that is."""
    best: dict[str, tool.Report] = {}
    for row in rows:
        if row.get("images_per_second", 0.0) > best.get(row["model"], {}).get("images_per_second", 0.0):
            best[row["model"]] = row
    found = []
    for name, row in best.items():
        kept = {key: row[key] for key in ("model", "form", "setting", "images_per_second")}
        paper = PAPER.get(name) if row["pixels"] == 224 else None
        found.append(kept | {"paper": paper, "share_of_paper": paper and row["images_per_second"] / paper})
    return found


def ratios(best: Sequence[tool.Report]) -> list[tool.Report]:
    """RIFormer's images per second over those of PoolFormer of its size and of GFNet-H-B, here and in the paper."""
    here = {row["model"]: row["images_per_second"] for row in best}
    found = []
    for name in here:
        for rival in contestants.rivals(name):
            if rival not in here:
                continue
            ratio = here[name] / here[rival]
            theirs = PAPER[name] / PAPER[rival] if name in PAPER and rival in PAPER else None
            goal = contestants.GOALS.get((name, rival))
            row = {"model": name, "against": rival, "ratio": ratio, "paper": theirs}
            found.append(
                row | {"share_of_paper": theirs and ratio / theirs, "goal": goal, "reached": goal and ratio >= goal}
            )
    return found


def show(report: tool.Report) -> str:
    """The two tables of a report, as Markdown."""
    lines = [
        "",
        "| model | form | setting | images/s | paper, A100 | share of the paper |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["best"]:
        theirs = [f"{row['paper']:,.0f}", f"{row['share_of_paper']:.2f} x"] if row["paper"] else ["-", "-"]
        parts = [row["model"], row["form"], row["setting"], f"{row['images_per_second']:,.0f}", *theirs]
        lines.append(f"| {' | '.join(parts)} |")
    lines += ["", "| ratio | here | paper | share of the paper | goal |", "|---|---|---|---|---|"]
    for row in report["ratios"]:
        theirs = [f"{row['paper']:.2f}", f"{row['share_of_paper']:.2f} x"] if row["paper"] else ["-", "-"]
        goal = f"{row['goal']} {'reached' if row['reached'] else 'missed'}" if row["goal"] else "-"
        parts = [f"{row['model']} / {row['against']}", f"{row['ratio']:.2f}", *theirs, goal]
        lines.append(f"| {' | '.join(parts)} |")
    return "\n".join(lines)


def _by_size(row: tool.Report) -> tuple[bool, int, str]:
    """RIFormer beside its PoolFormer, in the order of the paper's table, and all others last."""
    head, _, size = row["model"].rpartition("_")
    sizes = [name.rpartition("_")[2] for name in PAPER if name.startswith("riformer_")]
    here = size in sizes and not head.startswith("gfnet")
    return not here, sizes.index(size) if here else 0, "" if head == "riformer" else row["model"]


def draw(report: tool.Report) -> Figure:
    """Left: images per second at each model's best setting. Right: the ratios, with the paper's and the goals."""
    from matplotlib import pyplot

    best, pairs = sorted(report["best"], key=_by_size), report["ratios"]
    if not best:
        raise ValueError("no setting of any model ran, so there is nothing to draw; the JSON's rows say why")
    height = 1.6 + 0.42 * max(len(best), len(pairs))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11.5, height), layout="constrained", width_ratios=[1.25, 1])
    colours = dict(zip(contestants.FORMS, tool.COLOURS, strict=False))
    for place, row in enumerate(best):
        speed = row["images_per_second"]
        left.barh(place, speed, color=colours.get(contestants.family(row["model"]), tool.COLOURS[-1]))
        said = f" {speed:,.0f}  {row['form']}, {row['setting'].replace('-', ' ')}"
        left.text(speed, place, said, va="center", fontsize=7.5)
        if row["paper"]:
            left.plot([row["paper"]] * 2, [place - 0.4, place + 0.4], color="black", linewidth=1.5)
    left.set_yticks(range(len(best)), [row["model"] for row in best])
    left.set_ylim(len(best) - 0.5, -0.5)
    left.set(xlim=(0, 1.75 * max(row["images_per_second"] for row in best)), title="images/s (black: paper, A100)")
    for place, row in enumerate(pairs):
        colour = "#777777" if row["goal"] is None else tool.COLOURS[2] if row["reached"] else tool.COLOURS[1]
        right.barh(place, row["ratio"], color=colour)
        goal = f", goal {row['goal']}" if row["goal"] else ""
        right.text(row["ratio"], place, f" {row['ratio']:.2f}{goal}", va="center", fontsize=8)
        if row["paper"]:
            right.plot([row["paper"]] * 2, [place - 0.4, place + 0.4], color="black", linewidth=1.5)
    right.set_yticks(range(len(pairs)), [f"{row['model']} /\n{row['against']}" for row in pairs], fontsize=7.5)
    right.set_ylim(max(len(pairs), 1) - 0.5, -0.5)
    right.axvline(1, color="#999999", linewidth=0.8)
    right.set(
        xlim=(0, 1.35 * max((row["ratio"] for row in pairs), default=1)),
        title="ratios (black: paper; green, red: goal reached, missed)",
    )
    figure.suptitle(tool.where(report, "batch"), fontsize=8, color="#555555")
    return figure
