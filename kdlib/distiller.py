"""The student, and the weighted sum of what it is compared by.

images -> Teacher(images) -> targets: {tap: tensor}, no gradient (teacher.py)
images -> Distiller(images, targets): student forward -> views -> adapters -> losses -> weighted sum
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor, nn

from .adapters import adapt, find_layout, view_as
from .taps import Taps, logits_of
from .teacher import TAKEN
from .terms import Term, check_terms


class Distilled(NamedTuple):
    """What one step of a ``Distiller`` gives."""

    loss: Tensor
    """Weighted sum of the terms; call backward on it."""
    logits: Tensor
    """What the student answered."""
    terms: dict[str, Tensor]
    """Each live term before its weight, detached, for logs."""


class Distiller(nn.Module):
    """The student and all that is trained with it; ``(images, targets) -> Distilled``.

    Everything that trains runs inside this one forward, so DDP, FSDP and ``torch.compile`` see it whole. The weights in
    force are a buffer: a schedule moves them without a recompilation. A term of weight 0 is not computed, and what it
    alone trains has no gradient, so that no optimizer moves it; under DDP see ``idle``. Where no live term reads the
    answer, so it is with the student's last layers, but under DDP or compiled their gradient is zero: freeze a head
    that weight decay shall not erode.

    Args:
        student: the model that learns.
        terms: what it learns from; adapters and learnable losses in them must be sized (see ``fit``).
        dtype: precision in which its features are read, e.g. ``torch.bfloat16``; by default the one that they have, as
            where an adapter reads them. Half of it is kept for the backward pass; losses compute in float32.

    Raises:
        ValueError: a tap that the student does not have; a term that still has to be fitted.
    """

    weights: Tensor
    sharded = False
    """True where FSDP2 holds it, which waits for the gradient of no parameter."""

    def __init__(self, student: nn.Module, terms: Sequence[Term], *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.student, self.dtype = student, dtype
        self.terms = check_terms(terms)
        for term in self.terms:
            if term.adapter is not None and not term.adapters:
                raise ValueError(f"term {term.name!r} asks for adapters that have no size yet; call kdlib.fit first")
            _check_sized(term)
        losses = {_key(term.name): term.loss for term in self.terms if isinstance(term.loss, nn.Module)}
        self.losses = nn.ModuleDict(losses)
        self.adapters = nn.ModuleDict(
            {
                _key(term.name): nn.ModuleDict({_key(tap): m for tap, m in term.adapters.items()})
                for term in self.terms
                if term.adapters
            }
        )
        taps = dict.fromkeys(tap for term in self.terms for tap in term.student_taps if tap != "@output")
        self.taps = Taps(student, taps)
        self.register_buffer("weights", torch.tensor([term.weight for term in self.terms]), persistent=False)
        self._force(tuple(term.weight for term in self.terms))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Distiller:
        """Whatever the student is converted to: in half precision a weight of 1e-8 would be 0."""
        super()._apply(fn, recurse)
        if self.weights.dtype != torch.float32:
            self.weights = torch.tensor(self._in_force, device=self.weights.device)
        return self

    def _force(self, weights: tuple[float, ...]) -> None:
        self._in_force = weights
        self._live = tuple(i for i, weight in enumerate(weights) if weight > 0)
        taps = dict.fromkeys(tap for i in self._live for tap in self.terms[i].student_taps)
        self.taps.live = tuple(tap for tap in taps if tap != "@output")

    def set_epoch(self, epoch: float, epochs: int) -> None:
        """Puts the weights of ``epoch`` (fractions allowed) of a run of ``epochs`` in force."""
        self.set_weights({term.name: term.weight_at(epoch, epochs) for term in self.terms})
        for loss in self.losses.values():
            if callable(follow := getattr(loss, "set_epoch", None)):
                follow(epoch, epochs)

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Puts weights by hand in force, by term name; terms that are not named keep theirs.

        Raises:
            ValueError: no such term; a weight that is negative, infinite or NaN.
        """
        names = [term.name for term in self.terms]
        if unknown := set(weights) - set(names):
            raise ValueError(f"no term {sorted(unknown)[0]!r}; the terms are {', '.join(names)}")
        if bad := [(name, weight) for name, weight in weights.items() if not 0 <= weight < float("inf")]:
            raise ValueError(f"weight {bad[0][1]:g} of term {bad[0][0]!r}: weights are finite numbers from 0 up")
        new = tuple(float(weights.get(name, old)) for name, old in self.weights_in_force().items())
        if new != self._in_force:
            self.weights.copy_(torch.tensor(new, dtype=self.weights.dtype), non_blocking=True)
            self._force(new)

    def weights_in_force(self) -> dict[str, float]:
        """Term name to weight, without asking the device."""
        return dict(zip((term.name for term in self.terms), self._in_force, strict=True))

    def remove(self) -> None:
        """Takes the taps off the student, which can then be used as before."""
        self.taps.remove()

    def live(self) -> tuple[str, ...]:
        """The terms that are computed at present."""
        return tuple(self.terms[i].name for i in self._live)

    def no_weight_decay(self) -> set[str]:
        """What the student asks timm's optimizers not to decay, under its name here."""
        asked = getattr(self.student, "no_weight_decay", None)
        return {f"student.{name}" for name in asked()} if callable(asked) else set()

    def forward(self, images: Tensor, targets: Mapping[str, Tensor] | None) -> Distilled:
        """One step; with targets None only the student answers, and the loss is zero."""
        if targets is None:
            logits = logits_of(self.student(images), "student")
            return Distilled(logits.new_zeros(()), logits, {})
        logits, values = self.values(images, targets)
        total = logits.new_zeros((), dtype=torch.float32)
        for i, value in zip(self._live, values.values(), strict=True):
            total = total + self.weights[i] * value
        return Distilled(total + self._path(), logits, {name: value.detach() for name, value in values.items()})

    def values(self, images: Tensor, targets: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's answer, and each live term before its weight, with its gradient."""
        _check_targets([self.terms[i] for i in self._live], targets)
        answer, seen = self.taps.watch(self.student, images)
        seen["@output"] = logits = logits_of(answer, "student")
        live = [self.terms[i] for i in self._live]
        return logits, {term.name: self._value(term, seen, targets, images.shape) for term in live}

    def idle(self) -> list[nn.Parameter]:
        """What terms train that are off at present, and nothing else does.

        Its gradient is None, or zero where DistributedDataParallel waits for one; and an optimizer with weight decay or
        momentum moves what has a gradient of zero. A loop of one's own sets these to None before the optimizer's step.
        """
        live = [self.terms[i].name for i in self._live]
        off = [term.name for term in self.terms if term.name not in live]
        used = {parameter for module in (*self._held(live), self.student) for parameter in module.parameters()}
        found = dict.fromkeys(parameter for module in self._held(off) for parameter in module.parameters())
        return [parameter for parameter in found if parameter.requires_grad and parameter not in used]

    def _held(self, names: Sequence[str]) -> list[nn.Module]:
        """What the terms of these names train besides the student."""
        keys = [_key(name) for name in names]
        return [held[key] for held in (self.adapters, self.losses) for key in keys if key in held]

    def _path(self) -> Tensor | float:
        """Zero, with a gradient path to what no live term may reach, where other processes wait for its gradient, or
        where nothing is live and a backward pass must end somewhere."""
        alone = self.sharded or not (torch.distributed.is_available() and torch.distributed.is_initialized())
        if self._live and alone:
            return 0.0
        parameters = self.idle()
        if not any("@output" in self.terms[i].student_taps for i in self._live):
            parameters += [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        return sum((parameter.sum() for parameter in parameters), start=0.0) * 0.0

    def _value(self, term: Term, seen: Mapping[str, Tensor], targets: Mapping[str, Tensor], images: Size) -> Tensor:
        sides: list[Any] = [[self._mine(term, tap, seen, images) for tap in term.student_taps]]
        if "teacher" in term.against:
            sides.append([read(term, 1, targets[pair.teacher], images) for pair in term.pairs])
        extras = [targets[f"@{need}"] for need in term.against if need != "teacher"]
        calls = [sides] if term.lists else list(zip(*sides, strict=True))
        values = [check_number(term, term.loss(*given, *extras)) for given in calls]
        if len(values) == 1:
            return values[0]
        return torch.stack(values).mean() if term.reduce == "mean" else torch.stack(values).sum()

    def _mine(self, term: Term, tap: str, seen: Mapping[str, Tensor], images: Size) -> Tensor:
        x = seen[tap]
        if torch.is_grad_enabled() and not x.requires_grad:  # of an adapter alone it would still have one
            raise RuntimeError(
                f"term {term.name!r} trains nothing of the student: tap {tap!r} carries no gradient (frozen layers, or "
                "reentrant activation checkpointing)"
            )
        if tap in term.adapters:
            return read(term, 0, x, images, self.adapters[_key(term.name)][_key(tap)])  # type: ignore[index]
        if self.dtype is not None and tap != "@output":
            x = x.to(self.dtype)  # before the view, so that a compiler finds a convolution's own cast of the map again
        return read(term, 0, x, images)


def read(term: Term, side: int, x: Tensor, images: Size, adapter: nn.Module | None = None) -> Tensor:
    """A tapped tensor as the term's view, and adapted; ``side`` is 0 for the student's, 1 for the teacher's."""
    if term.view == "raw":
        return x if adapter is None else adapter(x)
    assert term.view is not None
    try:
        layout = term.layouts()[side] or find_layout(x.shape, images)
        if adapter is not None:
            return adapt(adapter, x, term.view, layout, images)
        return view_as(x, term.view, layout, images)
    except ValueError as error:
        raise ValueError(f"term {term.name!r}, {('student', 'teacher')[side]}: {error}") from None


def _check_sized(term: Term) -> None:
    """Raises where the optimizer would miss what a loss learns."""
    for part in term.loss.modules() if isinstance(term.loss, nn.Module) else ():
        if callable(require_fit := getattr(part, "require_fit", None)):
            try:
                require_fit()
            except ValueError as error:
                raise ValueError(f"term {term.name!r}: {error}; kdlib.fit does it for all terms") from None


def check_number(term: Term, value: Tensor) -> Tensor:
    """What a term's loss gave.

    Raises:
        ValueError: it is not one number.
    """
    if not isinstance(value, Tensor) or value.numel() != 1:
        given = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"term {term.name!r}: its loss gives {given}, not one number, a tensor (); set its reduction='mean', or "
            "return its .mean()"
        )
    return value.reshape(())  # (1,), too


def _check_targets(live: Sequence[Term], targets: Mapping[str, Tensor]) -> None:
    for term in live:
        if lacking := [key for key in term.targets if key not in targets]:
            raise ValueError(
                f"term {term.name!r} reads {lacking[0]!r}, which the targets lack (they hold "
                f"{', '.join(targets) or 'nothing'}); "
                "give Teacher and Distiller the same terms, and add '@labels' where a loss needs labels"
            )


def _key(name: str) -> str:
    """A term's name or a tap as a name that a ``ModuleDict`` may give a module: ``values``, say, is a method of it."""
    return f"{name}/" if name in TAKEN else name.replace(".", "/")
