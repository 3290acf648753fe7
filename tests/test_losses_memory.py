"""No loss makes a tensor that its algebra does not need: sizes at ImageNet's shapes, both passes, without data."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kdlib.losses import LOSSES, rkd

BENCH = Path(__file__).parents[1] / "benchmarks" / "losses.py"
spec = importlib.util.spec_from_file_location("bench_losses", BENCH)
bench = importlib.util.module_from_spec(spec)
sys.modules["bench_losses"] = bench
spec.loader.exec_module(bench)

INHERENT = {
    "rkd_angle": lambda batch, size: rkd.PIECE,
    "crd": lambda batch, size: batch * (16384 + 1) * 128,
    "review_kd": lambda batch, size: 2 * 512 * batch * 56 * 56,
    "vid": lambda batch, size: size,
}
"""Sizes that are in the definition itself: directions of some anchors, all negatives, two hidden maps side by side."""


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operation has made."""

    def __init__(self):
        super().__init__()
        self.numel, self.where = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not func._schema.is_mutable:
            for x in result if isinstance(result, tuple | list) else [result]:
                if isinstance(x, torch.Tensor) and x.numel() > self.numel:
                    self.numel, self.where = x.numel(), str(func)
        return result


def largest(compute, name, backward=True):
    stay = mock.patch.object(nn.Module, "to", lambda self, *_: self)
    share = mock.patch("kdlib.losses.learned.deepcopy", lambda head: head)
    with FakeTensorMode(), stay, share:
        loss, inputs, shapes = bench.prepare(name, torch.device("cpu"), small=False)
        for x in inputs[0] if isinstance(inputs[0], list) else inputs[:1]:
            x.requires_grad_()
        with Largest() as seen:
            value = compute(loss)(*inputs)
            if backward:
                value.backward()
    return seen, shapes, max((p.numel() for p in loss.parameters()), default=0)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_nothing_is_larger_than_the_inputs(name):
    seen, shapes, parameters = largest(lambda loss: loss, name)
    size = max(torch.Size(shape).numel() for shape in shapes)
    limit = max(size, shapes[0][0] ** 2, parameters)
    if name in INHERENT:
        limit = max(limit, INHERENT[name](shapes[0][0], size))
    assert seen.numel <= limit, (
        f"{seen.where} makes {seen.numel} numbers, {seen.numel / size:.1f} times the largest input"
    )


@pytest.mark.parametrize("name", ["nst", "fsp", "rkd_angle", "gram_relation", "ickd", "class_correlation"])
def test_the_plain_definition_is_caught(name):
    """The measure itself: the definitions that are known to be wasteful exceed the limit."""
    seen, shapes, _ = largest(lambda loss: lambda *x: bench.PLAIN[name](loss, *x), name, backward=False)
    assert seen.numel > 2 * max(torch.Size(shape).numel() for shape in shapes)


def test_what_does_not_fit_is_said_to_and_the_rest_goes_on(monkeypatch, capsys, tmp_path):
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(bench.PLAIN, "pkt", too_large)
    out = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["losses.py", "--cpu", "--out", str(out), "--only", "pkt", "dkd"])
    bench.main()
    assert "out of memory" in capsys.readouterr().out
    pkt, dkd = json.loads(out.read_text())["rows"]
    assert pkt["plain"] == {"failed": "out of memory"}
    assert pkt["ours"]["forward_ms"] > 0 < dkd["plain"]["forward_ms"]


def test_the_benchmark_knows_the_catalogue():
    assert set(bench.SHAPES) <= set(LOSSES)
    assert all(isinstance(bench.make(name, small=True), nn.Module) for name in LOSSES)


@pytest.mark.slow
def test_a_compiler_keeps_tokens_of_the_relation_in_their_own_precision():
    """What reaches the backward pass of few half-precision tokens is no float32 copy of them."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    kept = []

    def forward(graph, _):
        (answer,) = (node for node in graph.graph.nodes if node.op == "output")
        kept.extend(node.meta["val"] for node in answer.args[0] if isinstance(node, torch.fx.Node))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
    )
    relation, after = LOSSES["gram_relation"](), torch.randn(16, 16).bfloat16()

    def step(x, teacher):
        tokens = torch.sin(x).bfloat16()
        return (tokens @ after).float().sum() + relation(tokens, teacher)  # the next layer reads them, too

    x, teacher = torch.randn(2, 12, 16, requires_grad=True), torch.randn(2, 12, 16).bfloat16()
    torch.compile(step, backend=backend, fullgraph=True)(x, teacher).backward()
    kinds = [value.dtype for value in kept if isinstance(value, torch.Tensor) and value.shape == x.shape]
    assert kinds.count(torch.float32) == 1, "x itself, for the sine"
