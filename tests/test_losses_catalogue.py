"""The catalogue is what it was promised to be: names and arguments, what docstrings say, how the code is written."""

from __future__ import annotations

import ast
import inspect
import json
import re
from pathlib import Path

import pytest
from laws import SPECIAL, choices
from test_losses_definitions import ARGUMENTS

from kdlib import losses
from kdlib.losses import LOSSES

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "kdlib" / "losses").glob("*.py"))

PROMISED: dict[str, tuple[str, str, str]] = {
    "soft_target": ("SoftTarget", "logits", "temperature"),
    "hard_label": ("HardLabel", "logits", "label_smoothing"),
    "cross_entropy": ("CrossEntropy", "logits", ""),
    "dkd": ("DKD", "logits", "alpha, beta, temperature"),
    "nkd": ("NKD", "logits", "gamma, temperature"),
    "dist": ("DIST", "logits", "beta, gamma, temperature"),
    "ttm": ("TTM", "logits", "exponent"),
    "wttm": ("WTTM", "logits", "exponent"),
    "ofa": ("OFA", "logits", "eps, temperature"),
    "class_correlation": ("ClassCorrelation", "logits", "temperature"),
    "batch_correlation": ("BatchCorrelation", "logits", "temperature"),
    "binary": ("Binary", "logits", ""),
    "standardized": ("Standardized", "logits", "loss"),
    "learnable_temperature": ("LearnableTemperature", "logits", "loss"),
    "top_k": ("TopK", "logits", "loss, k"),
    "feature_mse": ("FeatureMSE", "tokens", "normalize"),
    "cosine_distance": ("CosineDistance", "tokens", ""),
    "attention_transfer": ("AttentionTransfer", "map", "p, variant"),
    "channel_wise": ("ChannelWise", "map", "temperature"),
    "channel_mean": ("ChannelMean", "map", ""),
    "pkd": ("PKD", "map", ""),
    "nst": ("NST", "map", ""),
    "fsp": ("FSP", "lists of map", ""),
    "hierarchical_context": ("HierarchicalContext", "lists of map", ""),
    "review_kd": ("ReviewKD", "lists of map", ""),
    "mgd": ("MGD", "map", "mask"),
    "vid": ("VID", "map", ""),
    "ofd": ("OFD", "map", ""),
    "sim_kd": ("SimKD", "map", ""),
    "srrl": ("SRRL", "map", ""),
    "vk_d": ("VkD", "tokens", ""),
    "gram_relation": ("GramRelation", "tokens", "normalize"),
    "ickd": ("ICKD", "map", "variant"),
    "similarity_preserving": ("SimilarityPreserving", "raw", ""),
    "rkd_distance": ("RKDDistance", "embedding", ""),
    "rkd_angle": ("RKDAngle", "embedding", ""),
    "pkt": ("PKT", "embedding", "eps"),
    "correlation_congruence": ("CorrelationCongruence", "embedding", ""),
    "cckd": ("CCKD", "embedding", "kernel, gamma, max_p, reduction"),
    "info_nce": ("InfoNCE", "embedding", "temperature"),
    "crd": ("CRD", "embedding", ""),
}
"""By the recipe's name: class, view, and arguments in their order. A stranger calls the losses by these."""


def test_every_promised_loss_is_there_and_no_other():
    assert PROMISED.keys() == LOSSES.keys()


@pytest.mark.parametrize("name", PROMISED)
def test_names_and_arguments_are_as_promised(name):
    called, view, arguments = PROMISED[name]
    loss = LOSSES[name]
    assert loss is getattr(losses, called)
    assert ("lists of " if loss.lists else "") + loss.view == view
    wanted = arguments.split(", ") if arguments else []
    assert list(inspect.signature(loss).parameters)[: len(wanted)] == wanted


