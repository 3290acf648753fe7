"""Writes the tables of docs/riformer.md from benchmarks/results/*.json, and draws docs/riformer_ladder.png.

PYTHONPATH=. python docs/make_riformer.py            # writes and draws
PYTHONPATH=. python docs/make_riformer.py --check    # fails if the tables are not what would be written
"""

from __future__ import annotations

import sys
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from generated import main, result, table

from kdlib.study import show
from kdlib.study.paired import Mean, difference, mean
from kdlib.study.rows import Study
from kdlib.study.run import Results

PAGE = Path(__file__).with_name("riformer.md")
PLOT = Path(__file__).with_name("riformer_ladder.png")
SEEDS = ("no imitation", "paper", "features x100", "all terms all the time", "temperature 2")


def _result(name: str) -> dict[str, Any]:
    found = result(name)
    assert found is not None, name
    return found


def study_results(name: str) -> Results:
    """A stored study as the object that draws itself."""
    found = _result(name)
    study = Study(found["title"], {}, found["against"], found["gap"] and tuple(found["gap"]))
    return Results(study, {row: {int(seed): v for seed, v in of.items()} for row, of in found["top1"].items()})


def _about(found: dict[str, Any]) -> str:
    return f"{found['device']}, torch {found['torch']}, {found['date']}: `{found['command']}`."


def _seeds(of: dict[int, float], seeds: int) -> str:
    return " ".join(f"{of[seed]:.2f}" if seed in of else "-" for seed in range(seeds))


def _number_of_seeds(results: Results) -> int:
    return 1 + max(seed for of in results.top1.values() for seed in of)


def compared(name: str) -> str:
    """Each row against the one that its study compares it with, seed by seed."""
    found, results = _result(name), study_results(name)
    seeds, lines = _number_of_seeds(results), []
    for row, own, gain, _ in results.summary():
        other = results.study.against.get(row, "")
        lines.append((row, _mean(own), *_gain(gain), other, _seeds(results.top1[row], seeds)))
    last = f"seeds 0 to {seeds - 1}" if seeds > 1 else "seed 0"
    heads = ("row", "top-1 %, mean ± sd", "paired difference", "95 % interval", "compared with", last)
    return f"{_about(found)}\n\n{table(heads, lines)}"


def imitation(name: str) -> str:
    """Each row against labels alone, against soft targets alone and against its own seed's logit teacher."""
    found, results = _result(name), study_results(name)
    seeds, top1, lines = _number_of_seeds(results), results.top1, []
    others = [top1["labels"], top1["soft"], next(of for row, of in top1.items() if row.startswith("teacher wide"))]
    for row, of in top1.items():
        plain = row.startswith("teacher")
        over = [_interval(None if plain or other is of else difference(of, other)) for other in others]
        lines.append((row, _mean(mean(list(of.values()))), *over, _seeds(of, seeds)))
    last = f"seeds 0 to {seeds - 1}"
    heads = ("row", "top-1 %, mean ± sd", "over labels", "over soft", "over the logit teacher", last)
    return f"{_about(found)}\n\n{table(heads, lines)}"


def _mean(own: Mean) -> str:
    return f"{own.mean:.2f} ± {own.sd:.2f}" if own.n > 1 else f"{own.mean:.2f}"


def _interval(gain: Mean | None) -> str:
    """A mean difference with its interval, in bold where that leaves out zero."""
    if gain is None or not isfinite(gain.half):
        return "" if gain is None else f"{gain.mean:+.2f}"
    text = f"{gain.mean:+.2f} ({gain.mean - gain.half:+.2f} … {gain.mean + gain.half:+.2f})"
    return f"**{text}**" if abs(gain.mean) > gain.half else text


def _gain(gain: Mean | None) -> tuple[str, str]:
    if gain is None or not isfinite(gain.half):
        return "" if gain is None else f"{gain.mean:+.2f}", ""
    return f"{gain.mean:+.2f}", f"{gain.mean - gain.half:+.2f} … {gain.mean + gain.half:+.2f}"


def nano() -> str:
    """The first run's recipe under several settings: each student against its own run's baseline and the soft one."""
    found = _result("riformer_nano_5k")
    of = {
        (setting, who): {row["seed"]: float(row[who]) for row in found["rows"] if row["setting"] == setting}
        for setting in SEEDS
        for who in ("student", "baseline", "wide")
    }
    lines = []
    for setting in SEEDS:
        mine, base, soft = of[setting, "student"], of[setting, "baseline"], of["no imitation", "student"]
        own, wide = mean(list(mine.values())), mean(list(of[setting, "wide"].values()))
        more = ("", "") if setting == "no imitation" else _gain(difference(mine, soft))
        lines.append(
            (setting, f"{own.mean:.2f} ± {own.sd:.2f}", f"{wide.mean:.2f}", *_gain(difference(mine, base)), *more)
        )
    heads = ("setting", "student, mean ± sd", "logit teacher", "over labels alone", "95 % interval",
             "over no imitation", "95 % interval")  # fmt: skip
    about = f"{found['device']}, torch {found['torch']}, {found['date']}, 3 seeds."
    return f"{about}\n\n{table(heads, lines)}"


def sixty() -> str:
    found = _result("riformer_nano_60k")
    lines = [(row["setting"], *(f"{row[who]:.2f}" for who in ("wide", "twin", "baseline", "student")))
             for row in found["rows"]]  # fmt: skip
    about = f"{found['device']}, torch {found['torch']}, {found['date']}, {found['note']}."
    heads = ("setting", "logit teacher", "imitation teacher", "labels alone", "student")
    return f"{about}\n\n{table(heads, lines)}"


def throughput() -> str:
    found = _result("throughput")
    lines = [(r["model"], r["against"], f"{r['ratio']:.2f}", f"{r['paper']:.2f}",
              "" if r["goal"] is None else f"{r['goal']:.1f}, {'reached' if r['reached'] else 'not reached'}")
             for r in found["ratios"]]  # fmt: skip
    about = f"{found['device']}, torch {found['torch']}, {found['date']}, {found['batch']} images, random weights."
    return f"{about}\n\n{table(('model', 'against', 'times as fast', 'paper', 'goal here'), lines)}"


TABLES = {
    "ladder": partial(compared, "ladder_5k"),
    "beginning": partial(compared, "beginning_5k"),
    "length": partial(compared, "length_5k"),
    "teachers": partial(compared, "teachers_5k"),
    "sixty64": partial(imitation, "imitation_60k"),
    "imitation": partial(imitation, "imitation_5k"),
    "thousand": partial(imitation, "imitation_1k"),
    "long": partial(imitation, "imitation_5k_long"),
    "poor": partial(imitation, "imitation_1k_poor_twin"),
    "nano": nano,
    "sixty": sixty,
    "throughput": throughput,
}

if __name__ == "__main__":
    main(PAGE, TABLES)
    if "--check" not in sys.argv:
        show.plot(study_results("ladder_5k"), PLOT)
