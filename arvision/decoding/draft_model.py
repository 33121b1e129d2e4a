"""Drafts from a smaller model, and how many of them: chains that stop where a rejection is likely."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..contracts import Conditions, TokenModel
from ..errors import InputError, unknown_name
from .draft_state import FollowingState
from .given import Given
from .logits import Shaping
from .noise import Noise, draw
from .tree import TokenTree, none_left
from .verify import OLD_COUPLINGS, Round, Verdict

MEASURED = ("gumbel", "independent")
"""Couplings that a calibration is fitted for. Where drafts are new in every round, "maximal" and
"independent" are chain speculative sampling: what they put behind the final tokens is not used."""

FEATURES = ("bias", "log_q", "entropy", "gap")
LARGEST_GAP = 10.0


def confidence_features(logq: Tensor, scores: Tensor, drafts: Tensor) -> Tensor:
    """What tells whether a draft will be accepted, [..., 4] in the order of `FEATURES`.

    Args:
        logq: [..., V], the laws that drafts are drawn from.
        scores: [..., V], `logq` plus Gumbel noise where the coupling is "gumbel", else `logq`.
        drafts: [...] int64.
    """
    entropy = -(logq.exp() * logq).nan_to_num(nan=0.0).sum(-1)
    two = scores.topk(2, dim=-1).values
    gap = (two[..., 0] - two[..., 1]).clamp(max=LARGEST_GAP)
    log_q = logq.gather(-1, drafts[..., None])[..., 0]
    return torch.stack([torch.ones_like(gap), log_q, entropy, gap], dim=-1)


class StillLikely:
    """Which rows draft on: those of which no draft so far is likely to be rejected.

    A row stops when the predicted probability that at least one of its drafts is rejected exceeds
    a threshold. What is seen of a draft decides about later ones only, so a rule's proof holds.

    Args:
        num_rows: B.
        threshold: see above; 1 never stops.
        like: a tensor of the device and dtype that predictions have.

    Attributes:
        going: [B] bool.

    Paper: Huang, Guo and Wang, "SpecDec++: Boosting Speculative Decoding via Adaptive Candidate
    Lengths", 2024, section 3.
    """

    def __init__(self, num_rows: int, threshold: float, like: Tensor) -> None:
        self._least = 1.0 - threshold
        self._all_accepted = like.new_ones(num_rows)
        self.going = torch.ones_like(self._all_accepted, dtype=torch.bool)

    def see(self, probability: Tensor) -> None:
        """The latest draft of each row will be accepted with probability [B]."""
        self._all_accepted = self._all_accepted * probability
        self.going = self.going & (self._all_accepted >= self._least)


@dataclass(frozen=True)
class Calibration:
    """Predicts the probability that a draft is accepted: a logistic function of its confidence.

    Attributes:
        weights: by coupling, see `MEASURED`; one weight per name in `FEATURES`.

    Raises:
        InputError: another coupling or number of weights.
    """

    weights: Mapping[str, Sequence[float]]

    def __post_init__(self) -> None:
        # Published drafts of earlier releases hold the old word.
        known = {OLD_COUPLINGS.get(name, name): row for name, row in self.weights.items()}
        object.__setattr__(self, "weights", known)
        for coupling, weights in known.items():
            if coupling not in MEASURED:
                raise unknown_name("coupling of a calibration", coupling, MEASURED)
            if len(weights) != len(FEATURES):
                raise InputError(
                    f"calibration of {coupling!r} has {len(weights)} weights: expected "
                    f"{len(FEATURES)}, for {', '.join(FEATURES)}"
                )

    def weights_of(self, coupling: str, like: Tensor) -> Tensor:
        """The weights [4] of a coupling, of the device and dtype of `like`."""
        weights = self.weights["gumbel" if coupling == "gumbel" else "independent"]
        return torch.as_tensor(weights, dtype=like.dtype).to(like.device)


UNCALIBRATED = Calibration(dict.fromkeys(MEASURED, (1.0, 0.0, 0.0, 0.0)))
"""For drafts that bring none: every draft is thought to be accepted with probability 0.73."""


def check_draft(draft: TokenModel, target: TokenModel) -> None:
    """Refuse a draft that does not speak the target's tokens.

    Raises:
        InputError: another vocabulary, grid or number of tokens.
    """
    for name, what in (
        ("vocab_size", "a vocabulary of {} tokens"),
        ("grid", "the grid {}"),
        ("num_tokens", "images of {} tokens"),
    ):
        theirs, ours = getattr(draft, name), getattr(target, name)
        if theirs != ours:
            raise InputError(
                f"the draft model has {what.format(theirs)}: expected {what.format(ours)}, as the "
                "target has"
            )


@dataclass
class DraftFigures:
    """Counts over a run: drafts verified and accepted, calls of the draft model (its prefill not
    counted)."""

    drafted: int = 0
    accepted: int = 0
    passes: int = 0

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafts that were accepted."""
        return self.accepted / max(1, self.drafted)


