"""What proposes text: one class per file and idea, all behind `arvision.decoding.loop.Drafter`."""

from .base import DRAFTERS, Combined, TextDrafter, combine
from .draft_tree import DraftTree
from .head_drafter import HeadDrafter
from .lookup import InputCopy, PromptLookup
from .pseudo import PseudoDrafter
from .recycling import TokenRecycling
from .self_draft import LayerSkip, NestedExit, RetrievedContext
from .superposed import Superposed
from .trigram import JacobiWindow, TrigramDrafter

__all__ = [
    "DRAFTERS",
    "Combined",
    "DraftTree",
    "HeadDrafter",
    "InputCopy",
    "JacobiWindow",
    "LayerSkip",
    "NestedExit",
    "PromptLookup",
    "PseudoDrafter",
    "RetrievedContext",
    "Superposed",
    "TextDrafter",
    "TokenRecycling",
    "TrigramDrafter",
    "combine",
]
