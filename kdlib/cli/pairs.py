"""Shows which layer of a teacher answers to which layer of a student.

  kdlib pairs resnet18 resnet34 --pattern 'layer4.*'                    the plan of a pattern
  kdlib pairs STUDENT TEACHER --images photos/ --out alike.png          which layers are alike, and pairs to paste

With --pattern: the plan as a run would make it (pairs, layouts, shapes, adapters). With images, or without a pattern:
the linear CKA of all blocks with all blocks as a heat map, the pairs in order of depth with the largest sum of it,
their plan, and the lines for a config. Untrained models show what their wiring alone makes alike: ask with trained
weights, e.g. '{name: resnet34, pretrained: true}'.

From Python: kdlib.pair, kdlib.fit, kdlib.pairs.alike, kdlib.pairs.suggest.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from .options import IMAGE_SIZE, MODEL

if TYPE_CHECKING:
    from torch import Tensor

    from ..models import Found
    from ..pairing import Pair


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("student", metavar="STUDENT", help=MODEL)
    parser.add_argument("teacher", metavar="TEACHER", help="likewise")
    parser.add_argument("--pattern", metavar="P", help="pair what it finds, block by block; also limits the heat map")
    parser.add_argument("--teacher-pattern", metavar="P", help="the teacher's, where it differs")
    parser.add_argument(
        "--view", choices=("tokens", "map", "embedding"), default="tokens", help="how features are read"
    )
    parser.add_argument(
        "--layout", nargs=2, default=(), metavar=("STUDENT", "TEACHER"),
        help="NCHW, NHWC, NLC or NLC+k of either's features, where their shapes leave it open",
    )  # fmt: skip
    images = parser.add_mutually_exclusive_group()
    images.add_argument(
        "--images", metavar="FOLDER", type=Path, help="a folder with image files, to compare features on"
    )
    images.add_argument(
        "--data", metavar="NAME", help="or a data set of kdlib (default: fashion-mnist-5k, in the package)"
    )
    parser.add_argument("--count", type=int, default=256, metavar="N", help="of how many images (default: 256)")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help=IMAGE_SIZE)
    parser.add_argument("--out", type=Path, default=Path("pairs.png"), metavar="PNG", help="the heat map (pairs.png)")


def run(options: Namespace) -> None:
    from ..models import find_model
    from ..pairing import pair
    from ..progress import say

    student, teacher = (find_model(name, options.image_size) for name in (options.student, options.teacher))
    if options.pattern:
        pairs = pair(student.model, teacher.model, options.pattern, options.teacher_pattern)
        say(_plan(student, teacher, pairs, options))
    if options.images or options.data or not options.pattern:
        _compare(student, teacher, options)


def _plan(student: Found, teacher: Found, pairs: tuple[Pair, ...], options: Namespace) -> str:
    """The plan of these pairs under one term; a teacher of other images gets images of its own size."""
    from ..adapters import Renormalize
    from ..losses import FeatureMSE
    from ..sizing import fit
    from ..terms import Term

    bridge = None
    if student.shape != teacher.shape and student.shape[0] == teacher.shape[0]:
        bridge = Renormalize(student.mean, student.std, teacher.mean, teacher.std, (teacher.shape[1], teacher.shape[2]))
    layout = tuple(options.layout) or None
    term = Term("pairs", FeatureMSE(), pairs=pairs, adapter="linear", view=options.view, layout=layout)
    try:
        return str(fit([term], student.model, teacher.model, student.noise(2), prepare=bridge))
    except ValueError as error:  # here it is said by an option
        told, open_, _ = str(error).partition("; say layout")
        raise ValueError(f"{told}; say which of STUDENT and TEACHER by --layout" if open_ else told) from error


def _compare(student: Found, teacher: Found, options: Namespace) -> None:
    from ..cka import LEAST
    from ..pairing import Pair, find
    from ..pairs import alike, as_yaml, blocks, called, draw, suggest
    from ..progress import say
    from .show import show_table

    if options.count < LEAST:
        raise ValueError(f"--count: CKA needs at least {LEAST} images, got {options.count}")
    taps = [
        find(found.model, pattern) if pattern else blocks(found.model)
        for found, pattern in ((student, options.pattern), (teacher, options.teacher_pattern or options.pattern))
    ]
    for found, names in zip((student, teacher), taps, strict=True):
        reached = called(found.model, found.noise(1), names)
        if silent := [name for name in names if name not in reached]:
            say(f"! {found.name} does not call {', '.join(silent)} in eval mode; left out")
        names[:] = reached
        if not names:
            raise ValueError(
                f"{found.name}: no blocks found; say which with --pattern (kdlib inspect lists its modules)"
            )
    if not options.out.absolute().parent.is_dir():
        raise ValueError(f"--out: no folder {options.out.absolute().parent}")
    if options.images and not Path(options.images).is_dir():
        raise ValueError(f"--images: no folder {options.images}")
    source = options.images or options.data or "fashion-mnist-5k"
    likeness = alike(student.model, teacher.model, _batches(student, teacher, source, options.count), taps[0], taps[1])
    chosen = suggest(likeness)
    draw(likeness, taps[0], taps[1], chosen, options.out)
    pairs = tuple(Pair(taps[0][i], taps[1][j]) for i, j in chosen)
    say(
        f"\nCKA over {options.count} images of {source}: {len(taps[0])} × {len(taps[1])} layers, drawn in {options.out}"
    )
    rows = [(p.student, p.teacher, f"{likeness[i, j]:.3f}") for p, (i, j) in zip(pairs, chosen, strict=True)]
    show_table(("student", "teacher", "CKA"), rows, right=("CKA",))
    if untrained := list(dict.fromkeys(found.name for found in (student, teacher) if found.trained is False)):
        say(f"! random weights: {', '.join(untrained)}; this shows what the wiring alone makes alike")
    say(f'\n{_plan(student, teacher, pairs, options)}\n\n# to paste; "teacher" is its name in the recipe')
    say(as_yaml(pairs, layout=options.layout))


def _batches(student: Found, teacher: Found, source: Path | str, count: int) -> list[tuple[Tensor, Tensor]]:
    """The same images for both, in batches of nearly one size: of 32 or more, where there are as many."""
    from ..data.few import few_images

    sizes = {found.shape[1]: few_images(source, count, found.shape[1]) for found in (student, teacher)}
    images = (found.prepared(sizes[found.shape[1]]) for found in (student, teacher))
    ours, theirs = (batch.tensor_split(max(1, count // 32)) for batch in images)  # chunk leaves 2 of 1025 to the last
    return list(zip(ours, theirs, strict=True))
