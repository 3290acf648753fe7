"""The keys of a recipe, their types, ranges and defaults."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, StrictBool
from torch import nn

from ..losses import LOSSES
from .fields import Count, Decay, Digest, Location, Moment, Named, Natural, NonNegative, Number, Positive, Strict, Taps

Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "aim", "clearml", "dvclive", "swanlab"]


class Loss(Named):
    """``name`` is a key of ``kdlib.losses.LOSSES``; the rest are its arguments, among them a loss that it holds."""

    def build(self) -> nn.Module:
        """The loss itself.

        Raises:
            ValueError, TypeError: whatever its constructor says of the arguments.
        """
        return LOSSES[self.name](**{name: _built(value) for name, value in self.arguments.items()})

    @property
    def against(self) -> tuple[str, ...]:
        """What it takes after the student's tensor; a loss that holds another takes what that one does."""
        for value in self.arguments.values():
            if isinstance(value, dict):
                return Loss(**value).against
        return getattr(LOSSES[self.name], "against", ("teacher",))


def _built(value: Any) -> Any:
    return Loss(**value).build() if isinstance(value, dict) else value


class Student(Named):
    """``name`` is a timm model or one that the recipe registered; unlisted keys are arguments of the model."""

    weights: Location | None = None
    """File to start from: safetensors, or what torch.load(weights_only=True) reads."""
    sha256: Digest | None = None
    """SHA-256 of that file, or at least its first 8 digits; another file is refused."""
    init: str | None = None
    """Name of a teacher whose weights the student starts from, tensor by tensor where name and shape agree."""


class Teacher(Named):
    """Like the student's, and where its weights come from."""

    weights: Location | None = None
    """File of trained weights. Without it and without ``pretrained: true`` the teacher is trained first."""
    sha256: Digest | None = None
    """SHA-256 of that file, or at least its first 8 digits; another file is refused."""
    recipe: dict[str, Any] | None = None
    """The recipe that trains it, over this one's data and seed; ``{base: teacher.yaml}`` names a file."""
    mean: tuple[Number, ...] | None = None
    """Normalisation that it expects. By default that of the run in whose folder ``weights`` lie; of other weights, what
    timm says of the model; without any, the data's."""
    std: tuple[Number, ...] | None = None
    size: Count | None = None
    """Side in pixels of the square images that it expects, where it differs from the data's."""

    @property
    def foreign(self) -> bool:
        """Whether it comes with weights of its own."""
        return self.weights is not None or bool(self.arguments.get("pretrained"))


class Slope(Strict):
    """A factor that moves from ``first``, where the term starts, to ``last``."""

    first: NonNegative = 1.0
    last: NonNegative = 0.0
    until: Moment | None = None
    """When it reaches ``last``, where it then stays; by default where the term ends."""
    shape: Literal["linear", "cosine"] = "linear"


class Term(Strict):
    """One summand of the objective."""

    loss: Loss
    weight: NonNegative = 1.0
    student: Taps | None = None
    """Tap of the student, or a pattern of taps, or a list of them; by default its answer."""
    teacher: Taps | None = None
    """``name``, ``name.tap`` or ``name.pattern`` of a teacher, or as many as ``student`` lists; ``"@labels"``."""
    start: Moment = 0
    """When it begins: an int is an epoch, a float or ``80/120`` a fraction of the run."""
    until: Moment = 1.0
    """When it ends (excluded). Before ``start`` and from here on the term is off, whatever ``slope`` says."""
    slope: Slope | None = None
    """Moves the weight while the term is on; constant by default."""
    view: Literal["logits", "embedding", "tokens", "map", "raw"] | None = None
    layout: str | tuple[str, str] | None = None
    adapter: Literal["linear"] | None = None
    reduce: Literal["mean", "sum"] = "mean"

    @property
    def sides(self) -> list[tuple[str | None, str | None]]:
        """(student, teacher) of each entry of the two lists; one entry where they are no lists.

        Raises:
            ValueError: the lists are not of one length.
        """
        mine: list[str | None] = [*self.student] if isinstance(self.student, list) else [self.student]
        theirs: list[str | None] = [*self.teacher] if isinstance(self.teacher, list) else [self.teacher]
        theirs = theirs * len(mine) if self.teacher is None else theirs
        if len(mine) != len(theirs):
            raise ValueError(f"{len(theirs)} for {len(mine)} of the student; list as many, in the same order")
        return list(zip(mine, theirs, strict=True))

    def compared(self, teachers: Sequence[str]) -> list[tuple[str, str]]:
        """``sides`` without gaps: what is not said is the answer, of the first teacher or, against labels, ``@labels``.

        A tap of the student without one of a teacher is compared with the same tap of the first teacher.
        """
        found = []
        for mine, theirs in self.sides:
            if theirs is None and "teacher" in self.loss.against:
                theirs = teachers[0] + (f".{mine}" if mine and not mine.startswith("@") else "")
            found.append((mine or "@output", theirs or "@labels"))
        return found


