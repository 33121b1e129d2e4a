"""Evaluation that people can trust: images, or a callable that makes them, in; scores out."""

from .classifier import FashionClassifier, class_consistency, classify, load_classifier
from .frechet import frechet_between, frechet_distance, frechet_from_features, frechet_infinity
from .moments import GroupedMoments, Moments, merge_all
from .pixels import to_uint8
from .score import Score
from .scores import bootstrap_mean, inception_score, kernel_distance, precision_recall

__all__ = [
    "FashionClassifier",
    "GroupedMoments",
    "Moments",
    "Score",
    "bootstrap_mean",
    "class_consistency",
    "classify",
    "frechet_between",
    "frechet_distance",
    "frechet_from_features",
    "frechet_infinity",
    "inception_score",
    "kernel_distance",
    "load_classifier",
    "merge_all",
    "precision_recall",
    "to_uint8",
]
