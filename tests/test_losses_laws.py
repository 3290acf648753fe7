"""Every law over the whole catalogue."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import laws_inputs
import pytest
import torch
from laws import CASES, LAWS, SPECIAL, label, subject

from kdlib import losses
from kdlib.losses import LOSSES

torch.set_num_threads(1)


@pytest.mark.parametrize(("name", "chosen"), CASES, ids=label)
@pytest.mark.parametrize("law", LAWS + laws_inputs.LAWS, ids=lambda law: law.__name__.removeprefix("law_"))
def test_law(law, name, chosen):
    law(subject(name, **chosen))


def test_peculiarities_are_of_known_losses():
    assert SPECIAL.keys() <= LOSSES.keys()


def test_what_is_public_is_the_catalogue_and_its_tools():
    tools = {"LOSSES", "Learned", "Loss", "Sum", "View", "register"}
    assert set(losses.__all__) == tools | {loss.__name__ for loss in LOSSES.values()}
    for name, loss in LOSSES.items():
        assert name.replace("_", "") == loss.__name__.lower()
    assert {"sim_kd", "vk_d", "review_kd", "rkd_distance", "feature_mse", "cckd"} <= LOSSES.keys(), "snake_case"


def test_importing_losses_stays_light():
    heavy = ("timm", "torchvision", "pydantic", "accelerate")
    script = f"import sys, kdlib.losses; print([name for name in {heavy} if name in sys.modules])"
    root = Path(__file__).parents[1]
    found = subprocess.run([sys.executable, "-c", script], cwd=root, check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"
