"""The rules that hold the house up (CONTRIBUTING.md), each one a test. Rules proven elsewhere are named at the end."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, Tiny
from torch import nn

import kdlib as kd
from kdlib.losses import LOSSES

KDLIB = ROOT / "kdlib"
FILES = sorted(path for path in KDLIB.rglob("*.py") if "assets" not in path.parts)

FLOORS = {
    "losses": 0, "taps": 0, "pairing": 0, "adapters": 0, "schedules": 0, "yaml12": 0, "progress": 0, "cka": 0,
    "signals": 0, "files": 0,
    "config": 1, "plugins": 1, "terms": 1, "teacher": 1, "distiller": 1, "plan": 1, "sizing": 1, "inspect": 1,
    "__init__": 1,
    "data": 2, "recipe": 2, "results": 2, "pairs": 2,
    "training": 3, "ready": 3, "engine": 3, "runs": 3, "dryrun": 3, "models": 3, "export": 3, "doctor": 3,
    "conclude": 3,
    "launch": 4, "usage": 4, "study": 4, "report": 4, "cli": 4, "__main__": 4,
}  # fmt: skip
"""Where each file or package of kdlib lives; it imports from its own floor or from below."""

HEAVY = {0: {"torch", "triton", "einops", "yaml", "rich"}, 1: {"torch", "einops", "yaml", "rich"}}
"""Third parties that a floor may import (triton comes with torch for a GPU, and kernels alone import it); floors above
may import anything that pyproject.toml lists."""


def imports(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports at its top level or below."""
    package = ["kdlib", *path.relative_to(KDLIB).parts[:-1]]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            stem = [*base, *(node.module.split(".") if node.module else [])]
            found.add(".".join(stem))
            if node.level:
                found |= {".".join([*stem, alias.name]) for alias in node.names}
    return found


def room(path: Path) -> str:
    return path.relative_to(KDLIB).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(KDLIB)))
def test_imports_only_go_down(path: Path) -> None:
    """Rule 8."""
    here = room(path)
    assert here in FLOORS, f"say in FLOORS on which floor {here} lives"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "kdlib" and len(parts) > 1 and (there := parts[1]) in FLOORS and there != here:
            assert FLOORS[there] <= FLOORS[here], (
                f"{here} (floor {FLOORS[here]}) imports {there} (floor {FLOORS[there]})"
            )
            if FLOORS[here] == 0:
                pytest.fail(f"{here} imports {there}: nothing on floor 0 imports another")
        if FLOORS[here] in HEAVY and parts[0] not in sys.stdlib_module_names and parts[0] != "kdlib":
            assert parts[0] in HEAVY[FLOORS[here]], f"{here} on floor {FLOORS[here]} imports {parts[0]}"


def test_training_knows_nothing_of_what_is_made_of_it() -> None:
    """Rule 8: `runs` and its neighbours put `training/` together; it imports none of them."""
    above = {name for name, floor in FLOORS.items() if floor >= FLOORS["training"]} - {"training"}
    for path in sorted((KDLIB / "training").glob("*.py")):
        known = {name.split(".")[1] for name in imports(path) if name.startswith("kdlib.")}
        assert not known & above, f"{path.name} imports {known & above}"


@pytest.mark.fault("install")
@pytest.mark.parametrize("what", ["kdlib", "kdlib.losses"])
def test_import_loads_torch_and_einops_and_nothing_heavier(what: str) -> None:
    """Rule 8, and the losses work where torchvision does not. The compiler, which takes a second, waits until asked."""
    heavy = ["timm", "torchvision", "accelerate", "pydantic", "yaml", "matplotlib", "rich", "safetensors"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({heavy!r})); import {what}; import torch\n"
        "assert not {'triton', 'torch._dynamo', 'torch._inductor'} & set(sys.modules)\n"
        "from kdlib.losses import SoftTarget; print(SoftTarget()(torch.zeros(1, 2), torch.zeros(1, 2)).item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0 and done.stdout.strip() == "0.0", done.stderr


def test_only_one_folder_knows_pydantic() -> None:
    """Rule 7: configs end at the door."""
    knowing = {room(path) for path in FILES if any(name.split(".")[0] == "pydantic" for name in imports(path))}
    assert knowing == {"recipe"}


def test_a_loss_knows_no_weight_no_path_and_no_config() -> None:
    """Rule 1: what a loss may read is what `against` says; nothing in its constructor is a weight or a module path."""
    import inspect

    for name, loss in LOSSES.items():
        assert set(loss.against) <= {"teacher", "labels", "indices"}, name
        forbidden = {"weight", "loss_weight", "student_module", "teacher_module", "config", "cfg", "module_path"}
        assert not forbidden & set(inspect.signature(loss).parameters), name


