"""Pages with generated tables hold what benchmarks/results says, and what they mark is what there is."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT

DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))

import generated  # noqa: E402


def maker(page: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"make_{page}", DOCS / f"make_{page}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["distributed", "performance", "riformer"])
def test_the_tables_are_up_to_date(page: str) -> None:
    module = maker(page)
    stored = module.PAGE.read_text()
    assert stored == generated.fill(stored, module.TABLES), f"run docs/make_{page}.py"


@pytest.mark.parametrize("page", ["distributed", "performance", "riformer"])
def test_a_changed_result_changes_the_page(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in generated.RESULTS.glob("*.json"):
        changed = re.sub(r'("(?:ratio|images_per_second|moved)": )', r"\g<1>7", path.read_text())
        (tmp_path / path.name).write_text(changed)
    monkeypatch.setattr(generated, "RESULTS", tmp_path)
    module = maker(page)
    stored = module.PAGE.read_text()
    assert stored != generated.fill(stored, module.TABLES)


def test_a_mark_without_a_table_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"the page marks \['a'\], there are tables for \['b'\]"):
        generated.fill("<!-- table: a -->\n<!-- end -->", {"b": str})


def test_the_readmes_headline_is_what_was_measured() -> None:
    found = json.loads((generated.RESULTS / "throughput.json").read_text())
    best = {row["model"]: row["images_per_second"] for row in found["best"]}
    readme = (ROOT / "README.md").read_text()
    for rival in ("poolformer_m36", "gfnet_h_b"):
        assert f"| {best[rival]:,.0f} | {best['riformer_m36'] / best[rival]:.2f} × as fast" in readme
    assert f"| {best['riformer_m36']:,.0f} | |" in readme


def test_the_readme_tells_a_steps_measured_cost() -> None:
    rows = json.loads((generated.RESULTS / "step.json").read_text())["rows"]
    blocks = {(row["who"], row["mode"]): row for row in rows if row["work"] == "blocks"}
    readme = " ".join((ROOT / "README.md").read_text().split())
    own = blocks["kdlib", "default"]
    assert f"terms takes {own['of_floor'][1]:.2f} times as long as a plain step" in readme
    for who, name in (("torchdistill", "torchdistill takes"), ("nvidia-modelopt", "NVIDIA's Model-Optimizer")):
        assert f"{name} {blocks[who, 'eager']['ms'] / own['ms']:.2f}" in readme
    ratio = blocks["timm.task (logits only)", "eager"]["ms"] / blocks["kdlib (logits only)", "default"]["ms"]
    assert f"timm.task {ratio:.2f} times as long for labels and logits alone" in readme


@pytest.mark.parametrize("page", ["README.md", "recipes/riformer/README.md"])
@pytest.mark.parametrize("images", ["5,000", "60,000"])
def test_the_readmes_tell_what_the_students_came_to(page: str, images: str) -> None:
    whole = ("labels", "soft", "whole run, λ of the paper", "whole run, initial weights")
    name, rows = {
        ("README.md", "5,000"): ("imitation_5k", whole),
        ("recipes/riformer/README.md", "5,000"): (
            "ladder_5k", ("tab3_affine_labels", "tab3_affine_soft", "tab4_80_20_4", "guideline5_with")
        ),
    }.get((page, images), ("imitation_60k", whole))  # fmt: skip
    summary = json.loads((generated.RESULTS / f"{name}.json").read_text())["summary"]
    text = (ROOT / page).read_text()
    means = [f"{summary[row]['mean']:.2f}" for row in (*rows, "teacher wide gfnet_h_micro")]
    if page == "README.md":
        assert f"| {images} images | {' | '.join(means)} |" in text
    else:
        told = [f"{summary[row]['mean']:.2f} ± {summary[row]['sd']:.2f}" for row in (*rows[:2], rows[3])]
        assert all(f"| {own} " in text for own in told)


def test_the_ladders_summary_is_the_studys_own() -> None:
    """What the page computes from the stored seeds is what the study wrote down when it ran."""
    stored = json.loads((generated.RESULTS / "ladder_5k.json").read_text())["summary"]
    found = list(maker("riformer").study_results("ladder_5k").summary())
    assert len(found) == len(stored) == 27
    for name, own, gain, _ in found:
        assert own.mean == pytest.approx(stored[name]["mean"])
        if gain is not None:
            assert gain.half == pytest.approx(stored[name]["difference"]["half"])
