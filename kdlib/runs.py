"""From a checked recipe to a finished run folder: what it needs is made first, once, and reused, as make would."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Protocol

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import set_seed
from timm.utils import ModelEmaV3
from torch import Tensor

from . import faults, runfolder, sharding, tracking
from .config import ConfigError
from .data import Data
from .distiller import Distiller, Panel, Teacher
from .evaluation import evaluate
from .plan import Plan, fit
from .progress import say
from .ranks import on_main
from .recipe import Recipe, build, load_children, weights
from .recipe import schema as recipes
from .train import Training

AS_THEY_ARE = ("epochs", "accumulate", "channels_last", "log_every", "log_gradients", "eval_every", "save_every")
"""Keys of a recipe that ``Training`` takes as they are."""
FOREIGN = {"DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM"}
"""What accelerate launches and kdlib does not take: by its variable, and by name."""
LAUNCHES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)


@dataclass
class Outcome:
    """A finished run."""

    name: str
    """The student's model name."""
    folder: Path
    student: torch.nn.Module
    """With its trained weights, on the run's device."""
    data: Data
    result: dict[str, float]
    """``top1`` and ``top5`` in percent, ``test_loss``."""
    accelerator: Accelerator
    teachers: dict[str, Outcome] = field(default_factory=dict)
    baseline: Outcome | None = None
    seconds: float = 0.0
    """What making it took, with the teachers and the baseline that were not there yet; as then, if it is read back."""