def test_choices_are_as_promised():
    offered = {
        "feature_mse": {"normalize": {None, "l2", "layer", "batch"}},
        "attention_transfer": {"variant": {"code", "paper"}},
        "ickd": {"variant": {"cifar", "imagenet"}},
        "mgd": {"mask": {"channel", "spatial"}},
    }
    for name, arguments in offered.items():
        for argument, values in arguments.items():
            default = inspect.signature(LOSSES[name]).parameters[argument].default
            found = {chosen[argument] for chosen in choices(name) if argument in chosen} | {default}
            assert found == values, name
    assert inspect.signature(losses.GramRelation).parameters["normalize"].default is True


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_docstring_says_all_that_a_user_must_know(name):
    loss = LOSSES[name]
    text = inspect.cleandoc(loss.__doc__)
    assert re.search(r"``[^`]*[−·()‖²/][^`]*``", "".join(text.split("\n\n")[:2])), "a formula at the top"
    paragraph = re.search(r"Shapes:(.*?)\n\n", text, re.DOTALL)
    assert paragraph, "shapes, in a paragraph"
    if loss.view != "raw":
        axes = {"logits": "B, K", "embedding": "B, D", "tokens": "B, N, C", "map": r"B, C"}[loss.view]
        assert re.search(rf"\({axes}", text), "shapes of the view"
    assert re.search(r"\b([Mm]ean|[Ss]um|divide[sd]?)\b|/ (B|\(|K|C)|·? ?Σ|held loss", text), "a reduction"
    floor = re.search(r"Floor: (.{3,})", text, re.DOTALL)
    assert floor, "a floor"
    assert re.match(r"0\b", floor[1]) or loss.floor is None or "held loss" in floor[1], "the floor that it declares"
    wants = getattr(loss, "against", ("teacher",))
    if "labels" in wants:
        assert "Needs labels" in text
        assert re.search(r"soft (ones|labels)[^.]*allowed", text)
    elif "loss" not in inspect.signature(loss).parameters:
        assert re.search(r"[Nn]o labels", text)
    else:
        assert "Labels:" in text
    assert re.search(r"arXiv:\d{4}\.\d{5}|\(no arXiv version\)", text), "a citation"
    assert ">>>" in text, "an example"
    signature = inspect.signature(loss).parameters
    for argument in signature:
        assert re.search(rf"^ *([\w, ]+, )?{argument}(, [\w, ]+)?: ", text, re.MULTILINE), f"what {argument} is"
    assert "Raises:\n" in text, "its errors"


def test_a_variant_is_told_in_the_docstring():
    """All of its choices by name."""
    for name, loss in LOSSES.items():
        for chosen in choices(name):
            for argument, value in chosen.items():
                if argument in ("variant", "mask", "kernel", "reduction", "normalize"):
                    assert f'"{value}"' in loss.__doc__, (name, argument, value)


def test_a_number_in_the_formula_is_told_in_the_docstring():
    """One that an argument neither names nor changes."""
    for loss, told in ((losses.FeatureMSE, "variance + 1e-5"), (losses.PKD, "1e-6"), (losses.DIST, "1e-8")):
        assert told in loss.__doc__, loss.__name__


DIFFER = {
    "attention_transfer": "variant", "ickd": "variant", "fsp": "variant", "mgd": "mask", "ofa": "variant",
    "dist": "variant", "crd": "variant", "standardized": "variant", "pkt": "variant", "cckd": "variant",
    "ofd": "reduction",
}  # fmt: skip
"""Losses whose published code and paper, or two published codes, differ, and the argument that says which."""


def test_where_code_and_paper_differ_an_argument_says_which():
    for name, argument in DIFFER.items():
        assert argument in inspect.signature(LOSSES[name]).parameters, name
    chosen = {n for n in LOSSES if "variant" in inspect.signature(LOSSES[n]).parameters}
    assert chosen == {name for name, argument in DIFFER.items() if argument == "variant"}


