"""Images per second of models, each at the best of its settings in this very run, and the ratios between them.

python recipes/riformer/measure/throughput.py --budget 550 --out throughput.json      Tab. 6 of the paper, on a GPU
python recipes/riformer/measure/throughput.py --models riformer_s12:train riformer_s12:norm riformer_s12:full \\
    --settings compiled-bf16-channels_last                                            one model's three forms
python recipes/riformer/measure/throughput.py --device cpu --models riformer_micro metaformer_pool_micro --batch 8

A setting is {eager, compiled} x {bf16, fp32} x {contiguous, channels_last}. What decides the paper's ratios is measured
first, and the result is written after every setting, so that a run that is cut off has it. One that fails keeps its
reason, and one that cannot be the best is skipped: compiling takes a minute.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # so that this file can be started as a script

from recipes.riformer.measure import clock, contestants, tool
from recipes.riformer.measure.contestants import PAPER
from recipes.riformer.measure.ranking import best_of, draw, ratios, show

FIRST = (("riformer_m36", "poolformer_m36", "gfnet_h_b"), ("riformer_s12", "poolformer_s12"))
"""What the headline needs, in the order of its worth."""
MODELS = tuple(name for name in PAPER if name not in ("gfnet_h_ti", "gfnet_h_s"))
WORTH = 1.15
"""A setting whose first look takes so many times as long as the model's best is not measured any further."""
HOPE = 1.5
"""How much more than in bf16 compiling may gain in another precision before a skipped setting would have been best."""


class Setting(NamedTuple):
    """How a model is run; written compiled-bf16-channels_last."""

    mode: str
    precision: str
    layout: str

    def __str__(self) -> str:
        return "-".join(self)


SETTINGS = tuple(
    Setting(mode, precision, layout)
    for precision in ("bf16", "fp32")
    for mode in ("compiled", "eager")
    for layout in ("channels_last", "contiguous")
)
"""The likely best first."""
BY_KERNELS = tuple(Setting("eager", precision, "channels_last") for precision in ("bf16", "fp16"))
"""What the form "kernels" is for: it is neither compiled nor run in full precision."""
MORE = tuple(setting._replace(precision=precision) for setting in SETTINGS[:4] for precision in ("tf32", "fp16"))


class Job(NamedTuple):
    model: str
    form: str
    setting: Setting


def order(models: Sequence[str], settings: Sequence[Setting]) -> list[Job]:
    """Every model in every form and setting, what the headline needs first.

    Four passes: the likely best of the groups in FIRST, their other settings in bf16, the other models in bf16, and all
    that is left.
    """
    ranked: list[tuple[tuple[int, ...], Job]] = []
    for place, text in enumerate(models):
        name, forms = contestants.parse(text)
        group = next((at for at, names in enumerate(FIRST) if name in names), len(FIRST))
        for number, form in enumerate(forms):
            for rank, setting in enumerate(settings):
                if form == "kernels" and setting not in BY_KERNELS:
                    continue
                likely = (rank == 0 and (number == 0 or contestants.family(name) == "gfnet")) or form == "kernels"
                last = 3 if setting.precision not in ("bf16", settings[0].precision) else 2
                wave = last if last == 3 or group == len(FIRST) else 0 if likely else 1
                cheap_first = (setting.mode == "compiled") == (wave == 3)  # what compiling may gain is judged by eager
                ranked.append(((wave, group, cheap_first, rank, place, number), Job(name, form, setting)))
    return [job for _, job in sorted(ranked, key=lambda at: at[0])]


def reason_to_skip(job: Job, rows: Sequence[tool.Report], device: torch.device | None = None) -> str | None:
    """Why ``job`` cannot be its model's best setting, judging by what was measured; None if it may be."""
    mode, precision, layout = job.setting
    if job.form == "kernels" and device is not None and device.type != "cuda":
        return "the kernels need a GPU"
    mine = [row for row in rows if row["model"] == job.model and "images_per_second" in row]
    if mode == "compiled" and layout == "contiguous" and job.form in contestants.TOKENS:
        twin = str(job.setting._replace(layout="channels_last"))
        if any(row["form"] == job.form and row["setting"] == twin for row in mine):
            return "its blocks work on channels-last tokens in either layout, and channels_last was measured"
    if mode == "compiled" and precision == "fp32":
        same = [row for row in mine if row["form"] == job.form]
        gain = _most(same, "compiled-bf16") / (_most(same, "eager-bf16") or float("inf"))
        expected, top = HOPE * gain * _most(same, "eager-fp32"), _most(mine, "")
        if 0 < expected < top:
            gained = f"compiling gains {gain:.2f} x in bf16"
            return f"{gained}; {HOPE} times that here makes {expected:,.0f} images/s, and there are {top:,.0f}"
    return None


def _most(rows: Sequence[tool.Report], start: str) -> float:
    """Images per second of the best row whose setting begins like this, 0 if there is none."""
    return max((row["images_per_second"] for row in rows if row["setting"].startswith(start)), default=0.0)


