"""Writes docs/losses.md: the catalogue of losses in one table, from the code and the stored reference numbers.

PYTHONPATH=. python docs/make_losses.py            # writes the page
PYTHONPATH=. python docs/make_losses.py --check    # fails if the page is not what would be written
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from laws import subject
from losses_reference import GOLDENS, Case, call, compare

from kdlib.losses import LOSSES, Sum

PAGE = Path(__file__).with_name("losses.md")

HEAD = """# The losses

Every loss of `kdlib.losses`, from its code: this page is written by `docs/make_losses.py`, and a test fails when it is
out of date. A recipe uses the name; Python uses the class: `from kdlib.losses import {first}`.
The table is wide and scrolls sideways. One by one, with all that their docstrings say:
[between logits](api/losses_logits.md), [between features](api/losses_features.md),
[between relations](api/losses_relations.md).

**How to read it.** *View* is what the loss takes: logits `(B, K)`, an embedding `(B, D)`, tokens `(B, N, C)`, a map
`(B, C, H, W)`, or raw, any shape; *lists* means one tensor for each pair of the term, shallow to deep. *Arguments* are
the constructor's, with defaults. *Learns* tells whether it has parameters: give it its sizes, or let
`fit(student, teacher)` find them before the optimizer is made. *Agreement* is the largest difference from the numbers
of a reference implementation, over two stored cases in float32 and in float64: of the value, relatively, and of the
gradient (of inputs and parameters), relative to its largest entry. The tests allow 1e-5 and 1e-4 in float32, and 1e-9
for both in float64; gradients of parameters are stored in float32 only and not part of the float64 figure. *Licence* is
that of the reference, of which numbers were taken and no code; where a repository has no licence file it says *none*.
*Variants* are an argument's choices: where the authors' code and their paper differ by more than a constant factor,
`variant` says which of the two is computed (the default is the code, whose numbers the references are), and the
docstring says how they differ. A constant factor is a matter of the term's weight; the docstring tells it where it is
known. A dash in place of a reference means that no stored numbers exist: the plain definition in
`tests/losses_plain.py` is what such a loss, like all others, is compared with.

Every loss returns a scalar of at least float32, whatever it is given and whatever autocast says, and gives the teacher
no gradient. In a loop of your own that compiles beside autocast, set `torch._functorch.config.backward_pass_autocast`
to `"off"`, or torch compiles the backward pass in half precision. What each divides by, its smallest value and its
errors are in its docstring.

"""

COLUMNS = (
    *("Name", "Class", "Formula", "View", "Needs labels", "Arguments", "Learns", "Variants"),
    *("Paper", "Reference", "Licence", "Agreement float32", "Agreement float64"),
)


class Reference(NamedTuple):
    where: str
    licence: str
    single: str
    double: str


def references() -> dict[str, list[Reference]]:
    """By name of the loss: what it was compared with, and how far it is from that."""
    names = {loss: name for name, loss in LOSSES.items()}
    found: dict[str, list[Reference]] = {}
    for path in sorted(GOLDENS.glob("*.npz")):
        with np.load(path) as stored:
            meta = json.loads(str(stored["meta"]))
        figures = []
        for dtype in (torch.float32, torch.float64):
            errors = [compare(Case(path.stem, index, dtype)) for index in range(2)]
            worst = max(e.grad if dtype == torch.float64 else max(e.grad, e.paramgrad) for e in errors)
            figures.append(f"{max(e.value for e in errors):.0e} / {worst:.0e}")
        made = call(Case(path.stem, 0, torch.float32))
        parts = made.loss.parts if isinstance(made.loss, Sum) else [made.loss]
        line = Reference(_where(meta), _licence(meta["licence"]), *figures)
        for name in dict.fromkeys([*(names[type(part)] for part in parts), *(names_of(made.classes))]):
            found.setdefault(name, []).append(line)
    return found


def names_of(classes: tuple[str, ...]) -> list[str]:
    return [name for name, loss in LOSSES.items() if loss.__name__ in classes]


def _where(meta: dict[str, Any]) -> str:
    if meta["path"] is None:
        return "equation of the paper"
    owner = meta["repository"].removeprefix("https://github.com/")
    return f"[{owner}]({meta['repository']}/blob/{meta['commit']}/{meta['path']}) `{meta['symbol']}`"


def _licence(text: str) -> str:
    return "none" if text.startswith("no licence") else "—" if text.startswith("computed") else text


def page() -> str:
    compared = references()
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for name in LOSSES:
        cells = row(name, compared.get(name, []))
        assert len(cells) == len(COLUMNS)
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return HEAD.format(first=next(iter(LOSSES.values())).__name__) + "\n".join(lines) + "\n"


def row(name: str, compared: list[Reference]) -> list[str]:
    loss, case = LOSSES[name], subject(name)
    text = inspect.cleandoc(loss.__doc__ or "")
    arguments = inspect.signature(loss).parameters
    labels = "labels" in case.against and ("yes, soft ones too" if case.soft_labels else "yes, integers")
    indices = "indices of the data set" if "indices" in case.against else ""
    papers = [f"[{n}](https://arxiv.org/abs/{n})" for n in re.findall(r"arXiv:(\d{4}\.\d{4,5})", text)]
    held = "as the loss that it holds" if "loss" in arguments else ""
    variants = [
        f"`{argument}`: "
        + ", ".join(f"`{choice}`" for choice in re.findall(r"['\"](\w+)['\"]", str(parameter.annotation)))
        for argument, parameter in arguments.items()
        if "Literal" in str(parameter.annotation)
    ]
    return [
        f"`{name}`",
        f"`{loss.__name__}`",
        text.split("\n\n")[0].replace("``", "`").replace("\n", " "),
        ("lists of " if case.lists else "") + case.view + ("s" if case.lists else ""),
        held or labels or indices or "no",
        ", ".join(f"`{_argument(parameter)}`" for parameter in arguments.values()) or "none",
        "yes" if case.learned or name == "learnable_temperature" else "no",
        "; ".join(variants) or "—",
        ", ".join(papers) or "no arXiv version",
        "<br>".join(line.where for line in compared) or "—",
        "<br>".join(line.licence for line in compared) or "—",
        "<br>".join(line.single for line in compared) or "—",
        "<br>".join(line.double for line in compared) or "—",
    ]


def _argument(parameter: inspect.Parameter) -> str:
    if parameter.default is inspect.Parameter.empty:
        return parameter.name
    return f"{parameter.name}={parameter.default!r}"


def without_figures(text: str) -> str:
    """The page with its measured errors blanked, for their last digits differ between machines."""
    return re.sub(r"\d+e[+-]\d+ / \d+e[+-]\d+", "…", text)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "--check" in sys.argv:
        same = PAGE.exists() and without_figures(PAGE.read_text()) == without_figures(page())
        sys.exit(None if same else f"{PAGE.name} is out of date: run docs/make_losses.py")
    PAGE.write_text(page())
