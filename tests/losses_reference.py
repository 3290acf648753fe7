"""The stored numbers of published implementations, and how each is asked of ``kdlib.losses``.

``REFERENCES`` maps the name of a file in goldens/losses to a function that makes the call of one case. Both the tests
and docs/make_losses.py read it, so the page of the documentation states what the tests have compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdlib import losses

GOLDENS = Path(__file__).parent / "goldens" / "losses"


@dataclass
class Case:
    """One case of one file: its arrays without their prefix, as tensors of one precision."""

    file: str
    index: int
    dtype: torch.dtype
    hyper: dict[str, Any] = field(init=False)
    arrays: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        with np.load(GOLDENS / f"{self.file}.npz") as stored:
            prefix = f"case{self.index}_"
            raw = {name[len(prefix) :]: stored[name] for name in stored.files if name.startswith(prefix)}
            self.hyper = json.loads(str(stored["meta"]))["cases"][self.index]["hyper"]
        self.arrays = {name: torch.from_numpy(np.array(value)) for name, value in raw.items()}
        for name, value in self.arrays.items():
            if value.is_floating_point() and "grad" not in name and "value" not in name:
                self.arrays[name] = value.to(self.dtype)

    def __getitem__(self, name: str) -> Tensor:
        return self.arrays[name]

    def some(self, start: str) -> list[Tensor]:
        """``start_0``, ``start_1``, … in order."""
        names = [name for name in self.arrays if name.startswith(f"{start}_") and name[len(start) + 1 :].isdigit()]
        return [self.arrays[name] for name in sorted(names, key=lambda name: int(name.rsplit("_", 1)[1]))]

    @property
    def students(self) -> list[Tensor]:
        return self.some("student") or [self["student"]]

    @property
    def teachers(self) -> list[Tensor]:
        return self.some("teacher") or [self["teacher"]]

    @property
    def value(self) -> float:
        return float(self["value64" if self.dtype == torch.float64 else "value"])

    @property
    def grads(self) -> list[Tensor]:
        name = "grad64" if self.dtype == torch.float64 else "grad"
        return self.some(name) or [self[name]]

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {name[len("param_") :]: value for name, value in self.arrays.items() if name.startswith("param_")}

    @property
    def paramgrads(self) -> dict[str, Tensor]:
        return {
            name[len("paramgrad_") :]: value for name, value in self.arrays.items() if name.startswith("paramgrad_")
        }


@dataclass
class Call:
    """A loss, ready to be called, and where the stored parameters of the reference lie in it."""

    loss: nn.Module
    compute: Callable[..., Tensor]
    """Takes the student's tensors of the case."""
    places: dict[str, nn.Parameter] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    """Classes that the file vouches for, where the loss alone does not say it."""


@dataclass
class Errors:
    """Largest differences from a reference: of the value relatively, of gradients relative to the largest entry."""

    value: float
    grad: float
    paramgrad: float


REFERENCES: dict[str, Callable[[Case], Call]] = {}


def reference(*files: str) -> Callable[[Callable[[Case], Call]], Callable[[Case], Call]]:
    def add(make: Callable[[Case], Call]) -> Callable[[Case], Call]:
        REFERENCES.update(dict.fromkeys(files, make))
        return make

    return add


def plain(*files: str) -> Callable[[Callable[[Case], nn.Module]], None]:
    """A loss called with the student, the teacher and, where it needs them, the labels."""

    def add(make: Callable[[Case], nn.Module]) -> None:
        def call(case: Case) -> Call:
            loss = make(case)
            given = [case["target"] if need == "labels" else case["teacher"] for need in loss.against]
            return Call(loss, lambda student: loss(student, *given))

        REFERENCES.update(dict.fromkeys(files, call))

    return add


def listed(*files: str) -> Callable[[Callable[[Case], nn.Module]], None]:
    def add(make: Callable[[Case], nn.Module]) -> None:
        def call(case: Case) -> Call:
            loss = make(case)
            return Call(loss, lambda *students: loss(list(students), case.teachers))

        REFERENCES.update(dict.fromkeys(files, call))

    return add


plain("kd_soft")(lambda case: losses.SoftTarget(**case.hyper))
plain("kd_hard")(lambda case: losses.HardLabel())
plain("dkd")(lambda case: losses.DKD(**case.hyper))
plain("nkd")(lambda case: losses.NKD(case.hyper["gamma"], case.hyper["temp"]))
plain("ofa")(lambda case: losses.OFA(**case.hyper))
plain("dist")(lambda case: losses.DIST(case.hyper["beta"], case.hyper["gamma"], case.hyper["tau"]))
plain("ttm")(lambda case: losses.TTM(case.hyper["l"]))
plain("wttm")(lambda case: losses.WTTM(case.hyper["l"]))
plain("mlkd_cc")(lambda case: losses.ClassCorrelation(**case.hyper))
plain("mlkd_bc")(lambda case: losses.BatchCorrelation(**case.hyper))
plain("lskd")(lambda case: losses.Standardized(losses.SoftTarget(**case.hyper)))
plain("fitnet", "riformer_imitation")(lambda case: losses.FeatureMSE())


