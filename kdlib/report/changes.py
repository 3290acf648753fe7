"""What the student answers otherwise than the baseline, with the images."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image
from torch import Tensor

from . import figures
from .answers import Answers, test_images
from .opened import Opened

SAMPLES, THUMBNAIL = 12, 96
"""Images shown of each change; pixels of the longer side that a larger one is shrunk to."""


def changes(opened: Opened, given: Answers) -> dict[str, Any]:
    """What the student answers otherwise than the baseline, with images."""
    before, after = given.right("baseline"), given.right("student")
    groups = {"gained": ~before & after, "lost": before & ~after}
    # the surest answer of whoever is wrong there: what was unlearned, and what was learned wrongly
    shown = {
        "gained": figures.surest(given.logits["baseline"], groups["gained"], SAMPLES),
        "lost": figures.surest(given.logits["student"], groups["lost"], SAMPLES),
    }
    pictures = test_images(opened, [place for places in shown.values() for place in places])
    names, wrong = opened.data.classes, {"gained": given.given("baseline"), "lost": given.given("student")}
    return {
        "gain": figures.gain(before, after),
        "counts": {group: int(chosen.sum()) for group, chosen in groups.items()},
        "same": {"right": int((before & after).sum()), "wrong": int((~before & ~after).sum())},
        "samples": {
            group: [
                {
                    "place": place,
                    "src": png(pictures[place]),
                    "label": names[int(given.labels[place])],
                    "answer": names[int(wrong[group][place])],
                }
                for place in places
            ]
            for group, places in shown.items()
        },
        "confusions": [
            {"label": names[one.label], "answer": names[one.answer], "before": one.before, "after": one.after}
            for one in figures.confusions(given.given("baseline"), given.given("student"), given.labels)
        ],
    }


def png(image: Tensor) -> str:
    """An image, uint8 ``(C, H, W)``, as a data URL."""
    array = image.permute(1, 2, 0).numpy()
    picture = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array[..., :3])
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
