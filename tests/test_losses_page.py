"""docs/losses.md is what its generator writes, and the agreement that it states is within the limits."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdlib.losses import LOSSES

torch.set_num_threads(1)

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_losses", DOCS / "make_losses.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_is_up_to_date(maker):
    stored = maker.without_figures(maker.PAGE.read_text())
    assert stored == maker.without_figures(maker.page()), "run docs/make_losses.py"


def test_page_has_every_loss_once(maker):
    names = re.findall(r"^\| `(\w+)` \|", maker.PAGE.read_text(), flags=re.MULTILINE)
    assert names == list(LOSSES)


def test_stated_agreement_is_within_the_limits(maker):
    rows = [line for line in maker.PAGE.read_text().splitlines() if line.startswith("| `")]
    for row in rows:
        single, double = row.split(" | ")[-2:]
        for text, limits in ((single, (1e-5, 1e-4)), (double, (1e-9, 1e-9))):
            for figures in re.findall(r"(\d+e[+-]\d+) / (\d+e[+-]\d+)", text):
                assert all(float(figure) <= limit for figure, limit in zip(figures, limits, strict=True)), row


def test_benchmark_measures_any_loss(tmp_path):
    """Every family once, at its small size."""
    out = tmp_path / "rows.json"
    only = ["dkd", "top_k", "feature_mse", "srrl", "review_kd", "rkd_angle", "similarity_preserving", "crd"]
    script = DOCS.parent / "benchmarks" / "losses.py"
    command = [sys.executable, str(script), "--cpu", "--out", str(out), "--only", *only]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(DOCS.parent)}, capture_output=True)
    stored = json.loads(out.read_text())
    assert {"device", "torch", "python", "date"} <= stored.keys()
    for row in stored["rows"]:
        if row["loss"] != "crd":
            assert row["ours"]["value"] == pytest.approx(row["plain"]["value"], rel=1e-3, abs=1e-6), row["loss"]
