"""The MAR family."""

from .autoencoder import MARAutoencoder
from .transformer import MARTransformer

__all__ = ["MARAutoencoder", "MARTransformer"]
