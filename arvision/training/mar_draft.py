"""How a draft for `cspd` is made: a smaller MAR fitted to the head outputs of its target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..decoding.latents.schedule import Schedule
from ..errors import InputError
from ..models.mar.model import MAR
from ..models.mar.transformer import MARTransformer
from .loop import Chance, FitConfig, Objective
from .mar import MARObjective, encode_moments, initialise
from .stages import Recipe, Stage, Work


class MARDraftObjective(Objective):
    """Distance of a draft's noise estimates and variances from its target's.

    Draft and target see the same latents, masks, classes and noisy inputs, at the steps that
    sampling uses. Chains with shared noise stay close if their means do.

    Args:
        draft: the model to train.
        target: the model to follow, frozen.
        data: latents and masks; its transformer is not used.
        draws: (step, noise) pairs per masked latent.
    """

    def __init__(
        self, draft: MARTransformer, target: MARTransformer, data: MARObjective, draws: int = 3
    ) -> None:
        super().__init__()
        self.draft, self.num_items, self.draws = draft, data.num_items, draws
        self.beside = (target.eval().requires_grad_(False),)
        self._data = (data,)  # in a tuple: its transformer is no part of what is trained
        config = target.config
        self.schedule = Schedule(config["num_sampling_steps"], noisiest=config["noisiest"])

    def inputs(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """As `MARObjective`'s."""
        return self._data[0].inputs(indices, generator)

    def loss(self, inputs: dict[str, Tensor], chance: Chance) -> dict[str, Tensor]:
        """Mean loss of the masked latents."""
        latents, known = inputs["latents"], inputs["known"]
        start = latents[~known].repeat(self.draws, 1)
        steps = chance.randint(self.schedule.num_steps, len(start))
        x = self.schedule.add_noise(start, chance.randn(*start.shape), steps)
        told = self.schedule.timesteps.to(steps.device)[steps]
        outputs = []
        models: tuple[Any, ...] = (*self.beside, self.draft)
        for model in models:
            with torch.set_grad_enabled(model is self.draft):
                condition = model.embed_classes(inputs["labels"], inputs["dropped"])
                z = model(latents, known, condition)[~known].repeat(self.draws, 1)
                outputs.append(model.diffloss.net(x, told, z).float())
        (goal, goal_share), (noise, share) = (out.chunk(2, dim=-1) for out in outputs)
        error = F.mse_loss(noise, goal)
        return {"loss": error + 0.1 * F.mse_loss(share, goal_share), "error": error.detach()}


@dataclass(frozen=True, kw_only=True)
class MARDraftStage(Stage[Work]):
    """A draft for a MAR target, on the images that the target was trained on.

    Attributes:
        sizes: arguments of `MARTransformer` that differ from the target's.
    """

    name: str = "transformer"
    fit: FitConfig = FitConfig(
        steps=1500,
        batch_size=32,
        learning_rate=2e-3,
        weight_decay=0.01,
        clip_norm=3.0,
        mixed_precision="bf16",
        log_every=50,
        average_decay=0.995,
    )
    sizes: Mapping[str, Any] = field(
        default_factory=lambda: {
            "hidden_size": 128,
            "encoder_depth": 1,
            "decoder_depth": 2,
            "head_width": 128,
            "head_depth": 1,
        }
    )

    def objective(self, work: Work) -> MARDraftObjective:
        """Noise estimates like the target's.

        Raises:
            InputError: a target without an autoencoder.
        """
        target: MAR = work.target
        if target.tokenizer is None:
            raise InputError("the target has no autoencoder: expected one to encode the images")
        scale = target.tokenizer.config["scaling_factor"]
        given = {k: v for k, v in target.transformer.config.items() if not k.startswith("_")}
        draft = MARTransformer(**given | dict(self.sizes))
        initialise(draft)
        mean, deviation = (scale * part for part in encode_moments(target.tokenizer, work.images))
        data = MARObjective(target.transformer, mean, deviation, work.labels)
        return MARDraftObjective(draft, target.transformer, data)

    def finish(self, work: Work, objective: MARDraftObjective) -> None:
        """The draft."""
        work.parts["transformer"] = objective.draft


MAR_DRAFT_RECIPES: dict[str, Recipe] = {
    "mar-fashion-draft": Recipe(
        target="mar-fashion",
        card={
            "kind": "continuous",
            "conditions": "class",
            "summary": "Small MAR that drafts latents for mar-fashion",
            "draft_for": "mar-fashion",
        },
        stages=[MARDraftStage()],
    )
}