def run_one(
    job: Job, device: torch.device, batch: int, pixels: int, runs: int, repeats: int, best: float
) -> tool.Report:
    """One row: images per second, or why there are none. ``best`` is the model's most so far."""
    mode, precision, layout = job.setting
    row: tool.Report = {"model": job.model, "form": job.form, "setting": str(job.setting)}
    row |= {"batch": batch, "pixels": pixels}
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of the setting before
    began = time.perf_counter()
    try:
        torch.compiler.reset()
        dtype = clock.set_precision(precision)
        memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        net: Any = contestants.build(job.model, job.form, pixels, device, dtype).to(memory_format=memory)
        images = torch.randn(batch, 3, pixels, pixels, device=device, dtype=dtype).contiguous(memory_format=memory)
        if mode == "compiled":
            net = torch.compile(net, fullgraph=job.form != "complex")
        clock.mean_milliseconds(net, images, clock.WARM_UP)
        row["warm_up_seconds"] = round(time.perf_counter() - began, 1)
        look, passes = min(3, runs), min(3, runs)
        taken = clock.mean_milliseconds(net, images, look)
        if not best or taken < WORTH * 1e3 * batch / best:
            passes = runs * repeats
            taken = statistics.median(clock.mean_milliseconds(net, images, runs) for _ in range(repeats))
        row |= {"images_per_second": 1e3 * batch / taken, "ms": taken, "passes": passes}
    except Exception as error:  # out of memory, no compiler, a kernel that is missing: each setting may fail in its way
        row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    row["seconds"] = round(time.perf_counter() - began, 1)
    return row


def measure(
    models: Sequence[str],
    device: torch.device,
    *,
    settings: Sequence[Setting] = SETTINGS,
    batch: int = 256,
    pixels: int | None = None,
    runs: int = 30,
    repeats: int = 3,
    budget: float = float("inf"),
    keep: Callable[[tool.Report], None] = lambda _: None,
) -> tool.Report:
    """A row for every model, form and setting, in the order of their worth; then each model's best, and the ratios.

    The mean over ``runs`` passes, ``repeats`` times, of these the median, is a setting's time.

    Args:
        pixels: side of the images; by default each model's own.
        budget: seconds. A setting is not begun if one of its kind (compiled or not) took longer than what is left.
        keep: is handed the report after every row.

    Raises:
        ValueError: a model or form that does not exist.
    """
    began, longest = time.perf_counter(), {"compiled": 0.0, "eager": 0.0}
    protocol = {"batch": batch, "runs": runs, "repeats": repeats, "budget": None if budget == float("inf") else budget}
    report = clock.about(device, **protocol, rows=[], skipped=[])
    for job in order(models, settings):
        reason, left = reason_to_skip(job, report["rows"], device), budget - (time.perf_counter() - began)
        if reason is None and left <= longest[job.setting.mode]:
            reason = f"{max(left, 0):.0f} s were left of the budget"
        if reason is not None:
            report["skipped"].append(
                {"model": job.model, "form": job.form, "setting": str(job.setting), "reason": reason}
            )
            continue
        own = timm.get_pretrained_cfg(job.model)
        side = pixels or (own.input_size[-1] if own else 224)
        mine = [row.get("images_per_second", 0.0) for row in report["rows"] if row["model"] == job.model]
        row = run_one(job, device, batch, side, runs, repeats, max(mine, default=0.0))
        longest[job.setting.mode] = max(longest[job.setting.mode], row["seconds"])
        report["rows"].append(row)
        report |= {"best": best_of(report["rows"]), "seconds": round(time.perf_counter() - began, 1)}
        report["ratios"] = ratios(report["best"])
        keep(report)
        what = f"{row['images_per_second']:>10,.0f} images/s" if "failed" not in row else row["failed"][:80]
        print(f"{job.model:22} {job.form:8} {job.setting!s:30} {what}   ({row['seconds']:.0f} s)", flush=True)
    return report | {"best": best_of(report["rows"]), "ratios": ratios(best_of(report["rows"]))}


def make_parser() -> tool.Parser:
    parser = tool.Parser(__doc__)
    known = {str(setting): setting for setting in (*SETTINGS, *MORE)}

    def setting(text: str) -> Setting:
        if text not in known:
            raise argparse.ArgumentTypeError(f"no setting {text!r}; known: {', '.join(known)}")
        return known[text]

    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME[:FORM]", help="default: Tab. 6")
    parser.add_argument("--settings", nargs="+", type=setting, default=list(SETTINGS), metavar="SETTING",
                        help=f"likely best first; of {', '.join(known)}")  # fmt: skip
    parser.add_argument("--batch", type=tool.at_least(1), help="images (default: 256 on a GPU, 8 on a CPU)")
    parser.add_argument("--pixels", type=tool.at_least(28), help="side of the images (default: each model's own)")
    parser.add_argument("--budget", type=tool.at_least(1), help="seconds after which no setting is begun any more")
    parser.add_argument("--device", help="cpu or cuda (default: the GPU if there is one)")
    parser.add_argument("--runs", type=tool.at_least(1), default=30, help="passes per mean (default: 30)")
    parser.add_argument("--repeats", type=tool.at_least(1), default=3, help="means per median (default: 3)")
    return parser


def from_arguments(given: argparse.Namespace, keep: Callable[[tool.Report], None]) -> tool.Report:
    device = clock.get_device(given.device)
    report = measure(
        given.models,
        device,
        settings=given.settings,
        batch=given.batch or (256 if device.type == "cuda" else 8),
        pixels=given.pixels,
        runs=given.runs,
        repeats=given.repeats,
        budget=given.budget or float("inf"),
        keep=keep,
    )
    print(show(report))
    return report


if __name__ == "__main__":
    sys.exit(tool.main(make_parser(), from_arguments, draw))
