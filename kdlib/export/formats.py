"""How each format is written, and how it is read back by those who use it."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..config import ConfigError, one_line
from ..training import checkpoint
from .context import Context, Model
from .hub import build_args, home, read_folder, write_folder


@dataclass(frozen=True)
class Format:
    """One way to take a model away."""

    write: Callable[[Context, Path], None]
    read: Callable[[Context, Path], Model]
    needs: Callable[[Context], str]
    load: Callable[[Context], str]
    """Python that loads it, for the card."""


def _write_safetensors(context: Context, folder: Path) -> None:
    checkpoint.save_weights(context.model, folder / "model.safetensors")


def _read_safetensors(context: Context, folder: Path) -> Model:
    model = timm.create_model(context.name, **build_args(context.found, context.arguments))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def _load_safetensors(context: Context) -> str:
    arguments = "".join(f", {key}={value!r}" for key, value in build_args(context.found, context.arguments).items())
    return (
        f"import timm\nfrom safetensors.torch import load_file\n{_import(context)}\n"
        f'model = timm.create_model("{context.name}"{arguments})\n'
        'model.load_state_dict(load_file("model.safetensors"))\nmodel.eval()'
    )


def _write_onnx(context: Context, folder: Path) -> None:
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError([f"--to onnx needs {error.name}; pip install 'kdlib[export]'"]) from None
    with _quiet(), _told("ONNX"):
        torch.onnx.export(
            _contiguous(context),
            (_example(context),),
            folder / "model.onnx",
            dynamo=True,
            external_data=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=None if context.batch_size else ({0: torch.export.Dim("batch")},),
        )
    model = onnx.load(folder / "model.onnx")
    for part in (*model.graph.node, *(node for function in model.functions for node in function.node)):
        del part.metadata_props[:]  # the exporter's stack traces, with the paths of this machine
    onnx.save(model, folder / "model.onnx")


def _read_onnx(context: Context, folder: Path) -> Model:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


LOAD_ONNX = """import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
(logits,) = session.run(["logits"], {"images": images})    # images: float32 array (B, C, H, W)"""


def _write_exported(context: Context, folder: Path) -> None:
    dynamic = None if context.batch_size else ({0: torch.export.Dim("batch")},)
    with _quiet(), _told("torch.export"):
        program = torch.export.export(_contiguous(context), (_example(context),), dynamic_shapes=dynamic, strict=False)
        torch.export.save(program, folder / "model.pt2")


def _read_exported(context: Context, folder: Path) -> Model:
    with _quiet():
        return torch.export.load(folder / "model.pt2").module()


LOAD_EXPORTED = 'import torch\n\nmodel = torch.export.load("model.pt2").module()'


def _load_folder(context: Context) -> str:
    return f'import timm\n{_import(context)}\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True).eval()'


def _import(context: Context) -> str:
    place = home(context.name)
    return "" if place is None else f"import {place}    # registers {context.name}\n"


def _needs(what: str) -> Callable[[Context], str]:
    def needs(context: Context) -> str:
        place = home(context.name)
        return what if place is None else f"{what}, and `import {place}`, which registers {context.name} with timm"

    return needs


def _example(context: Context) -> Tensor:
    return context.found.noise(context.batch_size or 2)


def _contiguous(context: Context) -> nn.Module:
    return context.model.to(memory_format=torch.contiguous_format)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """A model that a tracer does not understand is the user's to know of, in one line."""
    try:
        yield
    except (ConfigError, OSError):
        raise
    except Exception as error:
        reason = one_line(error, 200)
        raise ConfigError(
            [f"{what} cannot trace this model ({reason}); try --batch-size 1, --no-fuse or another format"]
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters print progress and warn of their own insides."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


FOLDER = Format(write_folder, read_folder, _needs("timm"), _load_folder)
FORMATS = {
    "safetensors": Format(_write_safetensors, _read_safetensors, _needs("timm and safetensors"), _load_safetensors),
    "onnx": Format(_write_onnx, _read_onnx, lambda _: "onnxruntime", lambda _: LOAD_ONNX),
    "torch-export": Format(_write_exported, _read_exported, lambda _: "torch", lambda _: LOAD_EXPORTED),
    "timm": FOLDER,
    "hub": FOLDER,
}