def test_every_loss_may_be_called_by_position_alone():
    """No argument without a default beyond what a wrapper holds, so that a recipe may name the loss alone."""
    for name, loss in LOSSES.items():
        needed = [k for k, p in inspect.signature(loss).parameters.items() if p.default is p.empty]
        assert needed == {"top_k": ["loss", "k"]}.get(name, ["loss"] if "loss" in PROMISED[name][2] else []), name
    assert SPECIAL.keys() | ARGUMENTS.keys() <= LOSSES.keys()


# how the code is written

LOOPS = {
    "base.py": {"zip(self.weights, self.parts, strict=True)", "against", "parts", "labelled", "x", "self.parts"},
}


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_nothing_waits_for_the_device(path):
    """No ``.item()`` and its like, which read a number back, and no boolean index, whose size must be read back."""
    tree = ast.parse(path.read_text())
    for call in calls(tree):
        if isinstance(call.func, ast.Attribute):
            banned = {"item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "unique", "argwhere", "is_nonzero"}
            assert call.func.attr not in banned, f"line {call.lineno}: .{call.func.attr}()"
            assert call.func.attr != "where" or len(call.args) == 3, f"line {call.lineno}: where() of a condition alone"
        if isinstance(call.func, ast.Name) and call.func.id in ("float", "int", "bool"):
            given = ast.unparse(call)
            tensors = ("student", "teacher", "labels", "x.", "logits", "x)", "x,")
            assert not any(part in given for part in tensors), f"line {call.lineno}: {given}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript):
            inside = list(ast.walk(node.slice))
            assert not any(isinstance(part, ast.Compare | ast.Invert) for part in inside), (
                f"line {node.lineno}: a boolean index {ast.unparse(node)}"
            )


TURNS = re.compile(
    r"range\((len\(|\w+\.shape|batch|channels|samples)|\bunbind\(|\.split\(|\.chunk\(|enumerate\((student|x)\)"
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_python_loop_runs_over_a_batch_or_its_channels(path):
    """Loops go over levels, sides and parts, none over an axis of a tensor."""
    for node in ast.walk(ast.parse(path.read_text())):
        over = [node.iter] if isinstance(node, ast.For | ast.comprehension) else []
        assert not isinstance(node, ast.While), f"line {node.lineno}: a loop without a known end"
        for loop in over:
            text = ast.unparse(loop)
            assert not TURNS.search(text), text
            assert text not in ("x", "s", "t", "logits", "labels", "indices", "scores") or path.stem == "base", text


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_logarithms_are_not_taken_of_softmaxes(path):
    text = path.read_text()
    assert not re.search(r"softmax\([^\n]*\)\.log\(\)|log\([^\n]*softmax\(|sigmoid\([^\n]*\)\.log\(\)", text)
    assert not re.search(r'kl_div\([^\n]*reduction="mean"', text)


def test_every_forward_is_of_full_precision():
    """But a sum's, whose parts are, and two that take some tensors as they come and compute in float32 themselves."""
    others = {"Sum": None, "FeatureMSE": "_plain", "GramRelation": "_plain"}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and f"{node.name}" in losses.__all__:
                for method in node.body:
                    if isinstance(method, ast.FunctionDef) and method.name == others.get(node.name, "forward"):
                        assert [ast.unparse(d) for d in method.decorator_list] == ["full_precision"], node.name


# what was measured

MEASURED = json.loads((ROOT / "benchmarks" / "results" / "losses.json").read_text())


def test_the_stored_benchmark_has_every_loss_both_passes_time_and_memory():
    assert sorted(row["loss"] for row in MEASURED["rows"]) == sorted(LOSSES)
    assert "NVIDIA" in MEASURED["device"]
    for row in MEASURED["rows"]:
        assert row["shapes"][0][0] in (64, 256), "the batch"
        for who in ("ours", "plain"):
            for what in ("forward_ms", "backward_ms", "forward_mib", "backward_mib"):
                assert row[who][what] > 0, (row["loss"], who, what)
        if row["loss"] not in ("mgd", "crd"):  # these draw numbers
            assert row["ours"]["value"] == pytest.approx(row["plain"]["value"], rel=1e-4), row["loss"]
