"""From the name of a data set to two loaders, one to train on and one to test on."""

from .arguments import CROP_PCT, INTERPOLATION
from .augment import Augment
from .by_name import IMAGENET_MEAN, IMAGENET_STD, Data, load
from .indexing import write_info
from .loader import Loader, with_targets

__all__ = [
    "CROP_PCT", "IMAGENET_MEAN", "IMAGENET_STD", "INTERPOLATION", "Augment", "Data", "Loader", "load", "with_targets",
    "write_info",
]  # fmt: skip
