"""Examines a recipe before hours are spent on it: teachers, terms, hooks, compilation, time and memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from .. import runs
from ..config import ConfigError
from ..data import with_targets
from ..distiller import Distiller
from ..engine import engine, let_go, settle
from ..plan import Plan
from ..recipe import Recipe
from ..recipe.weights import Convert, inherit
from ..training import runfolder
from ..training.compiling import RECORDED, resolve
from .balance import Weighed, weigh
from .cost import Cost, estimate
from .graph import Compiled, try_compile
from .teachers import Examined, examine

__all__ = ["Compiled", "Cost", "Diagnosis", "Examined", "Weighed", "as_assignments", "doctor"]


@dataclass(frozen=True)
class Diagnosis:
    """What was found; nothing was written and nothing trained for good."""

    plan: Plan
    """Every pair; its taps fired in a dry run, and again in training mode."""
    teachers: list[Examined]
    terms: list[Weighed]
    compiled: Compiled | None
    cost: Cost
    warnings: list[str]
    """What should be looked at before the run starts."""


def doctor(
    recipe: Recipe,
    accelerator: Accelerator | None = None,
    convert: Convert | None = None,
    *,
    batches: int = 4,
    images: int = 512,
    expect: Mapping[str, float] | None = None,
    backend: str | None = "aot_eager",
) -> Diagnosis:
    """Builds the run as it would be made, and looks at it.

    Teachers that the run would train first are used as they are, untrained, unless their own run is finished.

    Args:
        accelerator: of one process; by default as a run starts it.
        convert: as for ``runs.run``.
        batches: over so many the terms are weighed, and so many steps are timed.
        images: on so many test images teachers are measured.
        expect: teacher to the top-1 in percent that its source claims for it; finished runs are known.
        backend: of ``torch.compile``, or None to leave compilation out.

    Raises:
        ConfigError: whatever a run of this recipe would refuse.
        ValueError: ``expect`` names no teacher of the recipe.
    """
    accelerator = accelerator or runs.start(recipe)
    recipe, taken = _beside_what_is_there(recipe)
    ready = runs.get_ready(recipe, accelerator, convert)
    teachers = examine(ready, accelerator, images, expect)
    if recipe.student.init is not None:
        inherit(ready.student, ready.panel[recipe.student.init])
    set_seed(recipe.seed)
    device = accelerator.device
    distiller, teacher = engine(ready, device, settle(ready, accelerator))
    try:
        given = list(_batches(ready, distiller, batches))
        weighed = weigh(distiller, teacher, given, accelerator)
        also = recipe.compile.teacher
        compiled = None if backend is None else try_compile(distiller, teacher, given[0], accelerator, backend, also)
        cost = estimate(ready, distiller, teacher, accelerator, batches)
    finally:
        let_go(distiller, teacher)
    warnings = [*taken, *_warnings(teachers, weighed)]
    mode = resolve(recipe.compile.mode, device)
    if compiled is not None and compiled.error and RECORDED.get(mode or "", mode) is not None:
        warnings.append(
            f"compile.mode is {recipe.compile.mode}, but not all compiles whole; what does not will run as it is"
        )
    return Diagnosis(ready.plan, teachers, weighed, compiled, cost, warnings)


def _beside_what_is_there(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe with a folder that is free, since nothing is written, and why a run would refuse its own."""
    try:
        runfolder.check_free(recipe)
    except ConfigError as error:
        free = recipe.output.with_name(f"{recipe.output.name} examined")
        return recipe.model_copy(update={"output": free}), [f"a run would be refused: {line}" for line in error.lines]
    return recipe, []


def _batches(ready: runs.Ready, distiller: Distiller, count: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """The first training batches of a run, and those of later epochs where one has not enough."""
    reads, epoch = [key for term in distiller.terms for key in term.targets], 0
    while count > 0:
        for batch in with_targets(ready.data.train, reads, epoch):
            yield batch
            count -= 1
            if count == 0:
                return
        epoch += 1


def _warnings(teachers: list[Examined], terms: list[Weighed]) -> Iterator[str]:
    for one in teachers:
        if one.top1 is None:
            continue
        if not one.trained:
            yield f"teacher {one.name} is not trained yet ({one.source}); its terms say little before it is"
        elif one.short:
            yield (
                f"teacher {one.name} is right on {one.top1:.1f} %, expected are {one.expected:.2f} (± {one.margin:.1f} "
                f"on {one.images:,} images): are its images prepared as for its training (teachers.{one.name}.mean, "
                ".std, .size, data.crop_pct), and are the classes in its order?"
            )
        elif one.by_chance:
            why = "as its own run found; it has little to teach"
            if one.expected is None:
                why = "its weights, classes or images are not those of its training (teachers.NAME.mean, .std, .size)"
            yield f"teacher {one.name} is right on {one.top1:.1f} %, by chance it would be on {one.chance:.1f} %: {why}"
    for term in terms:
        if term.gradient == 0:
            yield f"term {term.name} does not move the student at all: its gradient is zero"
        elif term.share > 0.95 and len(terms) > 1:
            yield f"term {term.name} has {term.share:.0%} of the gradient; the others hardly count"
        elif term.share < 0.01:
            yield f"term {term.name} has {term.share:.2%} of the gradient; it hardly counts"


def as_assignments(terms: list[Weighed]) -> str:
    """The proposed weights as a command line says them."""
    return " ".join(f"terms.{t.name}.weight={t.proposal:g}" for t in terms if t.proposal not in (None, t.weight))
