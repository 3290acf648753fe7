"""Writes the tables of docs/performance.md from benchmarks/results/*.json.

PYTHONPATH=. python docs/make_performance.py            # writes them
PYTHONPATH=. python docs/make_performance.py --check    # fails if they are not what would be written
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from generated import main, result, table

PAGE = Path(__file__).with_name("performance.md")
NOT_YET = "Not measured yet."
THEIRS = ("torchdistill", "nvidia-modelopt")
PURE, LOGITS, TIMM = "kdlib, pure bf16", "kdlib (logits only)", "timm.task (logits only)"


def about(found: dict[str, Any]) -> str:
    """Device, versions, day, and what the file itself says of its limits."""
    parts = [found["device"], f"torch {found['torch']}", found["date"][:10]]
    for key, text in (("batch", "batch {}"), ("precision", "{}"), ("rounds", "{} rounds"), ("busy", "load {} a core")):
        if found.get(key) is not None:
            parts.append(text.format(found[key]))
    line = ", ".join(str(part) for part in parts)
    return f"{line[0].upper()}{line[1:]}." + (f" ({found['note']}.)" if found.get("note") else "")


def step(name: str) -> str:
    found = result(name)
    if found is None:
        return NOT_YET
    heads = ("work", "who", "mode", "ms", "least ms", "kernels' ms", "peak MiB", "of the floor", "of by hand",
             "first step s")  # fmt: skip
    written = f"{about(found)}\n\n{table(heads, [_step(row) for row in found['rows']])}"
    return f"{written}\n\n{line}" if (line := _peers(found["rows"])) else written


def _peers(rows: list[dict[str, Any]]) -> str:
    """How long others take for what kdlib does compiled."""
    times = {(row["work"], row["who"], row["mode"]): row["ms"] for row in rows if "ms" in row}
    own, pure, logits, timm = (
        times.get(("blocks", *who))
        for who in (("kdlib", "default"), (PURE, "default"), (LOGITS, "default"), (TIMM, "eager"))
    )
    if own is None or pure is None:
        return ""
    told = [f"{who} {ms / own:.2f} ({ms / pure:.2f})" for (work, who, mode), ms in times.items()
            if work == "blocks" and who not in ("floor", "by hand", "kdlib", PURE, LOGITS)]  # fmt: skip
    graph = times.get(("blocks", "kdlib", "compiled-graphs"))
    line = (
        "Times as long as kdlib's compiled step of blocks (in brackets: as the one with teachers in pure bf16), the "
        f"others as they come: {', '.join(told)}."
    )
    if graph:
        recorded = ", ".join(f"{who} {times['blocks', who, 'eager'] / graph:.2f}" for who in THEIRS)
        line = f"{line} As kdlib's step of blocks recorded as a graph: {recorded}."
    return f"{line} As kdlib's step of logits alone: {TIMM} {timm / logits:.2f}." if timm and logits else line


def _step(row: dict[str, Any]) -> list[str]:
    who = [row["work"], row["who"], row["mode"]]
    if "failed" in row:
        return [*who, row["failed"], *[""] * 6]
    times = [f"{row[key]:.1f}" if key in row else "-" for key in ("ms", "least")]
    times.append(f"{row['kernels']['ms']:.1f}" if "kernels" in row else "-")
    memory = f"{row['MiB']:,}" if "MiB" in row else "-"
    return [*who, *times, memory, _ratio(row, "of_floor"), _ratio(row, "of_hand"), f"{row['first_step_s']:.1f}"]


def _ratio(row: dict[str, Any], key: str) -> str:
    """A ratio, with its quartiles over rounds where they are stored."""
    value = row.get(key)
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else f"{value[1]:.3f} ({value[0]:.3f} … {value[2]:.3f})"


def throughput(name: str) -> str:
    found = result(name)
    assert found is not None
    best = table(
        ("model", "form", "setting", "images/s", "paper, one A100"),
        [(b["model"], b["form"], b["setting"], f"{b['images_per_second']:,.0f}", f"{b['paper']:,.0f}" if b.get("paper")
          else "-") for b in found["best"]],
    )  # fmt: skip
    ratios = table(
        ("model", "against", "ratio", "paper", "goal"),
        [(r["model"], r["against"], f"{r['ratio']:.2f}", f"{r['paper']:.2f}" if r.get("paper") else "-",
          f"{r['goal']:.1f}, {'reached' if r['reached'] else 'not reached'}" if r.get("goal") else "-")
         for r in found["ratios"]],
    )  # fmt: skip
    return f"{about(found)}\n\n{best}\n\n{ratios}"


def inference(name: str) -> str:
    found = result(name)
    if found is None:
        return NOT_YET
    rows = [(row["model"], row["form"], row["setting"], f"{row['ms']:.2f}", f"{row['images_per_second']:,.0f}",
             _ratio(row, "of_train")) for row in found["rows"] if "ms" in row]  # fmt: skip
    return f"{about(found)}\n\n{table(('model', 'form', 'setting', 'ms', 'images/s', 'of the train form'), rows)}"


def scaling() -> str:
    found = result("scaling")
    if found is None:
        return NOT_YET
    rows = [(str(row["processes"]), row["work"], f"{row['images']:,}", f"{row['ms']:.1f}",
             ", ".join(f"{ms:.1f}" for ms in row["ranks_ms" if row["processes"] > 1 else "cards_ms"]),
             f"{row['apart_ms'] / row['ms']:.3f}", _ratio(row, "efficiency"))
            for row in found["rows"]]  # fmt: skip
    heads = ("processes", "work", "images a step", "ms", "ms of each without reduction", "of these", "of one process")
    return f"{about(found)}\n\n{table(heads, rows)}"


def losses() -> str:
    found = result("losses")
    assert found is not None
    heads = ("loss", "last shape", "ours ms", "plain ms", "times faster", "ours MiB", "plain MiB")
    rows = []
    for row in found["rows"]:
        ours, plain = row["ours"], row["plain"]
        cells = [f"`{row['loss']}`", "×".join(map(str, row["shapes"][-1]))]
        if "failed" in ours or "failed" in plain:
            rows.append((*cells, _ms(ours), _ms(plain), "-", _mib(ours), _mib(plain)))
            continue
        ratio = (plain["forward_ms"] + plain["backward_ms"]) / (ours["forward_ms"] + ours["backward_ms"])
        rows.append((*cells, _ms(ours), _ms(plain), f"{ratio:.2f}", _mib(ours), _mib(plain)))
    return f"{about(found)}\n\n{table(heads, rows)}"


def _ms(measured: dict[str, Any]) -> str:
    return measured.get("failed") or f"{measured['forward_ms'] + measured['backward_ms']:.2f}"


def _mib(measured: dict[str, Any]) -> str:
    return "-" if "failed" in measured else f"{max(measured['forward_mib'], measured['backward_mib']):,.0f}"


def roofline() -> str:
    """Floors of the blocks of a fused RIFormer-M36, 128 images of 224 px, bf16: from its shapes alone.

    Passes over a block's (B, H, W, C), reads and writes together. Eager: layer norm 2, scale 2, shift 2, sum 3, layer
    norm 2, fc1 5, GELU 8, fc2 5, sum 3. Epilogues: fc1 reads x and writes the hidden layer (1 + 4), fc2 reads it and x
    and writes x (4 + 1 + 1). On chip: x is read and written.
    """
    passes = {"eager": 32, "epilogues": 11, "on chip": 2}
    heads = ("part", "blocks", "grid", "channels", "GFLOP", "ms at 790 TFLOP/s",
             *(f"{how}: GB, ms at 3.35 and 4.8 TB/s" for how in passes))  # fmt: skip
    rows, total = [], [0.0, 0.0, 0.0]
    for i, (blocks, side, dim) in enumerate(((6, 56, 96), (6, 28, 192), (18, 14, 384), (6, 7, 768)), 1):
        elements = blocks * 128 * side * side * dim
        part = [
            elements * 16 * dim,
            elements * 2,
            blocks * 16 * dim * dim,
        ]  # operations, bytes a pass, bytes of weights
        total = [a + b for a, b in zip(total, part, strict=True)]
        rows.append((f"stage {i}", str(blocks), f"{side}×{side}", str(dim), *_floors(part, passes)))
    rows.append(("all blocks", "36", "", "", *_floors(total, passes)))
    return table(heads, rows)


def _floors(part: list[float], passes: dict[str, int]) -> list[str]:
    flop, one, weights = part
    moved = [count * one + weights for count in passes.values()]
    times = [f"{b / 1e9:.2f}, {b / 3.35e9:.2f}, {b / 4.8e9:.2f}" for b in moved]
    return [f"{flop / 1e9:,.0f}", f"{flop / 790e9:.2f}", *times]


def kernels() -> str:
    """Each stage of the fused M36: compiled, and the best tiles of both ways of the kernels."""
    found = result("fused_blocks")
    assert found is not None
    ways = {"compiled": "compiled", "on chip": "hidden layer on chip", "two products": "GELU in the product"}
    rows, sums = [], dict.fromkeys(ways, 0.0)
    for stage in (1, 2, 3, 4):
        of = [row for row in found["rows"] if row.get("stage") == stage and "ms" in row]
        best = {way: min((row["ms"] for row in of if row["who"].startswith(way)), default=None) for way in ways}
        sums["compiled"] += best["compiled"]
        sums["on chip"] += min(ms for way, ms in best.items() if ms is not None and way != "compiled")
        rows.append(
            (f"stage {stage}", str(of[0]["blocks"]), *("-" if ms is None else f"{ms:.2f}" for ms in best.values()))
        )
    rows.append(("all", "36", f"{sums['compiled']:.2f}", f"{sums['on chip']:.2f}, the better of both", ""))
    wrong = {row["who"]: row["relative"] for row in found["rows"] if row["what"] == "error"}
    note = (
        f"Logits of the whole model in bf16 are off by {100 * wrong['plain']:.2f} % without and "
        f"{100 * wrong['kernels']:.2f} % with kernels (norm of the difference from float32, over its norm)."
    )
    heads = ("blocks of", "count", *(f"{text}, ms" for text in ways.values()))
    return f"{about(found)} {note}\n\n{table(heads, rows)}"


TABLES = {
    "step": lambda: step("step"), "step_h200": lambda: step("step_h200"), "step_cpu": lambda: step("step_cpu"),
    "scaling": scaling,
    "throughput": lambda: throughput("throughput"), "throughput_h100": lambda: throughput("throughput_h100"),
    "inference": lambda: inference("inference"), "inference_cpu": lambda: inference("inference_cpu"),
    "losses": losses, "roofline": roofline, "kernels": kernels,
}  # fmt: skip

if __name__ == "__main__":
    main(PAGE, TABLES)