@reference("deit_soft", "deit_hard")
def deit(case: Case) -> Call:
    """Two heads of one student: labels on the first, the teacher on the second."""
    alpha, tau = case.hyper["alpha"], case.hyper.get("tau")
    base = losses.CrossEntropy()
    kd = losses.HardLabel() if tau is None else losses.SoftTarget(tau)
    scale = alpha if tau is None else alpha / case["teacher"].shape[-1]

    def compute(first: Tensor, second: Tensor) -> Tensor:
        return (1 - alpha) * base(first, case["target"]) + scale * kd(second, case["teacher"])

    return Call(kd, compute, classes=("CrossEntropy",))


@reference("riformer_relation", "riformer_relation_raw")
def gram(case: Case) -> Call:
    loss = losses.GramRelation(normalize=not case.file.endswith("raw"))
    return Call(loss, lambda student: loss(student.flatten(2).mT, case["teacher"].flatten(2).mT))


plain("cwd")(lambda case: case.hyper["loss_weight"] * losses.ChannelWise(case.hyper["tau"]))
plain("srrl_statm")(lambda case: losses.ChannelMean())
plain("pkd")(lambda case: case.hyper["loss_weight"] * losses.PKD())
plain("nst")(lambda case: losses.NST())
plain("at_code", "at_paper")(lambda case: losses.AttentionTransfer(variant=case.file[3:], **case.hyper))
plain("ickd_cifar", "ickd_imagenet")(lambda case: losses.ICKD(variant=case.file[5:]))
plain("sp")(lambda case: losses.SimilarityPreserving())
plain("rkd_distance")(lambda case: losses.RKDDistance())
plain("rkd_angle")(lambda case: losses.RKDAngle())
plain("pkt")(lambda case: losses.PKT(**case.hyper))
plain("cc")(lambda case: losses.CorrelationCongruence())
plain("cckd")(lambda case: losses.CCKD(**case.hyper))
plain("infonce")(lambda case: losses.InfoNCE(**case.hyper))
listed("fsp")(lambda case: losses.FSP())
listed("reviewkd_hcl")(lambda case: losses.HierarchicalContext())


def placed(case: Case, loss: nn.Module, places: dict[str, str]) -> dict[str, nn.Parameter]:
    """Loads the stored parameters where ``places`` says, and gives those places."""
    loss.to(case.dtype)
    held = dict(loss.named_parameters()) | dict(loss.named_buffers())
    with torch.no_grad():
        for name, place in places.items():
            assert held[place].shape == case.parameters[name].shape, (name, place)
            held[place].copy_(case.parameters[name])
    return {name: loss.get_parameter(place) for name, place in places.items() if f"paramgrad_{name}" in case.arrays}


def channels(case: Case) -> dict[str, int]:
    return {"student_channels": case["student"].shape[1], "teacher_channels": case["teacher"].shape[1]}


@reference("mgd_channel", "mgd_spatial")
def mgd(case: Case) -> Call:
    hyper = case.hyper
    loss = losses.MGD(case.file[4:], ratio=hyper["lambda_mgd"], alpha=hyper["alpha_mgd"], **channels(case))
    modules = {"align": "align", "gen1": "generate.0", "gen2": "generate.2"}
    places = {f"{a}_{kind}": f"{b}.{kind}" for a, b in modules.items() for kind in ("weight", "bias")}
    places = placed(case, loss, {name: place for name, place in places.items() if name in case.parameters})
    return Call(loss, lambda student: loss(student, case["teacher"], case["mask"]), places)


@reference("vid")
def vid(case: Case) -> Call:
    loss = losses.VID(eps=case.hyper["eps"], **channels(case))
    modules = {f"conv{i + 1}_weight": f"mean.{2 * i}.weight" for i in range(3)}
    places = placed(case, loss, modules | {"log_scale": "rho"})
    return Call(loss, lambda student: loss(student, case["teacher"]), places)


@reference("ofd")
def ofd(case: Case) -> Call:
    """The margin is computed from the batch norm, and compared with the stored one."""
    norm = nn.BatchNorm2d(case["teacher"].shape[1]).to(case.dtype)
    with torch.no_grad():
        norm.weight.copy_(case.parameters["bn_weight"])
        norm.bias.copy_(case.parameters["bn_bias"])
    loss = losses.OFD(norm, project=False, **channels(case)).to(case.dtype)
    assert torch.allclose(loss.margin, case.parameters["margin"], rtol=1e-5, atol=1e-6)
    loss.margin.copy_(case.parameters["margin"])
    return Call(loss, lambda student: loss(student, case["teacher"]))


