"""Two processes against one, under DDP and FSDP2: the same weights, the same images, and how well it scales.

    python benchmarks/two_gpus.py --out benchmarks/results/two_gpus.json    two GPUs over NCCL
    python benchmarks/two_gpus.py --cpu                                      two gloo processes, small models

weights    largest difference of any trained weight after some steps between two processes and one that was given the
           same whole batches: labels, soft targets, a feature term with an adapter that is muted half-way, relations, a
           contrastive term within the batch. ``reordered`` is one process with each batch's images in reverse: what
           rounding alone does; more than 20 times that is too much. ``moved`` is how far training went.
run        a recipe, from its config to its folder: training images that make no whole number of batches, test images
           that make an odd number of batches, each to be counted once.
scaling    images per second of RIFormer's whole objective (two teachers, four terms), eager, and how much of twice one
           process's two processes reach with as many images on each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import accelerate
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import kdlib as kd
from kdlib import config, progress, recipe, runs
from kdlib.losses import CrossEntropy, FeatureMSE, GramRelation, InfoNCE, SoftTarget
from kdlib.training import evaluation, sharding
from recipes.riformer import gfnet, model  # noqa: F401  registers the models

LAST = "stages.*.blocks.-1"
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block",
}
KINDS: dict[str, tuple[int, dict[str, str]]] = {"one": (1, {}), "ddp": (2, {}), "fsdp2": (2, FSDP2)}
PRECISIONS = ("none", "bf16")
ROUNDING = 20
"""So many times the difference of ``reordered`` may two processes differ from one."""


# what one process does


def work(kind: str, precision: str, cpu: bool, folder: Path) -> None:
    """All measurements of one kind of launch in one precision; the main process writes them into ``folder``."""
    torch.set_num_threads(1 if cpu else 4)
    progress.console.quiet = True
    changes = [f"precision={precision}", f"output={folder / kind}", f"data.batch_size={64 // KINDS[kind][0]}"]
    told = recipe.load(config.read([str(folder / "recipe.yaml"), *changes, *(["data.limit=203"] if cpu else [])]))
    place = runs.start(told)
    found: dict[str, Any] = {"launch": place.distributed_type.value, "backend": place.state.backend}
    for name, reverse in (("weights", False), ("reordered", True))[: 2 if kind == "one" else 1]:
        weights = train(place, cpu, reverse, found if name == "weights" else {})
        if place.is_main_process:
            torch.save(weights, folder / f"{kind}-{precision}-{name}.pt")
    if precision == "none":
        outcome = runs.run(told, place)
        found |= {"top1": outcome.result["top1"], "test_loss": outcome.result["test_loss"]}
        again = evaluation.evaluate(outcome.student, outcome.data.test, place)
        found["again"] = {name: again[name] for name in ("top1", "test_loss")}
    if precision == ("none" if cpu else "bf16"):
        found["images_per_second"] = speed(place, cpu)
    if place.is_main_process:
        (folder / f"{kind}-{precision}.json").write_text(json.dumps(found))


def objective(student: nn.Module, panel: kd.Panel) -> list[kd.Term]:
    """RIFormer's."""
    pairs = {tap: kd.pair(student, panel, tap, f"twin.{tap}") for tap in (LAST, f"{LAST}.token_mixer")}
    return [
        kd.Term("soft", SoftTarget(), pairs=[kd.Pair("@output", "wide")]),
        kd.Term("block", FeatureMSE(), 1e-4, pairs=pairs[LAST], reduce="sum"),
        kd.Term("mixer", FeatureMSE(), 1e-3, pairs=pairs[f"{LAST}.token_mixer"], reduce="sum"),
        kd.Term("relation", GramRelation(), pairs=pairs[LAST], reduce="sum"),
    ]


def every_kind(student: nn.Module, panel: kd.Panel) -> list[kd.Term]:
    """What could go wrong between processes, in one sum."""
    muted = [kd.Pair("stages.1.blocks.1", "wide.stages.1.blocks.1")]  # of other widths, so an adapter is built
    return [
        kd.Term("label", CrossEntropy()),
        kd.Term("soft", SoftTarget(2.0), pairs=[kd.Pair("@output", "wide")]),
        kd.Term("adapted", FeatureMSE(), 0.1, kd.Window(until=0.5), muted, adapter="linear"),
        kd.Term("relation", GramRelation(), pairs=kd.pair(student, panel, LAST, f"twin.{LAST}")),
        kd.Term("contrast", InfoNCE(0.2, symmetric=True), 0.1, pairs=[kd.Pair("stages.3", "twin.stages.3")]),
    ]


