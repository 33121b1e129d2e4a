"""What proposes text: one class per file and idea, all behind `arvision.decoding.loop.Drafter`."""

from .base import DRAFTERS, Combined, TextDrafter, combine
from .draft_tree import DraftTree
from .lookup import InputCopy, PromptLookup
from .recycling import TokenRecycling

__all__ = [
    "DRAFTERS",
    "Combined",
    "DraftTree",
    "InputCopy",
    "PromptLookup",
    "TextDrafter",
    "TokenRecycling",
    "combine",
]
