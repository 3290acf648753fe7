"""A term: one named summand of the objective, and which tensors it reads."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import Tensor, nn

from .adapters import Adapter
from .losses.base import View
from .pairing import Pair
from .schedules import ALWAYS, Schedule

VIEWS = get_args(View)
NAME = re.compile(r"[A-Za-z_][\w-]*")
"""What a term may be called."""


@dataclass(frozen=True)
class Term:
    """``weight · schedule(epoch) · reduce over pairs of loss(student tap, teacher tap)``.

    Raises:
        ValueError: a name that is no plain word, an unknown ``reduce`` or view, a negative weight, adapters of a tap
            that it does not read, several pairs for a loss that remembers or learns something of one.
        TypeError: a class in place of a loss, text in place of pairs.
    """

    name: str
    """Its key in logs, YAML and checkpoints: letters, digits, ``_`` and ``-``."""
    loss: Callable[..., Tensor]
    """A loss of ``kdlib.losses``, any module, or a bare function of ``(student, teacher)``."""
    weight: float = 1.0
    schedule: Schedule = ALWAYS
    """Factor on the weight over training; a term whose factor is 0 is not computed."""
    pairs: Sequence[Pair] = ()
    """By default the answers of both models. A loss against labels only reads no teacher, whatever is said here."""
    view: str | None = None
    """How the tensors are read; by default what the loss declares, or raw for a loss that declares nothing."""
    layout: str | tuple[str | None, str | None] | None = None
    """Of both features, or (student, teacher), where shapes do not tell: ``"NCHW"`` or ``("NHWC", "NLC+1")``."""
    adapter: Adapter | None = None
    """``"linear"`` or a function of the two shapes; ``fit`` builds one per pair whose shapes differ."""
    adapters: Mapping[str, nn.Module] = field(default_factory=dict)
    """By student tap: what ``fit`` built, or modules of your own."""
    reduce: Literal["mean", "sum"] = "mean"
    """Over pairs."""

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"a term's name is a plain word (letters, digits, _ and -), got {self.name!r}")
        if isinstance(self.loss, type):
            raise TypeError(f"term {self.name!r}: its loss is the class {self.loss.__name__}; make one of it, with ()")
        if any(isinstance(pair, str) for pair in self.pairs):
            raise TypeError(f"term {self.name!r}: pairs are a list, [Pair(student, teacher), …], got {self.pairs}")
        if self.reduce not in ("mean", "sum"):
            raise ValueError(f"term {self.name!r}: reduce is 'mean' or 'sum' over pairs, got {self.reduce!r}")
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"term {self.name!r}: weight must be a finite number from 0 up, got {self.weight}")
        pairs = tuple(Pair(*pair) for pair in self.pairs or [Pair()])
        if "teacher" not in self.against:  # or a head in the middle, Pair("layer3.fc"), would ask for a teacher
            pairs = tuple(Pair(mine, "@labels") for mine, _ in pairs)
        object.__setattr__(self, "pairs", pairs)
        if "indices" in self.against and len(self.pairs) > 1:
            raise ValueError(
                f"term {self.name!r}: its loss remembers one feature of each image, so it takes one pair, got "
                f"{len(self.pairs)}; give each pair a term of its own"
            )
        learned = [getattr(part, "of_one_pair", False) for part in _modules(self.loss)]
        if any(learned) and len(self.pairs) > 1 and not self.lists:
            raise ValueError(
                f"term {self.name!r}: its loss learns something of one pair of features, got {len(self.pairs)} pairs; "
                "give each a term, and so a loss, of its own"
            )
        object.__setattr__(self, "view", self.view or getattr(self.loss, "view", "raw"))
        if self.view not in VIEWS:
            raise ValueError(f"term {self.name!r}: no view {self.view!r}; known: {', '.join(VIEWS)}")
        if unread := [tap for tap in self.adapters if tap not in self.student_taps]:
            taps = ", ".join(map(repr, self.student_taps))
            raise ValueError(f"term {self.name!r}: adapters has {unread[0]!r}, which it does not tap; it taps {taps}")

    @property
    def against(self) -> tuple[str, ...]:
        """What the loss takes after the student's tensor: ``"teacher"``, ``"labels"``, …"""
        return getattr(self.loss, "against", ("teacher",))

    @property
    def lists(self) -> bool:
        """Whether the loss reads all pairs at once, as lists from shallow to deep."""
        return getattr(self.loss, "lists", False)

    @property
    def student_taps(self) -> tuple[str, ...]:
        return tuple(pair.student for pair in self.pairs)

    @property
    def teacher_taps(self) -> tuple[str, ...]:
        """What it reads of the teacher; empty for a loss against labels only."""
        return tuple(pair.teacher for pair in self.pairs if pair.teacher != "@labels")

    @property
    def targets(self) -> tuple[str, ...]:
        """The keys that it reads from the targets, extras such as ``"@labels"`` included."""
        extras = [f"@{need}" for need in self.against if need != "teacher"]
        read = [pair.teacher for pair in self.pairs] if "teacher" in self.against else []
        return tuple(dict.fromkeys([*read, *extras]))

    def layouts(self) -> tuple[str | None, str | None]:
        """The stated layouts of student and teacher."""
        return self.layout if isinstance(self.layout, tuple) else (self.layout, self.layout)

    def weight_at(self, epoch: float, epochs: int) -> float:
        """The weight in force at ``epoch`` of ``epochs``.

        Raises:
            ValueError: the schedule's factor makes it negative, infinite or NaN.
        """
        factor = self.schedule(epoch, epochs)
        if not 0 <= self.weight * factor < float("inf"):
            raise ValueError(
                f"term {self.name!r}: its schedule gives the factor {factor:g} at epoch {epoch:g}; factors are finite "
                "numbers from 0 up"
            )
        return self.weight * factor


def _modules(loss: Callable[..., Tensor]) -> Iterable[nn.Module]:
    return loss.modules() if isinstance(loss, nn.Module) else ()


def check_terms(terms: Sequence[Term]) -> tuple[Term, ...]:
    """The terms as a tuple.

    Raises:
        ValueError: there are none, or two share a name.
    """
    names = [term.name for term in terms]
    if not names:
        raise ValueError("there are no terms; give at least one, e.g. Term('soft', SoftTarget(4.0))")
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two terms share the name {sorted(twice)[0]!r}; a name is a log key and must be unique")
    return tuple(terms)
