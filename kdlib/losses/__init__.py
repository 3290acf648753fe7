"""The catalogue of losses: ``LOSSES`` maps the names that a recipe may use to classes."""

from __future__ import annotations

import re
from typing import TypeVar

from torch import nn

from .attention import AttentionTransfer
from .base import Loss, Sum, View
from .contrastive import InfoNCE
from .correlation import DIST, BatchCorrelation, ClassCorrelation
from .decoupled import DKD, NKD
from .embeddings import CCKD, PKT, CorrelationCongruence
from .enhanced import OFA
from .features import ChannelMean, CosineDistance, FeatureMSE
from .heads import SRRL, SimKD
from .learned import Learned
from .levels import FSP, HierarchicalContext
from .logits import CrossEntropy, HardLabel, SoftTarget
from .maps import NST, PKD, ChannelWise
from .matching import TTM, WTTM, Binary
from .memory import CRD
from .orthogonal import VkD
from .overhaul import OFD
from .projected import MGD, VID
from .relations import GramRelation
from .review import ReviewKD
from .rkd import RKDAngle, RKDDistance
from .similarity import ICKD, SimilarityPreserving
from .temperature import LearnableTemperature
from .wrappers import Standardized, TopK

__all__ = [
    "CCKD",
    "CRD",
    "DIST",
    "DKD",
    "FSP",
    "ICKD",
    "LOSSES",
    "MGD",
    "NKD",
    "NST",
    "OFA",
    "OFD",
    "PKD",
    "PKT",
    "SRRL",
    "TTM",
    "VID",
    "WTTM",
    "AttentionTransfer",
    "BatchCorrelation",
    "Binary",
    "ChannelMean",
    "ChannelWise",
    "ClassCorrelation",
    "CorrelationCongruence",
    "CosineDistance",
    "CrossEntropy",
    "FeatureMSE",
    "GramRelation",
    "HardLabel",
    "HierarchicalContext",
    "InfoNCE",
    "LearnableTemperature",
    "Learned",
    "Loss",
    "RKDAngle",
    "RKDDistance",
    "ReviewKD",
    "SimKD",
    "SimilarityPreserving",
    "SoftTarget",
    "Standardized",
    "Sum",
    "TopK",
    "View",
    "VkD",
    "register",
]

AnyLoss = TypeVar("AnyLoss", bound=type[nn.Module])

LOSSES: dict[str, type[nn.Module]] = {}


def register(loss: AnyLoss, name: str | None = None) -> AnyLoss:
    """Lets recipes name a loss; the name is the class's in snake_case (``FeatureMSE`` is ``feature_mse``).

    Returns the class, so that it also serves as a decorator.

    Raises:
        ValueError: it is no class of modules, or another class has that name already.
    """
    if not (isinstance(loss, type) and issubclass(loss, nn.Module)):
        raise ValueError(f"a class that derives from torch.nn.Module is registered, got {loss!r}")
    name = name or re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", loss.__name__).lower()
    if LOSSES.setdefault(name, loss) is not loss:
        raise ValueError(f"the name {name!r} belongs to {LOSSES[name].__qualname__}; register with name=...")
    return loss


for _loss in (
    # between logits
    *(SoftTarget, HardLabel, CrossEntropy, DKD, NKD, DIST, TTM, WTTM, OFA, ClassCorrelation, BatchCorrelation, Binary),
    *(Standardized, LearnableTemperature, TopK),
    # between features
    *(FeatureMSE, CosineDistance, AttentionTransfer, ChannelWise, ChannelMean, PKD, NST),
    *(FSP, HierarchicalContext, ReviewKD, MGD, VID, OFD, SimKD, SRRL, VkD),
    # between relations
    *(GramRelation, ICKD, SimilarityPreserving, RKDDistance, RKDAngle, PKT, CorrelationCongruence, CCKD, InfoNCE, CRD),
):
    register(_loss)
