"""The frozen side: one model or several, which tell what their taps saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from .losses.base import autocast_off
from .taps import Taps, logits_of
from .terms import Term, check_terms

TAKEN = frozenset(dir(nn.ModuleDict()))
"""Names that no module in a ``ModuleDict`` can have: its own methods and attributes."""


class Panel(nn.ModuleDict):
    """Several teachers as one. The taps of each begin with its name; the bare name is what that teacher answers.

    Raises:
        ValueError: a name with a dot, or one that a module has for something else (``TAKEN``).
    """

    def add_module(self, name: str, module: nn.Module | None) -> None:
        if name in TAKEN or "." in name:
            raise ValueError(
                f"a teacher cannot be called {name!r}: a tap begins with the name and a dot, and names as 'values', "
                "'type' or 'forward' belong to every panel; choose another"
            )
        super().add_module(name, module)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {name: member(images) for name, member in self.items()}


class Teacher(nn.Module):
    """A frozen model, or a ``Panel`` of them, that tells what its taps saw: ``images -> {tap: tensor}``.

    Always in eval mode, without gradients, never in a checkpoint, not one bit of it changes. A model or member of a
    panel that somebody calls ``train()`` on is back in eval mode before the next pass; a submodule alone, only by the
    next ``set_epoch``. A model whose answer no live term reads stops after its last live tap; a member of a panel that
    no live term reads is not run.

    Args:
        model: frozen in place (``eval()``, ``requires_grad_(False)``).
        terms: those given to the ``Distiller`` too.
        prepare: turns the student's images into the teacher's, e.g. ``Renormalize``; for a panel, by member name.
        dtype: precision of its forward pass and of what it tells, e.g. ``torch.bfloat16``; by default whatever is
            around it.
        autocast: whether weights stay as they are and autocast brings each product to ``dtype``. False converts them,
            in place, and every layer computes in ``dtype``: norms write and residuals add in it, where autocast has
            float32. Faster, and the weights take half the memory; answers are rounded more.
        channels_last: memory layout of its weights and images.

    Raises:
        ValueError: a tap that the model does not have; a term that reads ``"@output"`` of a panel; ``autocast=False``
            without a ``dtype``.
    """

    def __init__(
        self,
        model: nn.Module,
        terms: Sequence[Term],
        *,
        prepare: nn.Module | Mapping[str, nn.Module] | None = None,
        dtype: torch.dtype | None = None,
        autocast: bool = True,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        if dtype is None and not autocast:
            raise ValueError("autocast=False converts the teacher's weights to dtype=, which is None; name one")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype is a floating point type such as torch.bfloat16, got {dtype!r}")
        self.model = model
        self.terms = check_terms(terms)
        self.dtype, self.converted = dtype, not autocast
        self.memory_format = torch.channels_last if channels_last else torch.preserve_format
        self.members: dict[str, nn.Module] = dict(model.items()) if isinstance(model, Panel) else {"": model}
        given = {} if prepare is None else {"": prepare} if isinstance(prepare, nn.Module) else dict(prepare)
        if unknown := set(given) - set(self.members):
            has = "is one model; give the module itself" if "" in self.members else f"has {sorted(self.members)}"
            raise ValueError(f"prepare= names {sorted(unknown)}, the teacher {has}")
        self.prepare = nn.ModuleDict({name or "@": module.eval() for name, module in given.items()})
        self.taps: dict[str, Taps] = {}
        try:
            for name, member in self.members.items():
                self.taps[name] = Taps(member, self._inside(name))
        except ValueError:
            self.remove()  # of the members before it
            raise
        self._listen(self.terms)
        self.model.eval().requires_grad_(False).to(memory_format=self.memory_format)  # now that nothing is wrong
        if self.converted:
            self.model.to(dtype)

    def _split(self, tap: str) -> tuple[str, str]:
        """(member, tap inside it) that a teacher tap means."""
        if not isinstance(self.model, Panel):
            return "", tap
        member, _, inside = tap.partition(".")
        if member not in self.members:
            raise ValueError(
                f"teacher tap {tap!r}: the panel has {', '.join(self.members)}; a tap begins with one of them"
            )
        return member, inside or "@output"

    def _read(self, member: str, terms: Sequence[Term]) -> dict[str, str]:
        """{tap inside the member: its name among the targets} that ``terms`` read."""
        taps = dict.fromkeys(tap for term in terms for tap in term.teacher_taps)
        return {inside: tap for tap in taps for owner, inside in [self._split(tap)] if owner == member}

    def _listen(self, terms: Sequence[Term]) -> None:
        self._live = {name: self._read(name, terms) for name in self.members}
        for name, live in self._live.items():
            self.taps[name].live = tuple(tap for tap in live if tap != "@output")

    def _inside(self, member: str) -> list[str]:
        return [tap for tap in self._read(member, self.terms) if tap != "@output"]

    def set_epoch(self, epoch: float, epochs: int) -> None:
        """Listens from now on only to what the terms read that are on at ``epoch`` of ``epochs``."""
        self.model.eval()
        self._listen([term for term in self.terms if term.weight_at(epoch, epochs) > 0])

    @torch.no_grad()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        targets: dict[str, Tensor] = {}
        for member in self.members.values():
            if member.training:
                member.eval()  # whoever holds it may have called train(), and batch statistics would move
        with self._precision(images.device):
            for name, live in self._live.items():
                if live:
                    targets.update(self._ask(name, live, images))
        return targets

    def _precision(self, device: torch.device) -> AbstractContextManager[object]:
        if self.converted:
            return autocast_off(device)
        return nullcontext() if self.dtype is None else torch.autocast(device.type, self.dtype)

    def _ask(self, name: str, live: Mapping[str, str], images: Tensor) -> dict[str, Tensor]:
        if (name or "@") in self.prepare:
            images = self.prepare[name or "@"](images)
        images = images.to(dtype=self.dtype if self.converted else None, memory_format=self.memory_format)
        answer, seen = self.taps[name].watch(self.members[name], images, stop_early="@output" not in live)
        if "@output" in live:
            seen["@output"] = logits_of(answer, f"teacher {name}".strip())
        return {live[tap]: self._told(value) for tap, value in seen.items()}

    def _told(self, value: Tensor) -> Tensor:
        """A target in the precision asked for; a map also in the teacher's own layout, where a compiler writes it so.

        A norm in eager answers contiguously whatever it is given, and so does the student's beside it.
        """
        if not value.is_floating_point():
            return value
        last = torch.compiler.is_compiling() and self.memory_format is torch.channels_last and value.ndim == 4
        layout = torch.channels_last if last else torch.preserve_format
        return value.to(dtype=self.dtype or value.dtype, memory_format=layout)

    def remove(self) -> None:
        """Takes the taps off the model, which can then be used as before."""
        for taps in self.taps.values():
            taps.remove()

    def train(self, mode: bool = True) -> Teacher:
        return self  # a teacher stays in eval mode
