"""The model card: what the model is, how it was made, how images are prepared for it, and how it is loaded."""

from __future__ import annotations

import platform
from collections.abc import Callable
from math import floor
from pathlib import Path
from typing import TYPE_CHECKING

import timm
import torch

from .. import __version__
from ..models import Found
from ..training import runfolder
from .hub import prepared

if TYPE_CHECKING:
    from . import Exported
    from .context import Context

CARD = """---
library_name: {library}
pipeline_tag: image-classification
tags: [image-classification, knowledge-distillation, kdlib]
---

# {name}, distilled

{name} with {classes} classes, a student of kdlib {version}{fused}.

| | |
|---|---|
| top-1 / top-5 on the test images of `{data}` | {accuracy} |
| parameters | {parameters:,} |
| images | {shape}: {resized}; white is 1, then minus {mean}, divided by {std} |
| taught by | {teachers} |
| objective | {terms} |
| epochs, seed | {epochs}, {seed} |
| written as | {format}, {megabytes:.2f} MB |

Read back and compared with the trained student on {images} test images: no logit differs by more than
{difference:.1e}, and both name the same class on {agreement:.2%} of them (torch {torch}, timm {timm}, Python {python}).

## Use

Needs {needs}.

```python
{load}
```

Classes, in the order of the logits: {labels}.
"""

LIBRARIES = {"onnx": "onnx", "torch-export": "pytorch"}
"""Format to what the hub calls the library that loads it, where that is not timm."""


def write_card(context: Context, done: Exported, load: Callable[[Context], str], folder: Path) -> None:
    """``README.md`` of an export."""
    found = context.found
    recipe, data = found.recipe, found.data
    assert recipe is not None and data is not None
    text = CARD.format(
        library=LIBRARIES.get(done.format, "timm"),
        name=context.name,
        classes=len(data.classes),
        version=__version__,
        fused="; fused for inference" if done.fused else "",
        data=data.name,
        accuracy=_accuracy(found.folder),
        parameters=done.parameters,
        shape="×".join(map(str, found.shape)),
        resized=_resized(found),
        mean=", ".join(f"{value:.5g}" for value in found.mean),
        std=", ".join(f"{value:.5g}" for value in found.std),
        teachers=", ".join(f"{key} ({spec.name})" for key, spec in recipe.teachers.items()) or "labels alone",
        terms=" + ".join(f"{term.weight:g} · {key} ({term.loss.name})" for key, term in recipe.terms.items()),
        epochs=recipe.epochs,
        seed=recipe.seed,
        format=done.format,
        megabytes=done.bytes / 1e6,
        images=done.images,
        difference=done.difference,
        agreement=done.agreement,
        torch=torch.__version__.partition("+")[0],
        timm=timm.__version__,
        python=platform.python_version(),
        needs=done.needs,
        load=load(context).replace("FOLDER", done.folder.name),
        labels=", ".join(data.classes) if len(data.classes) <= 100 else f"{len(data.classes)}, see config.json",
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _resized(found: Found) -> str:
    told = prepared(found)
    side = floor(min(found.shape[-2:]) / told["crop_pct"])  # as timm rounds
    crop = "" if told["crop_pct"] == 1 else ", the middle cut out of it"
    return f"the shorter side resized to {side} pixels ({told['interpolation']}){crop}"


def _accuracy(run: Path | None) -> str:
    """Of the finished run, from its summary."""
    assert run is not None
    found = runfolder.summary(run)
    return "not recorded" if found is None else f"{found['result']['top1']:.2f} % / {found['result']['top5']:.2f} %"
