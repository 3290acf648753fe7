"""Writes the tables of docs/riformer.md from benchmarks/results/*.json, and draws docs/riformer_ladder.png.

PYTHONPATH=. python docs/make_riformer.py            # writes and draws
PYTHONPATH=. python docs/make_riformer.py --check    # fails if the tables are not what would be written
"""

from __future__ import annotations

import sys
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


def ladder_results() -> Results:
    """The stored study as the object that draws itself."""
    found = _result("ladder_5k_plain")
    study = Study(found["title"], {}, found["against"], tuple(found["gap"]))
    return Results(study, {row: {int(seed): v for seed, v in of.items()} for row, of in found["top1"].items()})


def ladder() -> str:
    found, results = _result("ladder_5k_plain"), ladder_results()
    lines = []
    for name, own, gain, _ in results.summary():
        seeds = " ".join(f"{value:.2f}" for _, value in sorted(results.top1[name].items()))
        lines.append((name, f"{own.mean:.2f} ± {own.sd:.2f}", *_gain(gain), results.study.against.get(name, ""), seeds))
    lacking = [row for row in found["against"] if row not in found["top1"]]
    about = (
        f"{found['device']}, torch {found['torch']}, {found['date']}, {found['seconds']:.0f} s: `{found['command']}`."
    )
    heads = ("row", "top-1 %, mean ± sd", "paired difference", "95 % interval", "compared with", "seeds 0 to 4")
    return f"{about}\n\n{table(heads, lines)}\n\nNot reached: {', '.join(f'`{row}`' for row in lacking)}."


def imitation() -> str:
    """The rows that were finished, each against labels alone and against its own seed's logit teacher."""
    found = _result("imitation_5k")
    top1 = {row: {int(seed): float(value) for seed, value in of.items()} for row, of in found["top1"].items()}
    labels, teacher = top1["labels"], next(of for row, of in top1.items() if row.startswith("teacher wide"))
    lines = []
    for row, of in top1.items():
        own, student = mean(list(of.values())), not row.startswith("teacher")
        over = [_gain(difference(of, other) if student and other is not of else None) for other in (labels, teacher)]
        seeds = " ".join(f"{of[seed]:.2f}" if seed in of else "-" for seed in range(5))
        lines.append((row, f"{own.mean:.2f} ± {own.sd:.2f}", *over[0], *over[1], seeds))
    heads = ("row", "top-1 %, mean ± sd", "over labels", "95 % interval", "over the logit teacher", "95 % interval",
             "seeds 0 to 4")  # fmt: skip
    about = (
        f"{found['device']}, torch {found['torch']}, {found['date']}, cut off after {found['seconds']:.0f} s: "
        f"`{found['command']}`."
    )
    return f"{about}\n\n{table(heads, lines)}"


def _gain(gain: Mean | None) -> tuple[str, str]:
    if gain is None:
        return "", ""
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


TABLES = {"ladder": ladder, "imitation": imitation, "nano": nano, "sixty": sixty, "throughput": throughput}

if __name__ == "__main__":
    main(PAGE, TABLES)
    if "--check" not in sys.argv:
        show.plot(ladder_results(), PLOT)
