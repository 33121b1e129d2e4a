"""Evaluation that people can trust: images, or a callable that makes them, in; scores out."""

from typing import TYPE_CHECKING

from ..lazy import on_demand
from . import extractors
from .classifier import FashionClassifier, class_consistency, classify, load_classifier
from .evaluate import evaluate
from .features import EXTRACTORS, Extractor, ExtractorFacts, get_extractor, list_extractors
from .frechet import (
    frechet_between,
    frechet_distance,
    frechet_from_features,
    frechet_infinity,
    frechet_jackknife,
)
from .generate import GenerateConfig, Made, generate
from .moments import GroupedMoments, Moments, merge_all
from .pixels import to_uint8
from .reference import load_reference
from .score import Score
from .scores import bootstrap_mean, inception_score, kernel_distance, precision_recall
from .sources import open_source

if TYPE_CHECKING:  # classes of torchmetrics, which not everybody has
    from .clip import CLIPScore, clip_score
    from .metrics import (
        ClassConsistency,
        FrechetDistance,
        InceptionScore,
        KernelDistance,
        PrecisionRecall,
    )

__getattr__, __dir__ = on_demand(__name__)

__all__ = [
    "EXTRACTORS",
    "CLIPScore",
    "ClassConsistency",
    "Extractor",
    "ExtractorFacts",
    "FashionClassifier",
    "FrechetDistance",
    "GenerateConfig",
    "GroupedMoments",
    "InceptionScore",
    "KernelDistance",
    "Made",
    "Moments",
    "PrecisionRecall",
    "Score",
    "bootstrap_mean",
    "class_consistency",
    "classify",
    "clip_score",
    "evaluate",
    "extractors",
    "frechet_between",
    "frechet_distance",
    "frechet_from_features",
    "frechet_infinity",
    "frechet_jackknife",
    "generate",
    "get_extractor",
    "inception_score",
    "kernel_distance",
    "list_extractors",
    "load_classifier",
    "load_reference",
    "merge_all",
    "open_source",
    "precision_recall",
    "to_uint8",
]
