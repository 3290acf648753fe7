"""One recipe under several settings and seeds, side by side on one device: the table in recipes/riformer/README.md.

python benchmarks/seeds.py --seeds 3 --jobs 14 --out benchmarks/results/riformer_nano_5k.json
python benchmarks/seeds.py --seeds 1 --jobs 1 --only "no imitation" data.limit=256 epochs=2 …      a quick look
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SETTINGS = {
    "paper": ["terms.block.weight=1e-4", "terms.mixer.weight=1e-3"],
    "features x100": ["terms.block.weight=1e-2", "terms.mixer.weight=1e-1"],
    "all terms all the time": [
        *("terms.block.weight=1e-4", "terms.mixer.weight=1e-3"),
        *(f"terms.{name}.until=1.0" for name in ("block", "mixer", "relation")),
    ],
    "temperature 2": ["terms.block.weight=1e-4", "terms.mixer.weight=1e-3", "terms.soft.loss.temperature=2.0"],
    "no imitation": ["terms.block=null", "terms.mixer=null", "terms.relation=null"],
}


def one(setting: str, seed: int, more: list[str], folder: str) -> dict[str, object]:
    """Top-1 of the student, its baseline and its teachers in one run of the default recipe."""
    torch.set_num_threads(1)
    from kdlib import config, progress, recipe, runs
    from recipes.riformer import gfnet, model  # noqa: F401  registers the models

    progress.console.quiet = True
    default = str(ROOT / "recipes" / "riformer" / "configs" / "default.yaml")
    output = f"output={folder}/{setting.replace(' ', '_')}-{seed}/run"
    said = [default, *SETTINGS[setting], f"seed={seed}", "threads=1", *more, output]
    outcome = runs.run(recipe.load(config.read(said)))
    assert outcome.baseline is not None
    teachers = {name: teacher.result["top1"] for name, teacher in outcome.teachers.items()}
    base, student = outcome.baseline.result["top1"], outcome.result["top1"]
    return {"setting": setting, "seed": seed, **teachers, "baseline": base, "student": student}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--out", type=Path)
    given, more = parser.parse_known_args()
    rows = []
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(given.jobs, multiprocessing.get_context("spawn")) as pool,
    ):
        futures = [pool.submit(one, s, seed, more, folder) for s in given.only for seed in range(given.seeds)]
        for future in futures:
            rows.append(future.result())
            print(rows[-1], flush=True)
    if given.out:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        about = {"device": device, "torch": torch.__version__, "date": datetime.now(UTC).strftime("%Y-%m-%d")}
        given.out.write_text(json.dumps(about | {"overrides": more, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
