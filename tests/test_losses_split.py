"""Which losses depend on how a batch is split over processes or micro-batches; docs/distributed.md names them."""

from __future__ import annotations

import copy
import inspect
import re
from pathlib import Path

import pytest
import torch
from laws import CASES, choices, each, subject
from torch import nn

from kdlib.losses import LOSSES

torch.set_num_threads(1)

PAGE = Path(__file__).parents[1] / "docs" / "distributed.md"
DRAWS_NOTHING = {"mgd": {"ratio": 0.0}}
"""Arguments with which a loss draws no numbers."""
BATCH_NORMS = {"sim_kd", "srrl", "review_kd", "ofd"}
"""Losses whose learned layers have them, which is felt while they train only."""


def halves_and_whole(name, chosen, train=False):
    """Mean of the values of both halves of a batch, and the value of the batch."""
    case = subject(name, **chosen, **DRAWS_NOTHING.get(name, {}))
    inputs = case.inputs(batch=8, dtype=torch.float64)
    loss = case.fitted(inputs).double().train(train)
    if name == "crd":
        loss.z.fill_(30.0)  # which the first batch would set
        inputs = (*inputs, torch.cat([inputs[2][:, None], torch.randint(40, (8, 10))], dim=1))

    def value(part):
        return copy.deepcopy(loss)(*(each(x, lambda t: t[part]) for x in inputs)).item()

    return (value(slice(4)) + value(slice(4, None))) / 2, value(slice(None))


def differ(name, chosen, **how):
    halves, whole = halves_and_whole(name, chosen, **how)
    return halves != pytest.approx(whole, rel=1e-6)


def called(name, chosen):
    """As the page writes it: with an argument where that decides."""
    given = chosen or {
        argument: inspect.signature(LOSSES[name]).parameters[argument].default
        for argument in [argument for other in choices(name) for argument in other][:1]
    }
    return name + "".join(f'({argument}="{value}")' for argument, value in given.items())


def listed():
    section = PAGE.read_text().split("## Losses that depend on how a batch is split")[1].split("\n## ")[0]
    return [line.replace("\n ", "") for line in re.findall(r"^- (.*(?:\n  .*)*)", section, re.MULTILINE)]


def test_the_page_names_the_losses_that_depend_on_the_split():
    split = {(name, called(name, chosen)) for name, chosen in CASES if differ(name, chosen)}
    always = {name for name, _ in split if all(differ(name, chosen) for chosen in choices(name))}
    found = always | {call for name, call in split if name not in always}
    names = {
        call for call in re.findall(r"`([a-z_]+(?:\([^`]*\))?)`", " ".join(listed())) if call.split("(")[0] in LOSSES
    }
    means = {call for call in names if call.split("(")[0] in always}  # a variant may be told apart
    assert names - means - BATCH_NORMS | {call.split("(")[0] for call in means} == found


def test_the_page_names_the_losses_with_batch_norms_in_their_layers():
    held = {name for name in LOSSES if any(isinstance(m, nn.BatchNorm2d) for m in fitted(name).modules())}
    (line,) = [line for line in listed() if "batch norms" in line]
    assert held == set(re.findall(r"`(\w+)`", line.split("learned layers of")[1])) == BATCH_NORMS
    assert all(differ(name, {}, train=True) for name in held)


def fitted(name):
    case = subject(name)
    return case.fitted(case.inputs())


def test_what_the_page_says_of_halves():
    for name, chosen, factor in (("ofd", {}, 0.5), ("ofd", {"reduction": "batchmean"}, 1), ("ickd", {}, 1)):
        halves, whole = halves_and_whole(name, chosen)
        assert halves == pytest.approx(factor * whole)
    halves, whole = halves_and_whole("ickd", {"variant": "imagenet"})
    assert halves == pytest.approx(2 * whole)
