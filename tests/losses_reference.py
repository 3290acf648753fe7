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
