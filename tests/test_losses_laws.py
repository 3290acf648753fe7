"""Every law over the whole catalogue."""

from __future__ import annotations

import pytest
import torch
from laws import LAWS, SPECIAL, subject

from kdlib.losses import LOSSES

torch.set_num_threads(1)


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__.removeprefix("law_"))
def test_law(law, name):
    law(subject(name))


def test_peculiarities_are_of_known_losses():
    assert SPECIAL.keys() <= LOSSES.keys()
