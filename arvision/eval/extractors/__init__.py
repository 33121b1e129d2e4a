"""The registered extractors, one file each."""

from . import clip, dinov2, fashion, inception, lite0, random_conv

__all__ = ["clip", "dinov2", "fashion", "inception", "lite0", "random_conv"]
