"""A draft that says the next tokens of an encoder-decoder model's answer all at once."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError
from ...files import write_json
from ...training.loop import Chance, FitConfig, Objective, fit
from ..drafters.papers.parallel import PARALLEL_FILE
from ..seq2seq import decoder_start
from .data import Answers, split_answers

NO_LABEL = -100


@dataclass(frozen=True, kw_only=True)
class ParallelTraining:
    """Settings of `train_parallel`.

    Attributes:
        num_places: tokens that the draft learns to say at once.
        share: of the decoder's layers, the first ones, at least one; the encoder stays whole.
        fit: settings of the loop.

    Raises:
        InputError: a number out of range.
    """

    num_places: int = 6
    share: float = 0.34
    fit: FitConfig = FitConfig(steps=400, batch_size=8, learning_rate=1e-3, warmup=20)

    def __post_init__(self) -> None:
        if self.num_places < 1 or not 0 < self.share <= 1:
            raise InputError(
                f"num_places {self.num_places}, share {self.share}: expected at least 1 and a share"
            )


def shallow_copy(network: Any, share: float) -> Any:
    """The network with the first layers of its decoder only (a deep encoder, a shallow decoder)."""
    config = copy.deepcopy(network.config)
    name = next(
        (one for one in ("num_decoder_layers", "decoder_layers") if getattr(config, one, None)),
        None,
    )
    if name is None:
        raise InputError(
            f"{type(network).__name__} does not tell its decoder's layers in its config"
        )
    setattr(config, name, max(1, round(share * getattr(config, name))))
    draft = type(network)(config)
    wanted = draft.state_dict().keys()
    held = {key: value for key, value in network.state_dict().items() if key in wanted}
    draft.load_state_dict(held)
    draft.generation_config = copy.deepcopy(network.generation_config)
    return draft.float()


class ParallelObjective(Objective):
    """Cross entropy of the next tokens, each guessed at a mask token behind the known part of an answer.

    Args:
        draft: what is trained.
        answers: of the target.
        mask_id: the token of unknown places.
        num_places: tokens that are guessed at once.

    Raises:
        InputError: answers that are all empty.
    """

    def __init__(self, draft: Any, answers: Answers, mask_id: int, num_places: int) -> None:
        super().__init__()
        self.draft, self._start = draft, decoder_start(draft)
        self._mask_id, self._num_places = mask_id, num_places
        pairs = zip(answers.texts, answers.starts, strict=True)
        self._pairs = [(text[:start], text[start:]) for text, start in pairs if len(text) > start]
        if not self._pairs:
            raise InputError("the target's answers are empty: expected some tokens to learn from")
        self.num_items = len(self._pairs)

    def inputs(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Prompts [B, L] and which of their places count, answers [B, N + places], where to cut."""
        chosen = [self._pairs[index] for index in indices.tolist()]
        longest = max(len(answer) for _, answer in chosen)

        def pad(rows: list[list[int]], value: int) -> Tensor:
            tensors = [torch.tensor(row) for row in rows]
            return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

        answers = pad([answer for _, answer in chosen], NO_LABEL)
        return {
            "prompts": pad([prompt for prompt, _ in chosen], 0),
            "counts": pad([[1] * len(prompt) for prompt, _ in chosen], 0),
            "answers": nn.functional.pad(answers, (0, self._num_places), value=NO_LABEL),
            "cut": torch.randint(longest, (), generator=generator),
        }

    def logits(self, inputs: dict[str, Tensor], cut: int) -> Tensor:
        """Logits [B, places, V] of what follows the first `cut` tokens of the answers."""
        known = inputs["answers"][:, :cut].clamp(min=0)
        batch = len(known)
        fed = torch.cat(
            [
                known.new_full((batch, 1), self._start),
                known,
                known.new_full((batch, self._num_places - 1), self._mask_id),
            ],
            dim=1,
        )
        out = self.draft(
            input_ids=inputs["prompts"],
            attention_mask=inputs["counts"],
            decoder_input_ids=fed,
            decoder_attention_mask=torch.ones_like(fed),
            use_cache=False,
        )
        return out.logits[:, cut:].float()

    def loss(self, inputs: dict[str, Tensor], chance: Chance) -> dict[str, Tensor]:
        """Mean cross entropy, and how often the first guess is the target's token."""
        cut = int(inputs["cut"])
        labels = inputs["answers"][:, cut : cut + self._num_places]
        logits = self.logits(inputs, cut)
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL
        )
        told = labels[:, 0] >= 0
        right = (logits[:, 0].argmax(-1) == labels[:, 0]) & told
        return {"loss": loss, "agreement": right.sum() / told.sum().clamp(min=1)}

    @torch.no_grad()
    def agreement(self) -> list[float]:
        """For each place, how often its guess is the target's token, over all answers."""
        right = torch.zeros(self._num_places)
        total = torch.zeros(self._num_places)
        for index in range(self.num_items):
            inputs = self.inputs(torch.tensor([index]), torch.Generator())
            inputs = {key: value.to(self.device) for key, value in inputs.items()}
            for cut in range(0, len(self._pairs[index][1]), self._num_places):
                labels = inputs["answers"][:, cut : cut + self._num_places]
                hits = self.logits(inputs, cut).argmax(-1) == labels
                right += hits.sum(0).cpu()
                total += (labels >= 0).sum(0).cpu()
        return [round(float(value), 4) for value in right / total.clamp(min=1)]


def train_parallel(
    network: Any,
    tokenizer: Any,
    answers: Answers,
    out: Path,
    training: ParallelTraining | None = None,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a parallel draft on the target's own answers and save it in `out`; resumes.

    Args:
        network: an encoder-decoder model of transformers.
        tokenizer: saved beside the draft; None for none.
        answers: of the target; a tenth is held out.
        out: takes the checkpoints and the draft.
        training: settings.
        progress: show bars on stderr.

    Returns:
        Figures: "agreement" by place on the answers held out, "parameters", "seconds".

    Raises:
        InputError: bad settings, or too few answers.
    """
    training = training or ParallelTraining()
    torch.manual_seed(training.fit.seed)
    learn, held = split_answers(answers)
    device = network.get_output_embeddings().weight.device
    draft = shallow_copy(network, training.share).to(device)
    # Padding never stands within an answer, so it may stand for what is not known.
    mask_id = getattr(network.config, "pad_token_id", None) or 0
    places = training.num_places
    objective = ParallelObjective(draft, learn, mask_id, places)
    log = fit(objective, training.fit, out / "fit", device=device, progress=progress)
    draft.eval()
    figures = {
        "agreement": ParallelObjective(draft, held, mask_id, places).agreement(),
        "parameters": sum(parameter.numel() for parameter in draft.parameters()),
        "seconds": log[-1]["seconds"],
    }
    draft.to(network.dtype).save_pretrained(out)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    write_json(out / PARALLEL_FILE, {"mask_id": mask_id, "num_places": places, "figures": figures})
    return figures