class Optimizer(Strict):
    """timm's optimizers by name; norms and biases get no weight decay."""

    name: str = "adamw"
    lr: Positive = 1e-3
    weight_decay: NonNegative = 0.05
    betas: tuple[Decay, Decay] | None = None
    eps: Positive | None = None
    momentum: Decay | None = None
    clip_grad: Positive | None = None
    """Largest norm of the whole gradient."""


class Schedule(Strict):
    """Cosine learning rate per step, with warm-up before and cool-down (at ``min_lr``) within ``epochs``."""

    warmup_epochs: NonNegative = 0
    warmup_lr: NonNegative = 1e-6
    min_lr: NonNegative = 1e-5
    cooldown_epochs: NonNegative = 0


class Compile(Strict):
    """torch.compile of teacher and distiller, each as one graph; what cannot be compiled so runs as it is."""

    mode: Literal[
        "auto", "off", "default", "reduce-overhead", "max-autotune-no-cudagraphs", "graphs", "compiled-graphs"
    ] = "auto"
    """``auto`` is ``default`` on a GPU. For models that wait for kernel launches: ``graphs`` replays the plain step as
    one CUDA graph and starts at once; ``compiled-graphs`` compiles it first, which takes a minute and runs faster, and
    so does ``reduce-overhead``, in several graphs of torch's own."""
    teacher: StrictBool = True
    """Whether teachers are compiled, too; ``graphs`` records them all the same."""


class Ema(Strict):
    """Exponential moving average of the student's weights, evaluated and saved beside it."""

    decay: Decay = 0.9999
    """Share of the average that stays at each step."""
    warmup: StrictBool = False
    """Begins with a small decay, 1 - (1 + step)^(-2/3), and lets it grow to ``decay``."""


class Recipe(Strict):
    """A whole run: who learns, from whom, on what, for how long."""

    student: Student
    teachers: dict[str, Teacher] = Field(default_factory=dict)
    """By name; one that no term reads and the student does not start from is left out, and nothing trains it."""
    terms: dict[str, Term]
    data: dict[str, Any] = Field(default_factory=dict)
    """Arguments of ``kdlib.data.load``."""
    epochs: Count = 10
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    baseline: dict[str, Any] | None = None
    """Recipe of the same student to compare with, over this one's data, seed and epochs."""
    accumulate: Count = 1
    """Batches per optimizer step."""
    precision: Literal["none", "bf16", "fp16"] = "none"
    """Mixed precision. ``bf16`` also tells and reads features in bfloat16; losses compute in float32 always."""
    teacher_autocast: StrictBool = True
    """Beside ``precision: bf16``. ``false`` converts the teachers' weights to bfloat16, and all their layers compute in
    it: faster, the weights take half the memory, and answers are rounded more."""
    tf32: StrictBool = True
    """On a GPU, float32 products are computed from numbers of 10 mantissa bits: several times as fast."""
    channels_last: StrictBool | Literal["auto"] = "auto"
    """Memory layout that convolutions like. ``auto``: on a GPU where the student has more of them than its stem, in one
    piece (not under FSDP2)."""
    compile: Compile = Compile()
    threads: Natural = 0
    """CPU threads; 0 takes all cores for one process, whatever the launcher set."""
    seed: Natural = 0
    ema: Ema | None = None
    log_every: Count = 50
    """Batches between two lines of metrics.jsonl."""
    log_gradients: StrictBool = False
    """Each line tells each term's share of the gradient; costs a backward pass a term and line."""
    trackers: Literal["auto"] | tuple[Tracker, ...] = "auto"
    """Where numbers go beside metrics.jsonl; ``auto`` is TensorBoard if it is installed."""
    eval_every: Count = 1
    """Epochs between two evaluations; the last epoch is always evaluated."""
    metric: Literal["top1", "top5", "test_loss", "ema_top1", "ema_top5", "ema_test_loss"] = "top1"
    """What tells the best student, which is saved as student_best.safetensors."""
    patience: Natural = 0
    """Evaluations without a better ``metric`` after which the run ends; 0 is never."""
    save_every: Natural = 0
    """Steps between two checkpoints. An epoch of no fewer steps, or any where this is 0, ends with one besides."""
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """What to do about NaN or infinity: end, undo the step, or go back to the checkpoint and leave the step out."""
    output: Location = Path("runs/run")
    """Folder of the run, by default runs/ and the names of the CONFIGs; what it trains besides lies beside it."""