def build(cpu: bool, device: torch.device, terms: Any) -> tuple[kd.Distiller, kd.Teacher, int]:
    """The models of the measurement, and their image size."""
    names = ("riformer_micro", "metaformer_pool_micro", "metaformer_pool_nano")
    names, side = (names, 64) if cpu else (("riformer_s12", "metaformer_pool_s12", "gfnet_h_b"), 224)
    torch.manual_seed(0)
    student, twin, wide = (timm.create_model(name, num_classes=100, in_chans=3).to(device) for name in names)
    panel = kd.Panel({"wide": wide, "twin": twin})
    plan = kd.fit(terms(student, panel), student, panel, torch.randn(2, 3, side, side, device=device))
    return kd.Distiller(student, plan.terms).to(device), kd.Teacher(panel, plan.terms), side


def prepare(place: accelerate.Accelerator, distiller: kd.Distiller, optimizer: torch.optim.Optimizer) -> Any:
    if place.is_fsdp2:
        sharding.shard(place, distiller, optimizer)
    return place.prepare(distiller, optimizer)


def step(place: accelerate.Accelerator, engine: Any, ask: kd.Teacher, images: Tensor, labels: Tensor) -> None:
    with place.autocast():
        targets = ask(images) | {"@labels": labels}
    with place.autocast() if place.is_fsdp2 else nullcontext():
        loss = engine(images, targets).loss
    place.backward(loss)


