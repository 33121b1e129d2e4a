"""A model's laws along a given image, as if it had drawn the image itself."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contracts import Conditions, TokenModel


def teacher_forced(
    model: TokenModel, conditions: Conditions, tokens: Tensor, guidance_scale: float = 1.0
) -> Tensor:
    """Guided logits [B, N, V] of each token behind its condition and the tokens before it.

    Args:
        model: a token model.
        conditions: one per image.
        tokens: [B, N] int64; the last one is not looked at.
        guidance_scale: of the model.
    """
    state, first = model.start(conditions, guidance_scale=guidance_scale)
    return torch.cat([first[:, None], state.extend(tokens[:, :-1])], dim=1)
