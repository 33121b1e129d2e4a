"""The NextStep-1 family."""

from .autoencoder import NextStepAutoencoder
from .model import NextStep
from .transformer import NextStepTransformer

__all__ = ["NextStep", "NextStepAutoencoder", "NextStepTransformer"]
