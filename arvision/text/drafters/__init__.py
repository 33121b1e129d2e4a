"""What proposes text: one class per file and idea, all behind `arvision.decoding.loop.Drafter`."""

from .base import DRAFTERS, Combined, TextDrafter, combine
from .draft_tree import DraftTree
from .head_drafter import HeadDrafter
from .lookup import InputCopy, PromptLookup
from .papers.pseudo import PseudoDrafter
from .papers.self_draft import LayerSkip, NestedExit, RetrievedContext
from .papers.superposed import Superposed
from .papers.trigram import JacobiWindow, TrigramDrafter
from .recycling import TokenRecycling

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