def start(recipe: Recipe) -> Accelerator:
    """The accelerator of this process, its threads set.

    Raises:
        ConfigError: the launcher started several processes that do not know of each other, or a precision that this
            device does not have.
    """
    for kind, name in FOREIGN.items():
        if os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true":
            raise ConfigError(
                [f"launch: {name} is not taken; launch with --use_fsdp --fsdp_version 2, which shards too"]
            )
    try:
        accelerator = Accelerator(mixed_precision="no" if recipe.precision == "none" else recipe.precision)
    except ValueError as error:
        what = "launch" if recipe.precision == "none" else f"precision: {recipe.precision} cannot be had here"
        raise ConfigError([f"{what}: {' '.join(str(error).split())}"]) from None
    except torch.distributed.DistError as error:
        raise ConnectionError(f"launch: the processes cannot meet ({' '.join(str(error).split())[:200]})") from None
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world != accelerator.num_processes:
        raise ConfigError(
            [
                f"launch: {world} processes were started, but each runs alone (no GPU, and ACCELERATE_USE_CPU is not "
                "set); on CPUs start with ACCELERATE_USE_CPU=true torchrun --nproc-per-node …"
            ]
        )
    if accelerator.distributed_type not in LAUNCHES:
        kind = accelerator.distributed_type.value
        raise ConfigError([f"launch: {kind} is not taken; launch DDP or FSDP2 (docs/distributed.md)"])
    try:
        sharding.begin(accelerator)
    except ValueError as error:
        raise ConfigError([f"launch: {error}"]) from None
    torch.set_float32_matmul_precision("high" if recipe.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = recipe.tf32
    if recipe.threads or (accelerator.device.type == "cpu" and world == 1):
        torch.set_num_threads(recipe.threads or _cores())  # accelerate launch leaves one thread on a CPU
    return accelerator


def _cores() -> int:
    """Cores that this process may use; a container often has fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
    prepare: dict[str, torch.nn.Module]
    plan: Plan
    teachers: dict[str, Ready] = field(default_factory=dict)
    """The runs that train teachers which have no weights yet."""
    baseline: Ready | None = None


class Seat(Protocol):
    """What checking a run must know of an ``Accelerator``."""

    @property
    def device(self) -> torch.device: ...
    @property
    def process_index(self) -> int: ...
    @property
    def num_processes(self) -> int: ...


def run(
    recipe: Recipe,
    accelerator: Accelerator | None = None,
    convert: weights.Convert | None = None,
    title: str = "student",
) -> Outcome:
    """Trains what the recipe says, or reads it back where its folder holds the finished run.

    Teachers without weights and the baseline are runs of their own, beside this one, named by their config; a run that
    was stopped goes on from its last checkpoint. Everything is checked (models, weights, taps, shapes, a batch through
    all of it, in each run) before the first folder is made.

    Args:
        convert: for weight files of foreign names, see ``recipe.weights.load_weights``.

    Raises:
        ConfigError: anything in the recipe that does not fit, or a folder that holds another run.
    """
    accelerator = accelerator or start(recipe)
    runfolder.check_agreed(recipe, accelerator)
    return _make(get_ready(recipe, accelerator, convert, title), accelerator)


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
    build.check_answers(recipe, student, panel, prepare, images, len(data.classes))
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


def _make(ready: Ready, accelerator: Accelerator) -> Outcome:
    """Makes the children, then the run itself, each unless it is there already."""
    began = perf_counter()
    recipe, student, panel, title = ready.recipe, ready.student, ready.panel, ready.title
    shown = accelerator.is_main_process
    teachers = {name: _make(child, accelerator) for name, child in ready.teachers.items()}
    outcome = Outcome(recipe.student.name, recipe.output, student, ready.data, {}, accelerator, teachers)
    if ready.baseline is not None:
        outcome.baseline = _make(ready.baseline, accelerator)
    for name, child in teachers.items():
        panel[name].load_state_dict(child.student.state_dict())
    found = runfolder.finished(recipe, student)
    if found is None:
        if recipe.student.init is not None:
            copied = weights.inherit(student, panel[recipe.student.init])
            own = len(student.state_dict()) - len(copied)
            say(f"{title}: {len(copied)} tensors from teacher {recipe.student.init!r}, {own} of its own", shown)
        say(f"{title}: {recipe.student.name} → {recipe.output}\n{ready.plan}", shown)
        with ExitStack() as ours:
            on_main(accelerator, lambda: ours.enter_context(runfolder.claimed(recipe)))
            faults.reach("start")
            result, student, average = _train(ready, accelerator)
            outcome.student = student
            seconds = perf_counter() - began
            on_main(accelerator, lambda: runfolder.finish(recipe, student, average, result, seconds))
    else:
        result, outcome.seconds = found
        student.to(accelerator.device)
        say(f"{title}: finished before, read from {recipe.output}", shown)
    accelerator.wait_for_everyone()
    outcome.result = result
    for name, spec in recipe.teachers.items():
        if name not in teachers:
            member = panel[name].to(accelerator.device)
            measured = {} if name in ready.prepare else evaluate(member, ready.data.test, accelerator)
            teachers[name] = Outcome(spec.name, recipe.output, member, ready.data, measured, accelerator)
    outcome.seconds = outcome.seconds or perf_counter() - began
    return outcome


def _train(ready: Ready, accelerator: Accelerator) -> tuple[dict[str, float], torch.nn.Module, torch.nn.Module | None]:
    """The last evaluation, the trained student, and its moving average where there is one."""
    recipe, terms, data, panel = ready.recipe, ready.plan.terms, ready.data, ready.panel
    set_seed(recipe.seed, device_specific=True)  # what was drawn above depends on what was there already
    memory = torch.channels_last if recipe.channels_last else torch.preserve_format
    student = ready.student.to(accelerator.device, memory_format=memory)  # type: ignore[call-overload]
    ema = ModelEmaV3(student, recipe.ema.decay, use_warmup=recipe.ema.warmup) if recipe.ema is not None else None
    untouched = deepcopy(student).cpu() if accelerator.is_fsdp2 else None  # what is trained there are pieces
    distiller = Distiller(student, terms).to(accelerator.device)
    teacher = Teacher(panel, terms, prepare=ready.prepare, channels_last=recipe.channels_last) if panel else None
    optimizer = build.build_optimizer(recipe.optimizer, distiller)
    training = Training(
        distiller,
        teacher and teacher.to(accelerator.device),
        data,
        optimizer,
        build.build_scheduler(recipe, optimizer, len(data.train) // recipe.accumulate),
        accelerator,
        recipe.output,
        title=ready.title,
        clip_grad=recipe.optimizer.clip_grad,
        compile=recipe.compile.mode,
        ema=ema,
        metric=recipe.metric,
        patience=recipe.patience,
        on_nonfinite=recipe.on_nonfinite,
        trackers=tracking.choose(recipe.trackers),
        config=runfolder.resolved(recipe),
        **{name: getattr(recipe, name) for name in AS_THEY_ARE},
    )
    try:
        result = training.run()
    finally:
        distiller.taps.remove()
    average = None if ema is None else ema.module
    if untouched is not None:
        average = average and sharding.fill(deepcopy(untouched), average).to(accelerator.device)
        student = sharding.fill(untouched, student).to(accelerator.device)
    return result, student, average