def test_a_bare_function_is_a_loss_too() -> None:
    """Rule 1."""
    student, teacher = Tiny(), Tiny()
    terms = [kd.Term("gap", lambda s, t: (s - t).abs().mean())]
    images = torch.randn(2, 3, 8, 8)
    assert kd.Distiller(student, terms)(images, kd.Teacher(teacher, terms)(images)).loss > 0


def test_losses_compose_by_holding() -> None:
    """Rule 2: no loss inherits from another loss."""
    for name, loss in LOSSES.items():
        bases = [base for base in loss.__mro__[1:] if base in LOSSES.values()]
        assert not bases, f"{name} inherits from {bases}"
    both = 0.7 * kd.losses.SoftTarget(4.0) + 0.3 * kd.losses.HardLabel()
    s, t = torch.randn(4, 5), torch.randn(4, 5)
    expected = 0.7 * kd.losses.SoftTarget(4.0)(s, t) + 0.3 * kd.losses.HardLabel()(s, t)
    torch.testing.assert_close(both(s, t), expected)
    torch.testing.assert_close((2 * both + both)(s, t), 3 * expected)
    torch.testing.assert_close(sum([both, both / np.float32(2), -1 * (both - 3 * both)])(s, t), 3.5 * expected)
    with pytest.raises(ValueError, match=r"a class that derives from torch\.nn\.Module is registered, got <function"):
        kd.losses.register(lambda student, teacher: student)
    task = kd.losses.CrossEntropy() + both
    labels = torch.tensor([0, 1, 2, 3])
    assert task.against == ("teacher", "labels")
    torch.testing.assert_close(task(s, t, labels), expected + nn.functional.cross_entropy(s, labels))
    with pytest.raises(ValueError, match="losses of one view"):
        kd.losses.SoftTarget() + kd.losses.FeatureMSE()
    with pytest.raises(TypeError, match="scaled by a number"):
        kd.losses.SoftTarget() * kd.losses.SoftTarget()


@pytest.mark.parametrize("path", sorted((KDLIB / "losses").glob("*.py")), ids=lambda path: path.name)
def test_numerics_belong_to_the_loss(path: Path) -> None:
    """Rule 3, as far as text can tell; tests/laws.py proves the numbers."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert not called.endswith((".item", ".nonzero", ".tolist", ".cpu", ".numpy")), f"{called} synchronises"
            if called.endswith("kl_div"):
                kinds = [ast.literal_eval(k.value) for k in node.keywords if k.arg == "reduction"]
                assert kinds and "mean" not in kinds, "kl_div(reduction='mean') divides by the number of classes too"
            if called in ("torch.log",) and node.args:
                assert "softmax" not in ast.unparse(node.args[0]), "log of a softmax"


def test_sizes_exist_before_the_optimizer() -> None:
    """Rule 5: an unfitted adapter is refused where the optimizer would otherwise miss it."""
    term = kd.Term("x", kd.losses.FeatureMSE(), pairs=[kd.Pair("stem", "stem")], adapter="linear")
    with pytest.raises(ValueError, match=r"call kdlib\.fit"):
        kd.Distiller(Tiny(), [term])


def test_the_loop_does_not_synchronise_every_step() -> None:
    """Rule 10: in the step itself nothing asks the device for a value (counted by tests/test_synchronisation.py)."""
    places = {
        "train.py": {"_step"}, "passes.py": {"__call__", "backward", "with_teacher"}, "journal.py": {"add", "timed"},
        "gradients.py": {"norm"}, "shield.py": {"remember", "see", "disarm", "settle"},
    }  # fmt: skip
    for file, names in places.items():
        tree = ast.parse((KDLIB / "training" / file).read_text())
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        steps = [function for function in functions if function.name in names]
        assert {function.name for function in steps} == names
        called = [ast.unparse(n.func) for step in steps for n in ast.walk(step) if isinstance(n, ast.Call)]
        assert not {name.rpartition(".")[2] for name in called} & {"item", "tolist", "cpu", "numpy", "print"}
        assert not {"float", "bool", "int"} & set(called)


ELSEWHERE = {
    4: "tests/test_distiller.py::test_the_teacher_does_not_change_by_one_bit",
    6: "tests/test_taps.py",
    9: "tests/test_recipe.py",
}
"""Rules that other files prove."""


@pytest.mark.parametrize("place", ELSEWHERE.values())
def test_the_other_rules_are_where_this_file_says(place: str) -> None:
    file, _, name = place.partition("::")
    assert (ROOT / file).exists() and f"def {name}" in (ROOT / file).read_text()
