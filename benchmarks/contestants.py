"""Who takes part in step.py beside the peers: the floor, loops written by hand, and kdlib."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peers import by_modelopt, by_timm, by_torchdistill, soft_loss
from torch import Tensor, nn
from work import BLOCK, MIXER, Step, Work, train

import kdlib as kd
from kdlib.losses import CrossEntropy, FeatureMSE, GramRelation, SoftTarget
from kdlib.training import compiling
from kdlib.training.graphs import Graphs

Build = Callable[[Work, str | None], Step]


class Frozen(nn.Module):
    """What some teachers answer."""

    def __init__(self, *teachers: nn.Module) -> None:
        super().__init__()
        self.teachers = nn.ModuleList(teachers).eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Any]:
        return [net(images) for net in self.teachers]


class Staged(nn.Module):
    """A model that returns what its four stages return, then the logits; its forward was written for that."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net: Any = net

    def forward(self, x: Tensor) -> list[Tensor]:
        x, seen = self.net.stem(x), []
        for stage in self.net.stages:
            x = stage(x)
            seen.append(x)
        return [*seen, self.net.forward_head(self.net.norm(x))]


class Mixed(nn.Module):
    """``Staged``, and after it what the token mixer of each stage's last block returned, kept by hooks."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.staged, self.seen = Staged(net), []
        for stage in net.stages:
            stage.blocks[-1].token_mixer.register_forward_hook(lambda _, __, output: self.seen.append(output))

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        self.seen = []
        answer, seen = self.staged(x), self.seen
        self.seen = []
        return answer, seen


class Blocks(nn.Module):
    """The blocks objective by hand."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = Staged(student)

    def forward(self, images: Tensor, targets: list[Tensor]) -> Tensor:
        *mine, logits = self.student(images)
        *theirs, answer = targets
        loss = soft_loss(logits, answer)
        for ours, other in zip(mine, theirs, strict=True):
            loss = loss + BLOCK * F.mse_loss(ours.float(), other.float())
        return loss


class Whole(nn.Module):
    """RIFormer's objective by hand; its relation term is kdlib's loss, whose Grams are C x C."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student, self.relation = Mixed(student), GramRelation()

    def forward(self, images: Tensor, answer: Tensor, twin: tuple[list[Tensor], list[Tensor]]) -> Tensor:
        (*mine, logits), mixed = self.student(images)
        loss = soft_loss(logits, answer)
        for ours, other in zip(mine, twin[0][:-1], strict=True):
            loss = loss + BLOCK * F.mse_loss(ours.float(), other.float())
            loss = loss + self.relation(ours.flatten(2).mT, other.flatten(2).mT)
        for ours, other in zip(mixed, twin[1], strict=True):
            loss = loss + MIXER * F.mse_loss(ours.float(), other.float())
        return loss


def floor(work: Work, mode: str | None) -> Step:
    """Every teacher's forward and a step by labels alone."""
    teachers = Frozen(*(work.make(name) for name in (work.twin, work.wide) if name))
    student = work.make(work.student)
    compiling.compile_whole([teachers, student], mode)

    def loss_of() -> Tensor:
        compiling.begin_step(mode)
        teachers(work.images)
        return F.cross_entropy(student(work.images), work.labels)

    return train(work, student, loss_of)


def by_hand(work: Work, mode: str | None) -> Step:
    hand: nn.Module
    if work.wide is None:
        teachers, hand = Frozen(Staged(work.make(work.twin))), Blocks(work.make(work.student))
    else:
        teachers, hand = Frozen(work.make(work.wide), Mixed(work.make(work.twin))), Whole(work.make(work.student))
    compiling.compile_whole([teachers, hand], mode)

    def loss_of() -> Tensor:
        compiling.begin_step(mode)
        return hand(work.images, *teachers(work.images))

    return train(work, hand, loss_of)


def by_kdlib(work: Work, mode: str | None, autocast: bool = True, logits_only: bool = False) -> Step:
    teacher, distiller = kdlib_parts(work, autocast, logits_only)
    if mode in compiling.RECORDED:
        return recorded(work, teacher, distiller, compiling.RECORDED[mode])
    compiling.compile_whole([teacher, distiller], mode)

    given = {"@labels": work.labels} if logits_only else {}

    def loss_of() -> Tensor:
        compiling.begin_step(mode)
        return distiller(work.images, teacher(work.images) | given).loss

    return train(work, distiller, loss_of)


