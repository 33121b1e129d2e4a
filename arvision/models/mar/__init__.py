"""The MAR family."""

from .autoencoder import MARAutoencoder
from .model import MAR
from .transformer import MARTransformer

__all__ = ["MAR", "MARAutoencoder", "MARTransformer"]
