"""The definitions of the losses, written as plainly as they read: what the catalogue is compared with.

``PLAIN`` maps a loss's name to a function of the loss (for its arguments and parameters) and its inputs. Nothing here
is fast, saves memory or is safe at extremes; tests/test_losses_definitions.py compares values and gradients in float64,
and benchmarks/losses.py measures the losses against these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PLAIN: dict[str, Callable[..., Tensor]] = {}


def plain(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    PLAIN[function.__name__] = function
    return function


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Sum over classes of ``p log(p / q)``."""
    return (p * (p / q).log()).sum(-1)


def length(x: Tensor, dim: Any = -1) -> Tensor:
    return x.square().sum(dim, keepdim=True).sqrt()


@plain
def soft_target(loss: Any, s: Tensor, t: Tensor) -> Tensor:
    return kl((t / loss.temperature).softmax(1), (s / loss.temperature).softmax(1)).mean() * loss.temperature**2


@plain
def hard_label(loss: Any, s: Tensor, t: Tensor) -> Tensor:
    return cross_entropy(loss, s, t.argmax(1))


@plain
def cross_entropy(loss: Any, s: Tensor, labels: Tensor) -> Tensor:
    wanted = F.one_hot(labels, s.shape[1]) if labels.ndim == 1 else labels
    wanted = (1 - loss.label_smoothing) * wanted + loss.label_smoothing / s.shape[1]
    return -(wanted * s.softmax(1).log()).sum(1).mean()


def other_classes(x: Tensor, labels: Tensor) -> Tensor:
    """Logits of all classes but the label, ``(B, K − 1)``."""
    return torch.stack([torch.cat([row[:y], row[y + 1 :]]) for row, y in zip(x, labels.tolist(), strict=True)])


