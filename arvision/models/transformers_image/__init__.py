"""Image models of transformers as token models."""

from .chameleon import Chameleon
from .chameleon_pixels import ChameleonDecoder
from .emu3 import Emu3
from .glm_image import GlmImage
from .janus import Janus
from .layout import Layout
from .model import TransformersImageModel
from .state import ImageState, Row

__all__ = [
    "Chameleon",
    "ChameleonDecoder",
    "Emu3",
    "GlmImage",
    "ImageState",
    "Janus",
    "Layout",
    "Row",
    "TransformersImageModel",
]
