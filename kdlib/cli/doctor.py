"""Examines a config before hours are spent on it. Nothing is trained for good, nothing is written.

  kdlib doctor recipes/riformer/configs/default.yaml --import recipes.riformer.run
  kdlib doctor my.yaml epochs=30 terms.soft.weight=2 --compile inductor

It tells what each teacher reaches on test images as this run prepares them, beside what it should (--expect wide=82.9,
or its own finished run), what each term weighs (value, gradient norm
at the student, share of it, cosine with the gradient of the labels) with a proposal that balances the gradient norms,
whether a step compiles whole, and how much time and memory the run and those before it will take.

From Python: kdlib.doctor.doctor(recipe), where recipe is kdlib.recipe.load(kdlib.launch.read_config(["my.yaml"])).
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..doctor import Cost, Diagnosis


def arguments(parser: ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", nargs="+", help="config files and key=value, as for run.py")
    parser.add_argument("--batches", type=int, default=4, metavar="N", help="batches to look at (default: 4)")
    parser.add_argument("--images", type=int, default=512, metavar="N", help="test images for teachers (default: 512)")
    parser.add_argument(
        "--expect",
        action="append",
        default=[],
        metavar="TEACHER=TOP1",
        help="the top-1 in percent that a teacher's source claims; what its own finished run reached is known",
    )
    parser.add_argument(
        "--compile",
        choices=("aot_eager", "inductor", "off"),
        default="aot_eager",
        help="how to try (default: aot_eager)",
    )


def run(options: Namespace) -> None:
    from ..config import ConfigError
    from ..doctor import doctor
    from ..launch import read_config, with_origin
    from ..models import IMPORT_HINT
    from ..recipe import load
    from . import of_imports

    if options.batches < 1 or options.images < 1:
        raise ValueError("--batches and --images are at least 1")
    document = read_config(options.config)
    try:
        found = doctor(
            load(document),
            convert=of_imports(options, "convert"),
            batches=options.batches,
            images=options.images,
            expect=dict(map(_claim, options.expect)),
            backend=None if options.compile == "off" else options.compile,
        )
    except ConfigError as error:
        lines = with_origin(error.lines, document)
        raise ConfigError(f"{line}{IMPORT_HINT if ': no model ' in line else ''}" for line in lines) from error
    _show(found)


def _claim(text: str) -> tuple[str, float]:
    """``wide=82.9`` taken apart."""
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise ValueError(f"--expect {text}: write TEACHER=TOP1, a top-1 in percent, as in wide=82.9") from None


def _show(found: Diagnosis) -> None:
    from ..doctor import as_assignments
    from ..progress import say
    from .show import show_table

    if found.teachers:
        head = ("teacher", "model", "weights", "top-1 %", "expected", "on", "its images")
        rows = [
            (
                t.name,
                t.model,
                t.source,
                "other classes" if t.top1 is None else f"{t.top1:.2f}",
                "-" if t.expected is None else f"{t.expected:.2f}",
                f"{t.images:,}",
                t.bridge,
            )
            for t in found.teachers
        ]
        show_table(head, rows, right=("top-1 %", "expected", "on"))
        say("")
    columns = ("term", "weight", "value", "gradient", "share", "cosine", "balanced")
    show_table(
        columns,
        [
            (t.name, f"{t.weight:g}", f"{t.value:.4g}", f"{t.gradient:.3g}", f"{t.share:.1%}", f"{t.cosine:+.2f}",
             "-" if t.proposal is None else f"{t.proposal:g}")
            for t in found.terms
        ],
        right=columns[1:],
    )  # fmt: skip
    say("gradient: its norm at the student before the weight; cosine: with the gradient of the labels")
    if proposed := as_assignments(found.terms):
        say(f"equal pull for all, as a start: {proposed}")
    taps = {row.student for row in found.plan.rows} | {f"teacher {row.teacher}" for row in found.plan.rows}
    say(f"\nhooks: {len(taps)} taps in {len(found.plan.rows)} pairs, each fired once a pass")
    if found.compiled is not None:
        how = found.compiled.error or "all that a run compiles is one graph each"
        say(f"compile ({found.compiled.backend}, {found.compiled.seconds:.1f} s): {how}")
    say("")
    _costs(found.cost)
    for warning in found.warnings:
        say(f"! {warning}")


def _costs(cost: Cost) -> None:
    from ..progress import say
    from .show import show_table

    rows, children = [], [*cost.children]
    every = [cost]
    while children:
        child = children.pop(0)
        every.append(child)
        children += child.children
    for one in reversed(every):
        for phase in one.phases:
            epochs = f"{phase.first}-{phase.last}" if phase.last > phase.first else f"{phase.first}"
            rows.append(
                (one.title, epochs, f"{phase.step * 1e3:,.1f}", f"{one.steps:,}", ", ".join(phase.terms) or "none")
            )
    show_table(("run", "epochs", "ms a step", "steps an epoch", "terms"), rows, right=("ms a step", "steps an epoch"))
    parts = "; ".join(f"{one.title} {_duration(one.own)}" for one in reversed(every)) if len(every) > 1 else ""
    say(f"all of it: {_duration(cost.seconds)}{f' ({parts})' if parts else ''}, uncompiled, evaluations included")
    whose = "of this whole process" if cost.on_cpu else "on the GPU"
    say(f"peak memory: {max(one.memory for one in every) / 2**20:,.0f} MiB {whose}")


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
