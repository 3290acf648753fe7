"""The paper's tables as studies: rows over seeds, teachers shared, paired differences with 95 % intervals.

accelerate launch recipes/riformer/study.py ladder --data fashion_mnist_5k --seeds 5 [--jobs N] [key=value …]
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # so that `recipes` is found when this file is started as a script

from kdlib import progress, runs, study  # noqa: E402
from kdlib.recipe import Recipe  # noqa: E402
from recipes.riformer import gfnet, model  # noqa: E402, F401  registers the models with timm
from recipes.riformer.convert import convert  # noqa: E402


def train(recipe: Recipe) -> dict[str, float]:
    """One run in a worker process; leaves the device to the next."""
    progress.console.quiet = True
    result = runs.run(recipe, convert=convert).result
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return result


if __name__ == "__main__":
    sys.exit(study.main(train, HERE / "studies", HERE / "configs" / "scales"))
