"""Samplers: loops around a model that know its contract and never its network."""

from .ar import ARSampler
from .base import SAMPLERS, BaseSampler, TokenSampler, get_sampler, register
from .code import CoDeSampler
from .csjd import CSJDSampler
from .cspd import CSpDSampler
from .dd import DDSampler
from .draft import DraftSampler
from .gsd import GSDSampler
from .lantern import LanternSampler
from .pjd import PJDSampler
from .sjd import SJDSampler
from .zipar import ZipARSampler

__all__ = [
    "SAMPLERS",
    "ARSampler",
    "BaseSampler",
    "CoDeSampler",
    "CSJDSampler",
    "CSpDSampler",
    "DDSampler",
    "DraftSampler",
    "GSDSampler",
    "LanternSampler",
    "PJDSampler",
    "SJDSampler",
    "TokenSampler",
    "ZipARSampler",
    "get_sampler",
    "register",
]
