"""The models whose throughput the paper compares, in the forms that may be their fastest, and the paper's numbers."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

from recipes.riformer import gfnet, model

PAPER = {
    "riformer_s12": 4899.80, "riformer_s24": 2530.48, "riformer_s36": 1699.94, "riformer_m36": 1185.33,
    "riformer_m48": 897.05, "poolformer_s12": 4160.18, "poolformer_s24": 2140.20, "poolformer_s36": 1440.37,
    "poolformer_m36": 1009.45, "poolformer_m48": 761.93, "gfnet_h_ti": 1979.56, "gfnet_h_s": 1434.19,
    "gfnet_h_b": 939.20,
}  # fmt: skip
"""Images per second at 224 px, batch 2048, one A100 (RIFormer, CVPR 2023, Tab. 6; precision not stated)."""
GOALS = {
    (f"riformer_{size}", rival): goal
    for size in ("m36", "s12")
    for rival, goal in ((f"poolformer_{size}", 1.5), ("gfnet_h_b", 2.0))
}
"""How many times as fast as its rivals a fused RIFormer is to be on one device, each model at its best setting."""
FORMS = {
    "riformer": ("full", "kernels", "norm", "train"),
    "poolformer": ("timm", "kdlib"),
    "gfnet": ("real", "complex"),
}
"""Ways to run the same function, by family: RIFormer fused fully, that by kernels, as in the paper, or not at all;
PoolFormer as timm has it, or as our MetaFormer; GFNet's filter in real arithmetic, or in complex arithmetic outside of
compiled graphs."""
USUAL = {"riformer": ("full", "kernels"), "poolformer": ("timm", "kdlib"), "gfnet": ("real", "complex")}
"""The forms that are tried where none is asked for."""
TOKENS = ("full", "real", "complex")
"""Forms whose blocks work on channels-last tokens whatever the layout of the image."""


class ComplexFilter(nn.Module):
    """`gfnet.GlobalFilter` as its authors run it: a product of complex numbers, transforms over the inner dimensions.

    In a compiled model it stays out of the graph, since Inductor has no complex kernels: two breaks a block.
    """

    weight: Tensor

    def __init__(self, given: gfnet.GlobalFilter) -> None:
        super().__init__()
        self.grid = given.grid
        wide = given.complex_weight.detach().to(torch.promote_types(given.complex_weight.dtype, torch.float32))
        self.register_buffer("weight", torch.view_as_complex(wide.contiguous()))

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(self.weight.real.dtype).unflatten(1, self.grid)
        spectrum = torch.fft.rfft2(wide, dim=(1, 2), norm="ortho") * self.weight
        return torch.fft.irfft2(spectrum, s=self.grid, dim=(1, 2), norm="ortho").flatten(1, 2).to(x.dtype)


def family(name: str) -> str:
    return name.partition("_")[0]


def parse(text: str) -> tuple[str, tuple[str, ...]]:
    """The name and the forms that ``NAME`` or ``NAME:FORM`` asks for.

    Raises:
        ValueError: timm knows no such model, or it has no such form.
    """
    name, _, form = text.partition(":")
    if not timm.is_model(name):
        raise ValueError(f"--models {text}: timm knows no model {name!r}")
    forms = FORMS.get(family(name), ("plain",))
    if form and form not in forms:
        raise ValueError(f"--models {text}: {name} has the forms {', '.join(forms)}")
    return name, (form,) if form else USUAL.get(family(name), forms)


def build(name: str, form: str, pixels: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """One model in one form, in eval mode, random weights.

    Raises:
        ValueError: PoolFormer of a size that our MetaFormer does not have.
    """
    torch.manual_seed(0)
    if form == "kdlib":
        name = name.replace("poolformer_", "metaformer_pool_")
        if not timm.is_model(name):
            raise ValueError(f"there is no {name}")
    sized: dict[str, Any] = {"img_size": pixels} if family(name) == "gfnet" else {}  # the others take any size
    net = timm.create_model(name, **sized).eval()
    if form == "kernels":
        from recipes.riformer.fast import with_kernels  # needs Triton

        net = with_kernels(net)
    elif family(name) == "riformer" and form != "train":
        net = model.fuse(net, form)
    net = net.to(device, dtype)
    if form == "complex":  # last, since a change of dtype would drop the imaginary part
        for block in [each for each in net.modules() if isinstance(each, gfnet.Block)]:
            block.add_module("filter", ComplexFilter(block.filter))
    return net


def rivals(name: str) -> list[str]:
    """The models that a RIFormer is held against: PoolFormer of its size, and the paper's logit teacher."""
    head, _, size = name.rpartition("_")
    if head != "riformer":
        return []
    small = [f"metaformer_pool_{size}", f"gfnet_h_{size}"]  # the sizes that only this recipe has
    return small if size in ("nano", "micro") else [f"poolformer_{size}", "gfnet_h_b"]