@plain
def dkd(loss: Any, s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    s, t = s / loss.temperature, t / loss.temperature
    s_y, t_y = (x.softmax(1)[torch.arange(len(x)), labels] for x in (s, t))
    target = kl(torch.stack([t_y, 1 - t_y], 1), torch.stack([s_y, 1 - s_y], 1))
    others = kl(other_classes(t, labels).softmax(1), other_classes(s, labels).softmax(1))
    return loss.temperature**2 * (loss.alpha * target + loss.beta * others).mean()


@plain
def nkd(loss: Any, s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    s_y, t_y = (x.softmax(1)[torch.arange(len(x)), labels] for x in (s, t))
    n_s, n_t = ((other_classes(x, labels) / loss.temperature).softmax(1) for x in (s, t))
    return -(t_y * s_y.log()).mean() - loss.gamma * loss.temperature**2 * (n_t * n_s.log()).sum(1).mean()


@plain
def ofa(loss: Any, s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    q, p = (s / loss.temperature).softmax(1), (t / loss.temperature).softmax(1)
    y = F.one_hot(labels, s.shape[1])
    if loss.variant == "paper":
        return -(((1 + p) ** loss.eps * y + p * (1 - y)) * q.log()).sum(1).mean()
    return -(((p + y) ** loss.eps - y) * q.log()).sum(1).mean()


@plain
def dist(loss: Any, s: Tensor, t: Tensor) -> Tensor:
    p, q = (s / loss.temperature).softmax(1), (t / loss.temperature).softmax(1)
    paper = loss.variant == "paper"

    def rho(a: Tensor, b: Tensor) -> Tensor:
        a, b = a - a.mean(), b - b.mean()
        return (a * b).sum() / (a.norm() * b.norm() + (0 if paper else 1e-8))

    inter = 1 - torch.stack([rho(a, b) for a, b in zip(p, q, strict=True)]).mean()
    intra = 1 - torch.stack([rho(a, b) for a, b in zip(p.T, q.T, strict=True)]).mean()
    return (1 if paper else loss.temperature**2) * (loss.beta * inter + loss.gamma * intra)


@plain
def ttm(loss: Any, s: Tensor, t: Tensor) -> Tensor:
    r = t.softmax(1) ** loss.exponent
    return kl(r / r.sum(1, keepdim=True), s.softmax(1)).mean()


@plain
def wttm(loss: Any, s: Tensor, t: Tensor) -> Tensor:
    r = t.softmax(1) ** loss.exponent
    return (r.sum(1) * kl(r / r.sum(1, keepdim=True), s.softmax(1))).mean()


@plain
def class_correlation(loss: Any, s: Tensor, t: Tensor) -> Tensor:
    p, q = (s / loss.temperature).softmax(1), (t / loss.temperature).softmax(1)
    return (p.T @ p - q.T @ q).square().sum() / s.shape[1]


@plain
def batch_correlation(loss: Any, s: Tensor, t: Tensor) -> Tensor:
    p, q = (s / loss.temperature).softmax(1), (t / loss.temperature).softmax(1)
    return (p @ p.T - q @ q.T).square().sum() / s.shape[0]


@plain
def binary(loss: Any, s: Tensor, t: Tensor) -> Tensor:
    p, q = (t / loss.temperature).sigmoid(), (s / loss.temperature).sigmoid()
    return kl(torch.stack([p, 1 - p], -1), torch.stack([q, 1 - q], -1)).sum(1).mean() * loss.temperature**2


@plain
def standardized(loss: Any, s: Tensor, t: Tensor) -> Tensor:
    def z(x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        if loss.variant == "paper":
            return centred / centred.square().mean(1, keepdim=True).sqrt()
        return centred / (x.std(1, keepdim=True) + 1e-7)

    return soft_target(loss.loss, z(s), z(t))


@plain
def learnable_temperature(loss: Any, s: Tensor, t: Tensor) -> Tensor:
    temperature = loss.start + loss.span * loss.theta.detach()[0].sigmoid()
    return kl((t / temperature).softmax(1), (s / temperature).softmax(1)).mean() * temperature**2


@plain
def top_k(loss: Any, s: Tensor, t: Tensor) -> Tensor:
    order = t.argsort(1, descending=True)[:, : loss.k]
    return soft_target(loss.loss, s.gather(1, order), t.gather(1, order))


def standard(x: Tensor, dim: Any) -> Tensor:
    return (x - x.mean(dim, keepdim=True)) / (x.var(dim, unbiased=False, keepdim=True) + 1e-5).sqrt()


@plain
def feature_mse(loss: Any, s: Tensor, t: Tensor) -> Tensor:
    """Of tokens."""
    change: dict[str | None, Callable[[Tensor], Tensor]] = {
        None: lambda x: x,
        "l2": lambda x: x / length(x),
        "layer": lambda x: standard(x, -1),
        "batch": lambda x: standard(x, (0, 1)),
    }
    return (change[loss.normalize](s) - change[loss.normalize](t)).square().mean()


@plain
def cosine_distance(loss: Any, s: Tensor, t: Tensor) -> Tensor:
    return (1 - (s * t).sum(-1) / (length(s) * length(t))[..., 0]).mean()


def shrink(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    grid = (min(s.shape[2], t.shape[2]), min(s.shape[3], t.shape[3]))
    return F.adaptive_avg_pool2d(s, grid), F.adaptive_avg_pool2d(t, grid)


@plain
def attention_transfer(loss: Any, s: Tensor, t: Tensor) -> Tensor:
    if loss.variant == "paper":
        a, b = (x.abs().pow(loss.p).sum(1).flatten(1) for x in shrink(s, t))
        return length(a / length(a) - b / length(b)).mean()
    a, b = (x.pow(loss.p).mean(1).flatten(1) for x in shrink(s, t))
    return (a / length(a) - b / length(b)).square().mean()


@plain
def channel_wise(loss: Any, s: Tensor, t: Tensor) -> Tensor:
    p, q = ((x.flatten(2) / loss.temperature).softmax(-1) for x in (t, s))
    return kl(p, q).mean() * loss.temperature**2


@plain
def channel_mean(loss: Any, s: Tensor, t: Tensor) -> Tensor:
    return (s.mean((2, 3)) - t.mean((2, 3))).square().mean()


@plain
def pkd(loss: Any, s: Tensor, t: Tensor) -> Tensor:
    s = F.interpolate(s, t.shape[2:], mode="bilinear")
    s, t = ((x - x.mean((0, 2, 3), True)) / (x.std((0, 2, 3), keepdim=True) + 1e-6) for x in (s, t))
    return (s - t).square().mean() / 2


@plain
def nst(loss: Any, s: Tensor, t: Tensor) -> Tensor:
    s, t = (x.flatten(2) / length(x.flatten(2)) for x in shrink(s, t))

    def k(a: Tensor, b: Tensor) -> Tensor:
        return (a[:, :, None] * b[:, None]).sum(-1).square().mean()

    return k(t, t) + k(s, s) - 2 * k(s, t)


@plain
def fsp(loss: Any, s: list[Tensor], t: list[Tensor]) -> Tensor:
    def flow(a: Tensor, b: Tensor) -> Tensor:
        a, b = shrink(a, b)
        return (a.flatten(2)[:, :, None] * b.flatten(2)[:, None]).mean(-1)

    gaps = [flow(s[k], s[k + 1]) - flow(t[k], t[k + 1]) for k in range(len(s) - 1)]
    if loss.variant == "paper":
        return sum(gap.square().sum() / len(gap) for gap in gaps)
    return sum(gap.square().mean() for gap in gaps)


@plain
def hierarchical_context(loss: Any, s: list[Tensor], t: list[Tensor]) -> Tensor:
    total: Any = 0
    for a, b in zip(s, t, strict=True):
        grids = [size for size in (4, 2, 1) if size < a.shape[2]]
        gaps = [(a - b).square().mean()]
        gaps += [F.adaptive_avg_pool2d(a - b, size).square().mean() for size in grids]
        weights = [2.0**-i for i in range(len(gaps))]
        total = total + sum(w * gap for w, gap in zip(weights, gaps, strict=True)) / sum(weights)
    return total


@plain
def review_kd(loss: Any, s: list[Tensor], t: list[Tensor]) -> Tensor:
    outputs, carry = [], None
    for level in range(len(s) - 1, -1, -1):
        fusion = loss.fusions[level]
        x = fusion.enter(s[level])
        if carry is not None:
            carry = F.interpolate(carry, x.shape[2:])
            gates = fusion.gate(torch.cat([x, carry], 1)).sigmoid()
            x = x * gates[:, [0]] + carry * gates[:, [1]]
        carry = F.interpolate(x, t[level].shape[2:])
        outputs.append(fusion.leave(carry))
    return hierarchical_context(None, outputs[::-1], t)


@plain
def mgd(loss: Any, s: Tensor, t: Tensor) -> Tensor:
    x = loss.align(s)
    shape = (*x.shape[:2], 1, 1) if loss.mask == "channel" else (len(x), 1, *x.shape[2:])
    mask = torch.rand(shape, device=s.device) >= loss.ratio
    return loss.alpha / len(s) * (loss.generate(x * mask) - t).square().sum()


@plain
def vid(loss: Any, s: Tensor, t: Tensor) -> Tensor:
    s, t = shrink(s, t)
    v = ((1 + loss.rho.exp()).log() + loss.eps)[None, :, None, None]
    return 0.5 * ((loss.mean(s) - t).square() / v + v.log()).mean()


@plain
def ofd(loss: Any, s: Tensor, t: Tensor) -> Tensor:
    s, m = loss.connect(s), torch.maximum(t, loss.margin)
    total = torch.where((s > m) | (m > 0), (s - m).square(), 0.0).sum()
    return total if loss.reduction == "sum" else total / len(s)


@plain
def srrl(loss: Any, s: Tensor, t: Tensor) -> Tensor:
    s, t = loss.connect(s).mean((2, 3)), t.mean((2, 3))
    head = loss.held[0]
    return loss.alpha * (s - t).square().mean() + loss.beta * (head(s) - head(t)).square().mean()


@plain
def sim_kd(loss: Any, s: Tensor, t: Tensor) -> Tensor:
    s, t = shrink(s, t)
    return (loss.project(s) - t).square().mean()


@plain
def vk_d(loss: Any, s: Tensor, t: Tensor) -> Tensor:
    t = t.mean(1)
    t = (t - t.mean(1, keepdim=True)) / (t.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    gap = (s.mean(1) @ loss.weight.T - t).abs()
    return torch.where(gap < 1, gap**2 / 2, gap - 0.5).mean()


@plain
def gram_relation(loss: Any, s: Tensor, t: Tensor) -> Tensor:
    s, t = (x / length(x) if loss.normalize else x for x in (s, t))
    return (s @ s.mT - t @ t.mT).square().mean()


@plain
def ickd(loss: Any, s: Tensor, t: Tensor) -> Tensor:
    a, b = (x.flatten(2) @ x.flatten(2).mT for x in shrink(s, t))
    twice = len(s) if loss.variant == "imagenet" else 1
    return (a / length(a) - b / length(b)).square().sum() / (s.shape[0] * s.shape[1] * twice)


@plain
def similarity_preserving(loss: Any, s: Tensor, t: Tensor) -> Tensor:
    a, b = (x.flatten(1) @ x.flatten(1).T for x in (s, t))
    return (a / length(a) - b / length(b)).square().sum() / len(s) ** 2


def huber(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 1, x**2 / 2, x.abs() - 0.5)


@plain
def rkd_distance(loss: Any, s: Tensor, t: Tensor) -> Tensor:
    def relative(x: Tensor) -> Tensor:
        square = (x[:, None] - x[None]).square().sum(-1)
        apart = 1 - torch.eye(len(x), dtype=x.dtype, device=x.device)
        d = (square + 1 - apart).sqrt() * apart
        return d / d[d > 0].mean()

    return huber(relative(s) - relative(t)).mean()


@plain
def rkd_angle(loss: Any, s: Tensor, t: Tensor) -> Tensor:
    def cosines(x: Tensor) -> Tensor:
        e = F.normalize(x[None] - x[:, None], dim=-1)
        return torch.einsum("ijd,ikd->ijk", e, e)

    return huber(cosines(s) - cosines(t)).mean()


@plain
def pkt(loss: Any, s: Tensor, t: Tensor) -> Tensor:
    def q(x: Tensor) -> Tensor:
        x = x / (length(x) + loss.eps)
        alike = (x @ x.T + 1) / 2
        if loss.variant == "paper":
            alike = alike * (1 - torch.eye(len(x), dtype=x.dtype, device=x.device))
        return alike / alike.sum(1, keepdim=True)

    values = q(t) * ((q(t) + loss.eps) / (q(s) + loss.eps)).log()
    return values.sum() if loss.variant == "paper" else values.mean()


@plain
def correlation_congruence(loss: Any, s: Tensor, t: Tensor) -> Tensor:
    gap = (s - t).abs()
    return sum((gap[i] * gap[i + 1]).sum() for i in range(len(gap) - 1)) / (len(gap) - 1)


@plain
def cckd(loss: Any, s: Tensor, t: Tensor) -> Tensor:
    def kernel(x: Tensor) -> Tensor:
        if loss.kernel == "bilinear":
            return x @ x.T
        terms = torch.zeros(len(x), len(x), dtype=x.dtype, device=x.device)
        factorial = 1
        for p in range(loss.max_p + 1):
            factorial *= max(p, 1)
            terms = terms + (2 * loss.gamma) ** p / factorial * (x @ x.T) ** p
        return torch.exp(torch.tensor(-2 * loss.gamma, dtype=x.dtype)) * terms

    total = (kernel(s) - kernel(t)).square().sum()
    total = total if loss.variant == "paper" else total.sqrt()
    return total if loss.reduction == "sum" else total / len(s) ** 2


@plain
def info_nce(loss: Any, s: Tensor, t: Tensor) -> Tensor:
    cosines = (s / length(s)) @ (t / length(t)).T / loss.temperature
    there = -cosines.softmax(1).diagonal().log().mean()
    return (there - cosines.softmax(0).diagonal().log().mean()) / 2 if loss.symmetric else there


@plain
def crd(loss: Any, s: Tensor, t: Tensor, indices: Tensor) -> Tensor:
    drawn = torch.randint(loss.samples, (len(s), loss.negatives), device=s.device)
    rows = torch.cat([indices[:, None], drawn], 1)
    total: Any = 0
    for layer, x, memory in (
        (loss.embed_student, s, loss.memory_teacher),
        (loss.embed_teacher, t, loss.memory_student),
    ):
        u = layer(x)
        e = ((memory[rows] * (u / length(u))[:, None]).sum(-1) / loss.temperature).exp()
        paper = loss.variant == "paper"
        e = e if paper else e / (e.detach().mean() * loss.samples)
        c, eps = loss.negatives / loss.samples, 0 if paper else 1e-7
        positive = (e[:, 0] / (e[:, 0] + c + eps)).log().sum()
        total = total - (positive + (c / (e[:, 1:] + c + eps)).log().sum()) / len(s)
    return total
