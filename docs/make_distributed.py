"""Writes the table of docs/distributed.md from benchmarks/results/two_gpus.json.

PYTHONPATH=. python docs/make_distributed.py            # writes it
PYTHONPATH=. python docs/make_distributed.py --check    # fails if it is not what would be written
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from generated import main, result, table

PAGE = Path(__file__).with_name("distributed.md")
LAUNCHES = {"one": "one process", "ddp": "DDP", "fsdp2": "FSDP2"}
PRECISIONS = {"none": "float32", "bf16": "bf16 autocast"}


def two_gpus() -> str:
    found = result("two_gpus")
    assert found is not None
    heads = ("launch", "precision", "weights differ by", "rounding", "weights moved by", "a run's weights differ by",
             "top-1 %", "test loss", "peak GiB a process", "images/s", "efficiency")  # fmt: skip
    rows = []
    for key, precision in PRECISIONS.items():
        rounding = found[key]["one"]["reordered"]
        for name, launch in LAUNCHES.items():
            row = found[key][name]
            run = (
                [f"{row['run_difference']:.1e}", f"{row['top1']:.2f}", f"{row['test_loss']:.6f}"]
                if "run_difference" in row
                else ["-"] * 3
            )
            speed = (
                [f"{row['images_per_second']:,.0f}", f"{row['efficiency']:.2f}"] if "efficiency" in row else ["-"] * 2
            )
            rows.append([launch, precision, f"{row['difference']:.1e}", f"{rounding:.1e}", f"{row['moved']:.1e}", *run,
                         f"{row['peak_gib']:.2f}", *speed])  # fmt: skip
    about = f"{len(found['device'])} × {found['device'][0]}, torch {found['torch']}, accelerate {found['accelerate']}"
    return f"{about}, {found['date']}, {found['seconds']} s.\n\n{table(heads, rows)}"


TABLES = {"two_gpus": two_gpus}

if __name__ == "__main__":
    main(PAGE, TABLES)
