"""What proposes text: one class per file and idea, all behind `arvision.decoding.loop.Drafter`."""

from .base import DRAFTERS, Combined, TextDrafter, combine
from .draft_tree import DraftTree
from .lookup import InputCopy, PromptLookup
from .recycling import TokenRecycling
from .self_draft import LayerSkip, NestedExit, RetrievedContext
from .trigram import JacobiWindow, TrigramDrafter

__all__ = [
    "DRAFTERS",
    "Combined",
    "DraftTree",
    "InputCopy",
    "JacobiWindow",
    "LayerSkip",
    "NestedExit",
    "PromptLookup",
    "RetrievedContext",
    "TextDrafter",
    "TokenRecycling",
    "TrigramDrafter",
    "combine",
]
