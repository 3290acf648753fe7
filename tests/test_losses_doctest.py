"""Every public loss's example runs."""

from __future__ import annotations

import doctest

import pytest
import torch

from kdlib import losses


@pytest.mark.parametrize("name", sorted(losses.LOSSES))
def test_example(name):
    torch.manual_seed(0)
    loss = losses.LOSSES[name]
    known = {"torch": torch} | {public: getattr(losses, public) for public in losses.__all__}
    test = doctest.DocTestParser().get_doctest(loss.__doc__, known, loss.__name__, None, None)
    assert test.examples
    report: list[str] = []
    failed, _ = doctest.DocTestRunner().run(test, out=report.append)
    assert not failed, "".join(report)
