"""benchmarks/step.py in its small form: everyone computes the same loss, and what cannot run says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

OBJECTIVE = ("by hand", "kdlib", "torchdistill", "nvidia-modelopt")


@pytest.mark.slow
def test_all_contestants_compute_one_loss(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    script = [sys.executable, str(ROOT / "benchmarks" / "step.py"), "--cpu", "--batch", "2", "--rounds", "2"]
    more = ["--only", "blocks", "--who", *OBJECTIVE, "--out", str(out)]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    subprocess.run([*script, *more], check=True, env=os.environ | {"PYTHONPATH": paths}, capture_output=True)
    stored = json.loads(out.read_text())
    assert {"device", "torch", "date", "peers", "batch", "rounds"} <= stored.keys()
    rows = {row["who"]: row for row in stored["rows"]}
    assert set(rows) == set(OBJECTIVE)
    for who, row in rows.items():
        if stored["peers"].get(who, "ours") is None:
            assert "No module named" in row["failed"]
        elif "failed" not in row:
            assert row["loss"] == pytest.approx(rows["by hand"]["loss"], rel=1e-3)
            low, middle, high = row["of_hand"]
            assert low <= middle <= high
    assert "failed" not in rows["by hand"] and "failed" not in rows["kdlib"]