@reference("simkd")
def simkd(case: Case) -> Call:
    loss = losses.SimKD(factor=case.hyper["factor"], **channels(case))
    modules = {f"conv{i + 1}_weight": f"project.{3 * i}.weight" for i in range(3)}
    modules |= {f"bn{i + 1}_{kind}": f"project.{3 * i + 1}.{kind}" for i in range(3) for kind in ("weight", "bias")}
    places = placed(case, loss, modules)
    return Call(loss, lambda student: loss(student, case["teacher"]), places)


@reference("reviewkd_abf")
def review(case: Case) -> Call:
    loss = losses.ReviewKD(case.hyper["in_channels"], case.hyper["out_channels"])
    parts = {"conv1": "enter.0", "bn1": "enter.1", "conv2": "leave.0", "bn2": "leave.1", "att": "gate"}
    places = {}
    for name in case.parameters:
        level, part, kind = name.split("_")
        places[name] = f"fusions.{level[3:]}.{parts[part]}.{kind}"
    places = placed(case, loss, places)
    return Call(loss, lambda *students: loss(list(students), case.teachers), places)


@reference("vkd")
def vkd(case: Case) -> Call:
    """float32 goes through the loss's own projection; float64 and the parameter's gradient take the stored matrix as
    it is, for it is orthonormal to float32 only."""
    loss = losses.VkD(case["student"].shape[-1], case["teacher"].shape[1]).to(case.dtype)
    weight = nn.Parameter(case.parameters["weight"].clone())
    with torch.no_grad():
        loss.projection.copy_(weight)
    scale = case.hyper["alpha"]
    direct = loss.distance(case["student"].requires_grad_(False), case["teacher"], weight) * scale
    direct.backward()
    if case.dtype == torch.float32:
        return Call(loss, lambda student: scale * loss(student, case["teacher"]), {"weight": weight})
    fixed = weight.detach()
    return Call(loss, lambda student: scale * loss.distance(student, case["teacher"], fixed), {"weight": weight})


@reference("crd")
def crd(case: Case) -> Call:
    """The memories and constants after the step are compared as well."""
    hyper = case.hyper
    loss = losses.CRD(
        hyper["n_data"],
        case.parameters["memory_student"].shape[1],
        hyper["nce_k"],
        hyper["nce_t"],
        hyper["nce_m"],
        case["student"].shape[1],
        case["teacher"].shape[1],
    )
    names = [f"embed_{side}_{kind}" for side in ("student", "teacher") for kind in ("weight", "bias")]
    places = {name: name.replace("_weight", ".weight").replace("_bias", ".bias") for name in names}
    places |= {name: name for name in ("memory_student", "memory_teacher")}
    held = placed(case, loss, places)
    if hyper["z_student"] is not None:
        loss.z.copy_(torch.tensor([hyper["z_student"], hyper["z_teacher"]]))

    def compute(student: Tensor) -> Tensor:
        value = loss(student, case["teacher"], case["idx"], case["contrast_idx"])
        for name in ("memory_student", "memory_teacher", "z"):
            assert torch.allclose(getattr(loss, name), case[f"after_{name}"], rtol=1e-5, atol=1e-6)
        return value

    return Call(loss, compute, held)


def call(case: Case) -> Call:
    """The call of a case, with the loss in the case's precision."""
    return REFERENCES[case.file](case)


def compare(case: Case) -> Errors:
    """Runs a case and measures how far it is from the stored numbers."""
    made = call(case)
    students = [student.clone().requires_grad_() for student in case.students]
    value = made.compute(*students)
    assert value.shape == () and value.dtype == case.dtype
    value.backward()
    grads = [(student.grad, expected) for student, expected in zip(students, case.grads, strict=True)]
    paramgrads = [(place.grad, case.paramgrads[name]) for name, place in made.places.items()]
    assert set(made.places) >= set(case.paramgrads), "a stored parameter gradient is not compared"
    return Errors(
        abs(value.item() - case.value) / abs(case.value),
        max(_relative(got, expected) for got, expected in grads),
        max((_relative(got, expected) for got, expected in paramgrads), default=0.0),
    )


def cases(dtype: torch.dtype) -> Iterator[Case]:
    for file in sorted(path.stem for path in GOLDENS.glob("*.npz")):
        for index in range(2):
            yield Case(file, index, dtype)


def _relative(got: Tensor | None, expected: Tensor) -> float:
    assert got is not None, "no gradient"
    got, expected = got.double(), expected.double()
    return float((got - expected).abs().max() / expected.abs().max())
