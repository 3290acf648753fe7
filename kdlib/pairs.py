"""Which layer of a teacher answers to which layer of a student, as their features say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from .cka import cka_matrix
from .pairing import Pair
from .taps import Taps, in_eval


def blocks(model: nn.Module) -> list[str]:
    """The taps of the model's blocks: what stands in a sequence, consists of parts, and holds no such thing itself.

    Where a model has no sequences (or dictionaries) of modules, its direct children that consist of parts.
    """
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            found += [f"{name}.{n}".lstrip(".") for n, child in module.named_children() if _parts(child)]
    innermost = [tap for tap in found if not any(other.startswith(f"{tap}.") for other in found)]
    return innermost or [name for name, child in model.named_children() if _parts(child)]


def _parts(module: nn.Module) -> bool:
    """Whether it holds modules that are trained."""
    return any(True for child in module.children() for _ in child.parameters())


@torch.no_grad()
def called(model: nn.Module, images: Tensor, taps: Sequence[str]) -> list[str]:
    """Those of the taps whose modules the model calls in eval mode; heads for training alone are none."""
    seen: set[str] = set()

    def note(tap: str, *_: object) -> None:
        seen.add(tap)

    modules = {tap: model.get_submodule(tap.removesuffix(":input")) for tap in taps}
    handles = [module.register_forward_hook(partial(note, tap)) for tap, module in modules.items()]
    try:
        with in_eval(model):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return [tap for tap in taps if tap in seen]


def alike(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    student_taps: Sequence[str],
    teacher_taps: Sequence[str],
) -> Tensor:
    """CKA of every student tap with every teacher tap, ``(student taps, teacher taps)``, float64.

    Args:
        batches: the same images as each of both models takes them, at least four a batch.

    Raises:
        ValueError: a tap that does not exist, or too few images.
        RuntimeError: a tap that never fires, fires twice or gives no tensor.
    """
    return cka_matrix((_features(student, a, student_taps), _features(teacher, b, teacher_taps)) for a, b in batches)


@torch.no_grad()
def _features(model: nn.Module, images: Tensor, names: Sequence[str]) -> list[Tensor]:
    taps = Taps(model, names)
    try:
        with in_eval(model):
            _, seen = taps.watch(model, images)
    finally:
        taps.remove()
    return [seen[name] for name in names]


def suggest(likeness: Tensor) -> list[tuple[int, int]]:
    """The pairs (row, column) with the largest sum, such that the deeper student layer has the deeper teacher layer.

    As many pairs as the shorter side has layers, each layer in one pair at most. NaN counts as 0.
    """
    values = likeness.nan_to_num().tolist()
    rows, columns = likeness.shape
    if rows > columns:
        return [(i, j) for j, i in suggest(likeness.T)]
    best = [[0.0] * (columns + 1)]
    for i in range(rows):  # best[i][j]: rows before i placed among columns before j
        best.append([float("-inf")] * (columns + 1))
        for j in range(i + 1, columns + 1):
            best[i + 1][j] = max(best[i + 1][j - 1], best[i][j - 1] + values[i][j - 1])
    pairs, j = [], columns
    for i in reversed(range(rows)):
        while j > i + 1 and best[i + 1][j - 1] >= best[i + 1][j]:
            j -= 1
        j -= 1
        pairs.append((i, j))
    return pairs[::-1]


def as_yaml(pairs: Sequence[Pair], teacher: str = "teacher", layout: Sequence[str] = ()) -> str:
    """The pairs as a term of a recipe; ``teacher`` is its name there, ``layout`` is of student and teacher."""
    mine = ", ".join(pair.student for pair in pairs)
    theirs = ", ".join(f"{teacher}.{pair.teacher}" for pair in pairs)
    return (
        "terms:\n  alike:\n    loss: feature_mse\n    adapter: linear    # where the shapes of a pair differ\n"
        f"    student: [{mine}]\n    teacher: [{theirs}]" + (f"\n    layout: [{', '.join(layout)}]" if layout else "")
    )


def draw(
    likeness: Tensor,
    student_taps: Sequence[str],
    teacher_taps: Sequence[str],
    chosen: Iterable[tuple[int, int]],
    path: Path,
) -> None:
    """The matrix as a heat map in a PNG, the chosen pairs framed."""
    from matplotlib.figure import Figure  # here, since importing it takes long; no pyplot, whose backend is global
    from matplotlib.patches import Rectangle

    rows, columns = likeness.shape
    size = (2.6 + 0.34 * columns, 2.2 + 0.34 * rows)
    figure = Figure(figsize=(max(size[0], 5.0), max(size[1], 4.0)), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(likeness.clamp(0, 1).numpy(), vmin=0, vmax=1, cmap="magma", origin="lower")
    for i, j in chosen:
        axis.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, clip_on=False, edgecolor="#2ec4b6", linewidth=2))
    axis.set_xticks(range(columns), teacher_taps, rotation=90, fontsize=8)
    axis.set_yticks(range(rows), student_taps, fontsize=8)
    axis.set(xlabel="teacher", ylabel="student", title="CKA (framed: suggested pairs)")
    if rows * columns <= 400:
        for i in range(rows):
            for j in range(columns):
                value = float(likeness[i, j])
                axis.text(j, i, f"{value:.2f}"[1:] if 0 <= value < 0.995 else f"{value:.1f}", ha="center", va="center",
                          fontsize=6, color="black" if value > 0.6 else "white")  # fmt: skip
    figure.colorbar(image, ax=axis, fraction=0.03, pad=0.02, aspect=12)
    figure.savefig(path, dpi=140)
