"""Language models of transformers as token models."""

from .loading import load_text_model
from .model import HFCausalLM, check_network
from .state import HFState

__all__ = ["HFCausalLM", "HFState", "check_network", "load_text_model"]
