"""Documents that hypothesis makes up: each is a recipe, or lines that name it; never a traceback."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as some

from kdlib import launch
from kdlib.recipe import Recipe
from kdlib.yaml12 import dump

EXAMPLES = 500
WHOLE: dict[str, Any] = {
    "student": {"name": "resnet18", "init": "wide"},
    "teachers": {"wide": {"name": "resnet18", "weights": "w.safetensors", "sha256": "0123abcd"}},
    "terms": {
        "soft": {"loss": {"name": "soft_target", "temperature": 2.0}, "weight": 0.5, "slope": {"last": 0.1}},
        "block": {
            "loss": "feature_mse",
            "student": "layer1",
            "teacher": "wide.layer1",
            "adapter": "linear",
            "until": 3,
        },
        "label": {"loss": "cross_entropy"},
    },
    "data": {"name": "folder", "root": "x", "batch_size": 8, "augment": {"mixup": 0.2, "crop_scale": [0.5, 1.0]}},
    "epochs": 4,
    "optimizer": {"name": "adamw", "lr": 0.001, "betas": [0.9, 0.99]},
    "schedule": {"warmup_epochs": 1},
    "ema": {"decay": 0.99},
    "output": "runs/x",
}
LEAVES = (
    some.none() | some.booleans() | some.integers() | some.floats() | some.text(max_size=12)
    | some.sampled_from(["@labels", "wide", "wide.layer2", "../x", "dkd", "resnet50", "80/120", "${HOME}", "{0}"])
)  # fmt: skip
TREES = some.recursive(
    LEAVES, lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


def places(tree: Any) -> list[tuple[Any, Any]]:
    """(holder, key) of everything in a document."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else []
    return [place for key in keys for place in [(tree, key), *places(tree[key])]]


@some.composite
def documents(draw: Callable[[Any], Any]) -> str:
    """A whole recipe with one to three places changed, emptied or added to, or any tree at all; as text."""
    if draw(some.integers(0, 9)) == 0:
        tree = draw(TREES)
    else:
        tree = copy.deepcopy(WHOLE)
        for _ in range(draw(some.integers(1, 3))):
            found = places(tree)
            holder, key = found[draw(some.integers(0, len(found) - 1))]
            what = draw(some.sampled_from(["value", "gone", "key"]))
            if what == "gone" and isinstance(holder, dict):
                del holder[key]
            elif what == "key" and isinstance(holder, dict):
                holder[draw(some.text(max_size=8) | some.sampled_from(["name", "base", "loss", "weights"]))] = draw(
                    TREES
                )
            else:
                holder[key] = draw(TREES)
            if not places(tree):
                break
    try:
        text = dump(tree)
    except (ValueError, UnicodeError):
        text = repr(tree)
    if draw(some.integers(0, 4)) == 0:
        at = draw(some.integers(0, len(text)))
        text = text[:at] + draw(some.text(alphabet="{}[]:-&*!'\"#|>%@\n\t é~", max_size=3)) + text[at:]
    return text


@pytest.mark.fault("fuzz")
def test_any_document_is_a_recipe_or_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    codes: list[int] = []

    @seed(1)
    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(documents())
    def check(text: str) -> None:
        path = Path("in/x.yaml")
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        accepted: list[Recipe] = []
        code = launch.main(accepted.append, path, [str(path)])
        said = capsys.readouterr()
        codes.append(code)
        if code == 0:
            assert isinstance(accepted[0], Recipe) and not said.err
        else:
            assert code == 2 and not accepted
            lines = said.err.splitlines()
            assert lines and all(line.startswith("in/x.yaml: ") and line.isprintable() for line in lines), said.err
        assert "Traceback" not in said.out + said.err
        assert [p.name for p in tmp_path.iterdir()] == ["in"] and len(list(path.parent.iterdir())) == 1

    check()
    assert codes.count(0) > 20 and codes.count(2) > 200, (codes.count(0), codes.count(2))
    record_property("cases", len(codes))
