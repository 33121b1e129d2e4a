"""What proposes text: one class per file and idea, all behind `arvision.decoding.loop.Drafter`."""

from .base import DRAFTERS, Combined, TextDrafter, combine
from .draft_tree import DraftTree
from .eagle3 import Eagle3
from .head_drafter import HeadDrafter
from .lookup import InputCopy, PromptLookup
from .mtp import MTP
from .papers.layer_skip import LayerSkip
from .papers.nested import NestedExit
from .papers.parallel import ParallelDraft
from .papers.pseudo_drafter import PseudoDrafter
from .papers.retrieved import Retrieved, RetrievedContext
from .papers.superposed import Superposed
from .papers.trigram import JacobiWindow, TrigramDrafter
from .recycling import TokenRecycling
from .suffix import PastOutputs, SuffixDecoding

__all__ = [
    "DRAFTERS",
    "MTP",
    "Combined",
    "DraftTree",
    "Eagle3",
    "HeadDrafter",
    "InputCopy",
    "JacobiWindow",
    "LayerSkip",
    "NestedExit",
    "ParallelDraft",
    "PastOutputs",
    "PromptLookup",
    "PseudoDrafter",
    "Retrieved",
    "RetrievedContext",
    "SuffixDecoding",
    "Superposed",
    "TextDrafter",
    "TokenRecycling",
    "TrigramDrafter",
    "combine",
]
