"""Evaluation that people can trust: images, or a callable that makes them, in; scores out."""

from . import extractors
from .classifier import FashionClassifier, class_consistency, classify, load_classifier
from .clip_score import CLIPScore, clip_score
from .evaluate import evaluate, load_reference
from .features import EXTRACTORS, Extractor, ExtractorFacts, get_extractor, list_extractors
from .frechet import (
    frechet_between,
    frechet_distance,
    frechet_from_features,
    frechet_infinity,
    frechet_jackknife,
)
from .generate import GenerateConfig, Made, generate
from .metrics import (
    ClassConsistency,
    FrechetDistance,
    InceptionScore,
    KernelDistance,
    PrecisionRecall,
)
from .moments import GroupedMoments, Moments, merge_all
from .pixels import to_uint8
from .score import Score
from .scores import bootstrap_mean, inception_score, kernel_distance, precision_recall
from .sources import open_source

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