def train(place: accelerate.Accelerator, cpu: bool, reverse: bool, found: dict[str, Any]) -> dict[str, Tensor]:
    """The whole weights after some steps, each process with its part of the same batches."""
    steps, batch = (4, 4) if cpu else (10, 64)
    distiller, ask, side = build(cpu, place.device, every_kind)
    before = {name: p.detach().cpu().clone() for name, p in distiller.named_parameters()}
    engine, optimizer = prepare(place, distiller, torch.optim.SGD(distiller.parameters(), lr=0.01, momentum=0.9))
    generator = torch.Generator().manual_seed(1)
    for number in range(steps):
        distiller.set_epoch(number, steps)
        ask.set_epoch(number, steps)
        images, labels = torch.randn(batch, 3, side, side, generator=generator), torch.arange(batch) % 100
        if reverse:
            images, labels = images.flip(0), labels.flip(0)
        mine = [t.chunk(place.num_processes)[place.process_index].to(place.device) for t in (images, labels)]
        step(place, engine, ask, *mine)
        place.clip_grad_norm_(distiller.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
    sharding.release(distiller)
    weights: dict[str, Tensor] = {name: t.cpu() for name, t in sharding.whole(distiller.state_dict()).items()}
    found["moved"] = max(float((weights[name] - old).abs().max()) for name, old in before.items())
    found["peak_gib"] = None if cpu else round(torch.cuda.max_memory_allocated() / 2**30, 2)
    place.free_memory()
    return weights


def speed(place: accelerate.Accelerator, cpu: bool) -> float:
    """Images per second of all processes together."""
    batch, warm, timed = (4, 1, 2) if cpu else (64, 8, 30)
    distiller, ask, side = build(cpu, place.device, objective)
    engine, optimizer = prepare(place, distiller, torch.optim.AdamW(distiller.parameters(), lr=1e-4))
    images = torch.randn(batch, 3, side, side, device=place.device)
    labels = torch.arange(batch, device=place.device) % 100
    for number in range(warm + timed):
        if number == warm:
            settle(place, cpu)
            began = time.perf_counter()
        step(place, engine, ask, images, labels)
        optimizer.step()
        optimizer.zero_grad()
    settle(place, cpu)
    return batch * place.num_processes * timed / (time.perf_counter() - began)


def settle(place: accelerate.Accelerator, cpu: bool) -> None:
    if not cpu:
        torch.cuda.synchronize()
    place.wait_for_everyone()


# what starts and compares them


def launch(kind: str, precision: str, cpu: bool, folder: Path) -> dict[str, Any]:
    world, more = KINDS[kind]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | more | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    if cpu:
        shared["ACCELERATE_USE_CPU"] = "true"
    elif world == 1:
        shared["CUDA_VISIBLE_DEVICES"] = "0"
    command = [sys.executable, __file__, "--work", kind, precision, str(folder), *(["--cpu"] if cpu else [])]
    jobs = []
    for rank in range(world):
        seat = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world} if world > 1 else {}
        jobs.append(subprocess.Popen(command, env=shared | {name: str(value) for name, value in seat.items()}))
    while None in (codes := [job.poll() for job in jobs]) and not any(codes):
        time.sleep(0.2)
    if any(codes):  # the other one would wait for it
        for job in jobs:
            job.kill()
        raise SystemExit(f"{kind} in {precision} failed; its processes say why above")
    found: dict[str, Any] = json.loads((folder / f"{kind}-{precision}.json").read_text())
    return found


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def compare(precision: str, found: dict[str, dict[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
    """What each kind came to beside one process."""
    saved = {kind: torch.load(folder / f"{kind}-{precision}-weights.pt", weights_only=True) for kind in KINDS}
    reordered = torch.load(folder / f"one-{precision}-reordered.pt", weights_only=True)
    rows = {kind: found[kind] | {"difference": furthest(saved[kind], saved["one"])} for kind in KINDS}
    rows["one"]["reordered"] = rounding = furthest(reordered, saved["one"])
    trained = {kind: folder / kind / "student.safetensors" for kind in KINDS}
    for kind, row in rows.items():
        row["ok"] = row["difference"] <= ROUNDING * rounding
        if precision == "none":
            row["run_difference"] = furthest(load_file(trained[kind]), load_file(trained["one"]))
            row["counted_once"] = (
                max(abs(found[kind]["again"][name] - found[kind][name]) for name in ("top1", "test_loss")) < 1e-3
                and abs(row["test_loss"] - rows["one"]["test_loss"]) < 1e-3
            )
            row["ok"] &= row["counted_once"] and row["run_difference"] < 1e-3
        if "images_per_second" in row:
            base = KINDS[kind][0] * rows["one"]["images_per_second"]
            row["efficiency"] = round(row["images_per_second"] / base, 3)
    return rows


def small_recipe(folder: Path) -> None:
    """A recipe with a teacher whose weights lie beside it."""
    torch.manual_seed(0)
    teacher = timm.create_model("metaformer_pool_nano", num_classes=10, in_chans=1)
    save_file(teacher.state_dict(), folder / "teacher.safetensors")
    (folder / "recipe.yaml").write_text(
        f"""
student: {{name: riformer_nano}}
teachers: {{twin: {{name: metaformer_pool_nano, weights: '{folder / "teacher.safetensors"}'}}}}
terms:
  label: {{loss: cross_entropy}}
  soft: {{loss: soft_target, teacher: twin}}
  block: {{loss: feature_mse, weight: 0.01, student: stages.*.blocks.-1, teacher: twin.stages.*.blocks.-1}}
data: {{name: fashion-mnist-5k, limit: 1003, batch_size: 32, eval_batch_size: 321}}
epochs: 1
optimizer: {{name: sgd, lr: 0.01, momentum: 0.9}}
compile: {{mode: 'off'}}
tf32: false
trackers: []
"""
    )


def write(result: dict[str, Any], out: Path | None) -> None:
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", nargs=3, metavar=("KIND", "PRECISION", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        kind, precision, folder = given.work
        work(kind, precision, given.cpu, Path(folder))
        return
    if not given.cpu and torch.cuda.device_count() < 2:
        raise SystemExit("two GPUs are needed; --cpu runs the same on two gloo processes")
    began = time.perf_counter()
    result: dict[str, Any] = {
        "device": f"CPU ({platform.machine()})" if given.cpu else [torch.cuda.get_device_name(i) for i in range(2)],
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    with tempfile.TemporaryDirectory(prefix="kdlib-two-") as temporary:
        folder = Path(temporary)
        small_recipe(folder)
        for precision in PRECISIONS:
            found = {kind: launch(kind, precision, given.cpu, folder) for kind in KINDS}
            result[precision] = compare(precision, found, folder)
            for kind, row in result[precision].items():
                print(precision, kind, json.dumps(row), flush=True)
            write(result, given.out)
    result["seconds"] = round(time.perf_counter() - began)
    result["ok"] = all(row["ok"] for precision in PRECISIONS for row in result[precision].values())
    print("ok" if result["ok"] else "two processes are not one", f"in {result['seconds']} s")
    write(result, given.out)
    sys.exit(not result["ok"])


if __name__ == "__main__":
    main()
