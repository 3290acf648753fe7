"""Say which block of the teacher answers to which block of the student."""

from __future__ import annotations

from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn


class Pair(NamedTuple):
    """Two taps that a loss compares. ``"@output"`` is a model's answer, ``"@labels"`` (as teacher) the labels."""

    student: str = "@output"
    teacher: str = "@output"


def pair(student: nn.Module, teacher: nn.Module, pattern: str, teacher_pattern: str | None = None) -> tuple[Pair, ...]:
    """Pairs the modules that the patterns find, block by block.

    In a pattern ``*`` is every child, ``layer*`` every child whose name begins so, and ``-1`` the last one:
    ``stages.*.blocks.-1.token_mixer`` is the mixer of each stage's last block; ``:input`` at the end taps what is given
    instead of what is returned. Every part with a ``*`` but the last says the group (a stage); inside a group, student
    block ``i`` of ``S`` answers to teacher block ``(i + 1) · T // S − 1`` of ``T``: equal depths pair one to one, and
    of a teacher twice as deep every second block is taken, the last one always.

    Args:
        student, teacher: the models; for a ``Panel`` a pattern begins with a member's name.
        pattern: in the student, and in the teacher too unless ``teacher_pattern`` is given.

    Raises:
        ValueError: a pattern finds nothing (says at which part, and what is there); the numbers of groups differ; a
            teacher group has fewer blocks than the student's.
    """
    ours, theirs = _find(student, pattern), _find(teacher, teacher_pattern or pattern)
    if len(ours) != len(theirs):
        raise ValueError(
            f"groups do not match: {pattern!r} finds {len(ours)} in the student {_names(ours)}, "
            f"{teacher_pattern or pattern!r} finds {len(theirs)} in the teacher {_names(theirs)}; "
            "list the pairs one by one, or choose patterns with one group on both sides"
        )
    pairs: list[Pair] = []
    for mine, yours in zip(ours.values(), theirs.values(), strict=True):
        if len(yours) < len(mine):
            raise ValueError(
                f"the teacher's group has {len(yours)} blocks {yours}, the student's {len(mine)} {mine}; "
                "pair fewer student blocks (-1 takes the last of each group) or list the pairs one by one"
            )
        pairs += [Pair(tap, yours[(i + 1) * len(yours) // len(mine) - 1]) for i, tap in enumerate(mine)]
    return tuple(pairs)


def find(model: nn.Module, pattern: str) -> list[str]:
    """The taps that a pattern finds, see ``pair``.

    Raises:
        ValueError: it finds nothing.
    """
    return [tap for group in _find(model, pattern).values() for tap in group]


def _names(groups: dict[tuple[str, ...], list[str]]) -> list[str]:
    return [names[0] for names in groups.values()]


def _find(model: nn.Module, pattern: str) -> dict[tuple[str, ...], list[str]]:
    """Taps that match, by group."""
    path, colon, side = pattern.partition(":")
    found: list[tuple[tuple[str, ...], str, nn.Module]] = [((), "", model)]
    for part in path.split("."):
        matches = []
        for stars, name, module in found:
            children = dict(module.named_children())
            for child in _choose(part, list(children)):
                matches.append((stars + (child,) * ("*" in part), f"{name}.{child}".lstrip("."), children[child]))
        if not matches:
            raise ValueError(_nothing(pattern, part, found, type(model).__name__))
        found = matches
    groups: dict[tuple[str, ...], list[str]] = {}
    for stars, name, _ in found:
        groups.setdefault(stars[:-1], []).append(name + colon + side)
    return groups


def _nothing(pattern: str, part: str, found: list[tuple[tuple[str, ...], str, nn.Module]], model: str) -> str:
    _, name, module = found[0]
    there = list(dict(module.named_children()))
    near = get_close_matches(part, there, n=1, cutoff=0.4)
    where = f"{name!r} has" if name else f"{model} has"
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"pattern {pattern!r} finds nothing at {part!r}: {where} {', '.join(there[:8]) or 'no submodules'}{hint}"


def _choose(part: str, children: list[str]) -> list[str]:
    if "*" in part:
        return [child for child in children if fnmatchcase(child, part)]
    if part.startswith("-") and part[1:].isdigit():
        return children[int(part) :][:1] if int(part[1:]) <= len(children) else []
    return [part] if part in children else []