def recorded(work: Work, teacher: kd.Teacher, distiller: kd.Distiller, mode: str | None) -> Step:
    """The step as one CUDA graph, compiled before by ``mode``; the optimizer's step is not in it, as in a run."""
    compiling.compile_whole([teacher, distiller], mode)
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-4, fused=True)

    def backward(images: Tensor, targets: dict[str, Tensor]) -> kd.Distilled:
        with work.autocast():
            out: kd.Distilled = distiller(images, targets | teacher(images))
        out.loss.backward()
        return out

    graphs = Graphs(backward, [distiller, teacher], distiller.live)

    def step() -> Tensor:
        loss = graphs(work.images, {}, adds=False).loss
        optimizer.step()
        return loss

    return step


def kdlib_parts(work: Work, autocast: bool = True, logits_only: bool = False) -> tuple[kd.Teacher, kd.Distiller]:
    """Teacher and distiller of a work's objective, or of labels and soft targets, which timm.task has."""
    student, last = work.make(work.student), "stages.*.blocks.-1"
    if work.wide is None:
        net: nn.Module = work.make(work.twin)
        blocks = kd.Term("block", FeatureMSE(), BLOCK, pairs=kd.pair(student, net, last), reduce="sum")
        terms = [kd.Term("soft", SoftTarget()), kd.Term("label", CrossEntropy()) if logits_only else blocks]
    else:
        net = kd.Panel({"wide": work.make(work.wide), "twin": work.make(work.twin)})
        pairs = {tap: kd.pair(student, net, tap, f"twin.{tap}") for tap in (last, f"{last}.token_mixer")}
        terms = [
            kd.Term("soft", SoftTarget(), pairs=[kd.Pair("@output", "wide")]),
            kd.Term("block", FeatureMSE(), BLOCK, pairs=pairs[last], reduce="sum"),
            kd.Term("mixer", FeatureMSE(), MIXER, pairs=pairs[f"{last}.token_mixer"], reduce="sum"),
            kd.Term("relation", GramRelation(), 1.0, pairs=pairs[last], reduce="sum"),
        ]
    terms = list(kd.fit(terms, student, net, work.images[:2]).terms)
    half = torch.bfloat16 if work.images.is_cuda else None
    last = work.layout is torch.channels_last
    teacher = kd.Teacher(net, terms, dtype=half, autocast=autocast or half is None, channels_last=last)
    return teacher, kd.Distiller(student, terms, dtype=half).to(work.images.device)


PURE = "kdlib, pure bf16"
"""kdlib with teachers that compute in bf16 throughout, weights and all, instead of under autocast."""
LOGITS = "kdlib (logits only)"
"""kdlib with labels and soft targets, which is what timm.task does."""
OURS = ("floor", "by hand", "kdlib", PURE, LOGITS)


def contestants(work: str) -> dict[str, Build]:
    """By name; peers have the blocks objective alone, for which they have the parts."""
    pure = partial(by_kdlib, autocast=False)
    ours: dict[str, Build] = {"floor": floor, "by hand": by_hand, "kdlib": by_kdlib, PURE: pure}
    if work != "blocks":
        return ours
    ours[LOGITS] = partial(by_kdlib, logits_only=True)
    peers: dict[str, Build] = {"torchdistill": by_torchdistill, "nvidia-modelopt": by_modelopt}
    return ours | peers | {"timm.task (logits only)": by_timm}


def modes(work: str, who: str, cpu: bool) -> list[str | None]:
    """None is eager; peers run as they come."""
    if who in (PURE, LOGITS):
        return [] if cpu else ["default"]
    if cpu or who not in OURS:
        return [None]
    if work != "small":
        return [None, "default", *(["compiled-graphs"] if who == "kdlib" else [])]
    return [None, "default", "reduce-overhead", *(compiling.RECORDED if who == "kdlib" else ())]
