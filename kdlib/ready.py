"""Everything that a run and its children need, built and checked before the first of them is made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from accelerate.utils import set_seed
from torch import Tensor

from .adapters import Renormalize
from .config import ConfigError
from .data import Data
from .plan import Plan
from .recipe import Recipe, build, load_children, probe, weights
from .recipe import schema as recipes
from .sizing import fit
from .teacher import Panel
from .training import runfolder, tracking


@dataclass
class Ready:
    """A run of which everything was checked and nothing was made yet."""

    recipe: Recipe
    title: str
    data: Data
    images: Tensor
    """Two training images, for dry runs."""
    student: torch.nn.Module
    panel: Panel
    prepare: dict[str, Renormalize]
    plan: Plan
    teachers: dict[str, Ready] = field(default_factory=dict)
    """The runs that train teachers which have no weights yet."""
    baseline: Ready | None = None

    def images_of(self, teacher: str) -> str:
        """How a teacher's images differ from the student's, in words."""
        bridge = self.prepare.get(teacher)
        if bridge is None:
            return "as the student's"
        size = "" if bridge.size is None else f"{self.data.image_size} → {bridge.size[0]} px"
        anew = ""
        if bridge.anew:
            stats = build.expects(self.recipe, teacher, self.panel, self.data)[:2]
            mean, std = (", ".join(f"{value:.4g}" for value in values) for values in stats)
            anew = f"normalised anew: mean ({mean}), std ({std})"
        return ", ".join(filter(None, (anew, size)))


class Seat(Protocol):
    """What checking a run must know of an ``Accelerator``."""

    @property
    def device(self) -> torch.device: ...
    @property
    def process_index(self) -> int: ...
    @property
    def num_processes(self) -> int: ...


def get_ready(
    recipe: Recipe,
    accelerator: Seat,
    convert: weights.Convert | None = None,
    title: str = "student",
    parent: Ready | None = None,
) -> Ready:
    """Builds and checks everything that a run and its children need; writes nothing.

    Args:
        accelerator: on the meta device nothing has values: neither data nor files of weights need be there.
        parent: the run that needs this one; its data are shared where they are the same.

    Raises:
        ConfigError: as ``run``.
    """
    runfolder.check_free(recipe)
    try:
        tracking.choose(recipe.trackers)
    except ValueError as error:
        raise ConfigError([f"trackers: {error}"]) from None
    if parent is not None and (parent.recipe.data, parent.recipe.seed) == (recipe.data, recipe.seed):
        data, images = parent.data, parent.images
    else:
        data = build.open_data(recipe, accelerator.device, accelerator.process_index, accelerator.num_processes)
        images = _first_images(data, accelerator.device)
    if recipe.accumulate > len(data.train):
        raise ConfigError([f"accumulate: an epoch has {len(data.train)} batches (got {recipe.accumulate}); lower it"])
    set_seed(recipe.seed)
    with torch.device(images.device):
        ready = _build(recipe, title, data, images, convert)
    for at, child in load_children(recipe).items():
        child = runfolder.beside(child, recipe)
        with _inside(".".join(map(str, at))):
            if at == ("baseline",):
                ready.baseline = get_ready(child, accelerator, convert, "baseline", ready)
            else:
                ready.teachers[str(at[1])] = get_ready(child, accelerator, convert, f"teacher {at[1]}", ready)
    return ready


def _first_images(data: Data, device: torch.device) -> Tensor:
    """Two training images for dry runs, on the CPU, or as mere shapes on the meta device."""
    if device.type == "meta":
        return torch.empty(2, data.channels, data.image_size, data.image_size, device=device)
    try:
        return next(data.train.epoch(0))[0][:2].cpu()
    except ValueError as error:
        raise ConfigError([f"data: {error}"]) from None


def _build(recipe: Recipe, title: str, data: Data, images: Tensor, convert: weights.Convert | None) -> Ready:
    """The models and the plan of one run, its children left out."""
    student = build.build_model(recipe.student, data, "student")
    _load(student, recipe.student, "student", convert)
    panel = Panel({name: build.build_model(spec, data, f"teachers.{name}") for name, spec in recipe.teachers.items()})
    for name, spec in recipe.teachers.items():
        _load(panel[name], spec, f"teachers.{name}", convert)
    if (init := recipe.student.init) is not None and not weights.shared(student, panel[init]):
        raise ConfigError([f"student.init: no tensor of teacher {init!r} has a name and shape of the student's"])
    prepare = build.build_prepare(recipe, data, panel)
    probe.check_answers(recipe, student, panel, prepare, images, len(data.classes))
    try:
        terms = build.build_terms(recipe, student, panel, data.train.batches.images)
        plan = fit(terms, student, panel, images, prepare=prepare)
    except (ValueError, RuntimeError) as error:
        raise error if isinstance(error, ConfigError) else ConfigError([build.of_term(error)]) from None
    return Ready(recipe, title, data, images, student, panel, prepare, plan)


def _load(
    model: torch.nn.Module, spec: recipes.Student | recipes.Teacher, where: str, convert: weights.Convert | None
) -> None:
    """Loads a file of weights if there is one to load; a dry run checks it where it is there."""
    dry = torch.get_default_device().type == "meta"
    if spec.weights is not None and (spec.weights.exists() or not dry):
        with torch.device("cpu"):
            weights.load_weights(model, spec.weights, f"{where}.weights", convert, spec.sha256)


@contextmanager
def _inside(where: str) -> Iterator[None]:
    """Puts the place of a child before what is wrong with it."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{where}.{line}" for line in error.lines) from None