class DraftModelDrafter:
    """A chain drawn from a draft model, each row as long as its drafts look acceptable.

    The draft's state follows the target's, and k drafts cost k calls; see `FollowingState`.

    A row stops where a rejection is likely, see `StillLikely`. The batch goes on until its last row
    has stopped. With Gumbel coupling a row that has stopped drafts on as long as others do, which
    costs nothing and cannot change its picture. An accelerator is not asked whether all have
    stopped: there a batch drafts as far as its host allows, see `_reach`, and with other couplings
    to the end. Otherwise its chain is padded with -1, "no draft", so that what it drafts, and with
    it its picture, does not depend on the rows beside it.

    Whether a position is drafted at all is decided before anything is drawn there, from what stands
    at earlier positions: a row may look at its last draft and then stop, as that draft is verified
    all the same.

    In passes of fixed shapes a batch always drafts to the end, and the drafts of rows that have
    stopped are left out, or under Gumbel coupling kept.

    Args:
        draft: the draft model.
        conditions: one per image.
        guidance_scale: of the draft.
        shape: guided logits to log-probabilities, the target's.
        coupling: see `arvision.decoding.verify.COUPLINGS`.
        calibration: confidence to acceptance.
        stop_threshold: see `StillLikely`; 1 never stops early.

    Paper: that of `StillLikely` (there a trained head predicts the acceptance, as for text in
    `arvision.text.drafters.papers.acceptance`).
    """

    def __init__(
        self,
        draft: TokenModel,
        conditions: Conditions,
        guidance_scale: float,
        shape: Shaping,
        *,
        coupling: str = "gumbel",
        calibration: Calibration = UNCALIBRATED,
        stop_threshold: float = 0.7,
    ) -> None:
        self._draft, self._conditions, self._scale = draft, conditions, guidance_scale
        self._shape, self._coupling, self._calibration = shape, coupling, calibration
        self._threshold = stop_threshold
        self._accepted = self._passes = 0
        self._drafted: Tensor | int = 0

    unread = ("_draft", "_conditions", "_known", "_reach", "_drafted", "_accepted", "_passes")
    renewed = ("_counted",)

    @property
    def figures(self) -> DraftFigures:
        """Counts since the drafter was made."""
        own = (int(self._drafted), self._accepted, self._passes)
        fixed = (0, 0, 0) if self._counted is None else self._counted.tolist()
        return DraftFigures(*(a + b for a, b in zip(own, fixed, strict=True)))

    def start(self, noise: Noise, vocab_size: int, num_tokens: int) -> None:
        """Prefill the draft's state."""
        self._passes_before = self._passes
        self._known = [0] * len(self._conditions)
        self._reach = 2
        self._noise, self._num_tokens = noise, num_tokens
        self._given: Given | None = None
        self._counted: Tensor | None = None
        self._weights: Tensor | None = None
        self._state: Any = FollowingState(
            self._draft, self._conditions, self._scale, self._shape, num_tokens
        )

    @property
    def why_not_fixed(self) -> str | None:
        """Why the draft does not draft in passes of fixed shapes."""
        return self._state.why_not_fixed

    @property
    def has_fixed_shapes(self) -> bool:
        """See `arvision.decoding.drafter.FixedDrafter`."""
        return self.why_not_fixed is None

    def fix(self, num: int) -> None:
        """Passes of `num` candidates of fixed shapes follow, see `arvision.decoding.drafter.Carries`."""
        self._state = self._state.fixed(num)
        if self._counted is None:
            self._counted = torch.zeros(3, dtype=torch.int64, device=self._noise.device)

    def carry(self) -> list[Tensor]:
        """Drafts, accepted ones and calls so far; see `figures`."""
        return [] if self._counted is None else [self._counted]

    def restore(self, carried: list[Tensor]) -> None:
        """Go on from what a pass left."""
        (self._counted,) = carried

    def keep(self, given: Given) -> None:
        """Draft behind given tokens, see `arvision.decoding.given.KeepsGiven`."""
        self._given = given

    def propose(self, tokens: Tensor, lengths: Tensor, num: int, round_number: int) -> TokenTree:
        """Chains [B, k] with k <= num, padded with -1, and their laws [B, k, V].

        See `arvision.decoding.loop.Drafter`.
        """
        room = self._num_tokens - 1 - lengths
        is_fixed, is_gumbel = self._counted is not None, self._coupling == "gumbel"
        most_room = num if is_fixed else self._num_tokens - 1 - min(self._known)
        if num == 0 or most_room <= 0:
            return TokenTree(tokens[:, :0], self._no_laws(tokens))
        root = tokens.gather(1, lengths[:, None] - 1)
        law = self._state.follow(tokens, lengths, self._known)
        num = self._most(min(num, most_room), tokens.is_cpu)
        # Where no row stops early, all go on to the end of the longest.
        stops = self._threshold < 1 and not (is_fixed and is_gumbel)
        drafts, laws, is_going = root[:, :0], [], room > 0
        likely = StillLikely(len(root), self._threshold, law)
        while True:
            place = drafts.shape[1]
            if self._given is not None:
                law = self._given.pin(law[:, None], (lengths + place)[:, None])[:, 0]
            token, scores = self._pick(law, lengths + place, round_number, stops)
            is_draft = place < room if is_gumbel else is_going
            drafts = torch.cat([drafts, token.where(is_draft, -1)[:, None]], dim=1)
            laws.append(law)
            if stops:
                likely.see(self._acceptance(law, scores, token))
            is_going = is_going & likely.going & (place + 1 < room)
            if place + 1 == num or (stops and not is_fixed and none_left(is_going)):
                break
            law = self._state.extend(torch.cat([root, drafts.clamp(min=0)], dim=1))[:, -1]
        if self._counted is not None:
            self._counted[2].add_(num)
        return TokenTree(drafts, None if is_gumbel else torch.stack(laws, dim=1))

    def _most(self, num: int, is_cpu: bool) -> int:
        """How many of `num` drafts there are at most in this round."""
        if self._counted is not None:
            return num
        if self._coupling == "gumbel" and self._threshold < 1 and not is_cpu:
            num = min(num, self._reach)
        return min(num, self._state.most())

    def _acceptance(self, law: Tensor, scores: Tensor, token: Tensor) -> Tensor:
        """Probability [B] that a draft will be accepted."""
        features = confidence_features(law, scores, token)
        if self._weights is None:
            self._weights = self._calibration.weights_of(self._coupling, features)
        return (features @ self._weights).sigmoid()

    def _no_laws(self, tokens: Tensor) -> Tensor | None:
        if self._coupling == "gumbel":
            return None
        return torch.zeros(len(tokens), 0, self._draft.vocab_size, device=tokens.device)

    def _pick(
        self, law: Tensor, positions: Tensor, round_number: int, scored: bool
    ) -> tuple[Tensor, Tensor]:
        """A draft [B] from `law` [B, V], and the scores [B, V] that it is the argmax of or not.

        Where these are not wanted it is the law.
        """
        where = positions.clamp(max=self._num_tokens - 1)[:, None]
        if self._coupling == "gumbel":
            if not scored:
                return self._noise.best(law[:, None], where)[:, 0], law
            scores = law + self._noise.gumbel(where, law.shape[-1], law.dtype)[:, 0]
            return scores.argmax(-1), scores
        uniforms = self._noise.uniform(where, "draft", round_number)[:, 0]
        return draw(law.exp(), uniforms), law

    def observe(self, chain: Round, verdict: Verdict) -> None:
        """Count what was accepted."""
        if self._counted is not None:
            accepted = (verdict.counts - 1).clamp(min=0)  # finished rows have no token
            self._counted[:2].add_(torch.stack([(chain.drafts >= 0).sum(), accepted.sum()]))
            return
        counts = verdict.counts.tolist() if verdict.given is None else verdict.given
        self._known = [known + count for known, count in zip(self._known, counts, strict=True)]
        if verdict.known is not None:
            self._known = [a + b for a, b in zip(self._known, verdict.known, strict=True)]
        self._passes = self._passes_before + self._state.passes
        self._drafted = self._drafted + (chain.drafts >= 0).sum()
        self._accepted += sum(counts) - len(counts)
        # What is drafted changes no picture under Gumbel coupling, so that a guess is good enough.
        num = chain.drafts.shape[1]
        if num:
            most = max(counts) - 1
            self._reach = 2 * num if most == num else most + 1

    def select(self, rows: Tensor) -> None:
        """Keep batch rows `rows`."""
        self._known = [self._known[row] for row in rows.tolist()]
        self._noise = self._noise.select(rows)
        self._given = None if self._given is None else self._given.select(rows.tolist())
        self._state.select(rows)
