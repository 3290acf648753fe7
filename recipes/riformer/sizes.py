"""The sizes of the papers and our small ones, and what timm is told of every model of this folder."""

from typing import Any, NamedTuple


class Size(NamedTuple):
    """One row of the papers' tables of sizes, or of our small models."""

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    layer_scale_init: float
    image_size: int = 224
    crop_pct: float = 0.9

    def like(self, other: "Size") -> "Size":
        """This size with the depths of `other`, and its widths in the proportion of this one to S12."""
        return self._replace(depths=other.depths, dims=tuple(dim * self.dims[0] // 64 for dim in other.dims))


SIZES = {
    "s12": Size((2, 2, 6, 2), (64, 128, 320, 512), 1e-5),
    "s24": Size((4, 4, 12, 4), (64, 128, 320, 512), 1e-5),
    "s36": Size((6, 6, 18, 6), (64, 128, 320, 512), 1e-6),
    "m36": Size((6, 6, 18, 6), (96, 192, 384, 768), 1e-6, crop_pct=0.95),
    "m48": Size((8, 8, 24, 8), (96, 192, 384, 768), 1e-6, crop_pct=0.95),
    "nano": Size((2, 2), (48, 96), 0.1, image_size=28, crop_pct=1.0),
    "micro": Size((2, 2, 6, 2), (32, 64, 160, 256), 1e-5, image_size=64, crop_pct=1.0),
}
VARIANTS = ("s12", "s24", "s36", "m36", "m48")
"""The papers' sizes: what `variant` of `riformer`, `riformer_micro` and their relatives may be."""


def model_cfg(size: Size, **more: Any) -> dict[str, Any]:
    """timm's `pretrained_cfg` of a size: how images are prepared and which layers are first and last. No weights."""
    return {
        "input_size": (3, size.image_size, size.image_size),
        "interpolation": "bicubic",
        "crop_pct": size.crop_pct,
        "first_conv": "stem.conv",
        "classifier": "head",
    } | more


def refuse_pretrained(name: str, pretrained: bool) -> None:
    """Raise the ValueError that says how to get weights, if `pretrained`: nothing is ever downloaded from here."""
    if pretrained:
        raise ValueError(
            f"{name}: no weights are published for automatic download; build it with pretrained=False and load a file: "
            "model.load_state_dict(recipes.riformer.convert.convert('path/to/checkpoint'))"
        )
