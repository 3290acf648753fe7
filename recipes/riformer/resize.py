"""Weights of a GFNetH for images of another size."""

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

from recipes.riformer.gfnet import GFNetH, cut, pair


def resize_state_dict(
    state_dict: Mapping[str, Tensor], model: GFNetH, image_size: int | Sequence[int]
) -> dict[str, Tensor]:
    """Bring the weights of a GFNetH for `image_size` to the size of `model`, by bicubic interpolation.

    The position embedding is interpolated over its grid (align_corners=False), each filter over its frequencies, real
    and imaginary part alone (align_corners=True), as GFNet's authors do for fine-tuning at a larger size. What has the
    right size is passed on untouched.

    Args:
        state_dict: in our names, e.g. from `convert`.
        model: the model to load it into.
        image_size: the size in pixels that the weights were trained for, side or (H, W).

    Raises:
        ValueError: if the weights do not belong to `image_size`.
    """
    height, width = cut(pair(image_size), 4, model.overlap)
    if state_dict["pos_embed"].shape[1] != height * width:
        raise ValueError(
            f"pos_embed has {state_dict['pos_embed'].shape[1]} positions, but image_size {pair(image_size)} makes "
            f"{height * width}; give the image size that these weights were trained for"
        )
    wanted = model.state_dict()
    resized = dict(state_dict)
    for name, value in state_dict.items():
        if name not in wanted or value.shape == wanted[name].shape:
            continue
        if name == "pos_embed":
            image = value.transpose(1, 2).unflatten(2, (height, width))
            grid = cut(model.image_size, 4, model.overlap)
            image = F.interpolate(image.float(), grid, mode="bicubic", align_corners=False)
            resized[name] = image.flatten(2).transpose(1, 2).contiguous().to(value.dtype)
        elif name.endswith("complex_weight"):
            image = value.flatten(2).permute(2, 0, 1)[None].float()
            image = F.interpolate(image, wanted[name].shape[:2], mode="bicubic", align_corners=True)
            resized[name] = image[0].permute(1, 2, 0).unflatten(2, value.shape[2:]).contiguous().to(value.dtype)
    return resized
