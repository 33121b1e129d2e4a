"""Trees drafted by a smaller model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...contracts import Conditions, TakesFixedTrees, TokenModel
from ...decoding.draft_model import StillLikely, confidence_features
from ...decoding.draft_state import FollowingState
from ...decoding.logits import Shaping
from ...decoding.noise import Noise, draw
from ...decoding.tree import (
    TokenTree,
    best_tree,
    none_left,
    topology_of,
)
from ...decoding.tree_levels import Plan, by_level
from ...decoding.verify import Round, Verdict
from ...errors import InputError, unknown_name
from ...files import user_path
from ..model import HFCausalLM, as_text_model
from .base import TextDrafter, register
from .cross import TranslatedState, Translation
from .growing import Grown
from .online import DraftLearner
from .papers.acceptance import AcceptanceHead
from .recycling import RANKS

EXPANSIONS = {
    "chain": "one draft after another",
    "dyspec": "the candidates of the largest estimated acceptance (DySpec, greedy)",
    "dyspec_drawn": "likewise, siblings drawn without replacement (DySpec above temperature 0)",
    "sequoia": "a fixed tree, best for acceptances by rank (Sequoia)",
    "independent": "a fixed number of independent draws per node (SpecInfer, SpecTr)",
    "distinct": "a fixed number of draws without replacement per node (RSD-C)",
    "beam": "stochastic beam search: draws without replacement of whole paths (RSD-S)",
}
DRAWN = {
    "independent": "independent",
    "distinct": "distinct",
    "beam": "distinct",
    "dyspec_drawn": "distinct",
}
FIXED = ("independent", "distinct", "beam")
"""Expansions whose sizes are those of `branching`."""

LANES = 1 << 8
FINER = 4
"""Tokens of a draft with another vocabulary that there is room for, per token of the target."""


def parents_of(branching: Sequence[int]) -> Tensor:
    """Parents of the tree whose nodes at level l have `branching[l]` children."""
    parents, level = [], [-1]
    for width in branching:
        start = len(parents)
        parents += [node for node in level for _ in range(width)]
        level = list(range(start, len(parents)))
    return torch.tensor(parents, dtype=torch.int64)


def in_vocabulary(logits: Tensor, size: int) -> Tensor:
    """Logits [..., V'] of a draft as logits [..., size]: what it does not know cannot be drafted."""
    if logits.shape[-1] >= size:
        return logits[..., :size]
    missing = logits.new_full((*logits.shape[:-1], size - logits.shape[-1]), float("-inf"))
    return torch.cat([logits, missing], dim=-1)


@register("draft_model", summary="a smaller model, of any vocabulary (option draft)")
class DraftTree(TextDrafter):
    """A tree from a draft model, one pass of it per level.

    Where tokens are drawn and drafts are chosen ("chain", "dyspec", "sequoia"), candidates are
    ranked by log q + g with the very noise g of their position, which is what the Gumbel walk asks
    of the target: they meet more often. "dyspec_drawn" is the paper's own tree for these runs: its
    siblings are drawn one after another without replacement, and "without_replacement" judges them.
    At temperature 0 all expansions choose.

    Args:
        draft: a token model of the target's vocabulary, or a model of transformers of any.
        expansion: see `EXPANSIONS`.
        num_draft: candidates per pass ("chain", "dyspec", "dyspec_drawn", "sequoia").
        max_depth: levels, likewise.
        branching: children per node and level ("independent", "distinct"), or the number of paths
            per level ("beam").
        ranks: acceptances by rank ("sequoia").
        context: what the draft reads instead of the prompts; None for the prompts.
        acceptance: a head that tells whether drafts will be accepted, or its folder: chains then end
            where a rejection is likely (SpecDec++), and `num_draft` and `max_depth` bound them.
        stop_threshold: probability of a rejection among a row's drafts beyond which its chain ends.
        tokenizer: the draft's, where it may be another one than the target's: `generate` then makes
            a `translation`, and the two draft and read across vocabularies.
        online: learning rate of updates from the target's own answers as they are served; 0 for
            none. Examples are the places where drafts ended, with the target's laws. A copy of
            the draft learns; `save` writes it.
        every: examples gathered before an update.
        capacity: examples that are kept to be learned from again.

    Raises:
        InputError: an unknown expansion, or a value out of range; updates of a draft that is no
            model of transformers in float32, or has another vocabulary.

    Paper: Xiong et al., "DySpec: Faster Speculative Decoding with Dynamic Token Tree Structure",
    2024, section 4; Chen et al., "Sequoia", 2024, section 3.1; Jeon et al., "Recursive Speculative
    Decoding", 2024, section 3.1; Miao et al., "SpecInfer", 2023; Liu et al., "Online Speculative
    Decoding", 2023, section 4; Huang, Guo and Wang, "SpecDec++", 2024, section 3.
    """

    def __init__(
        self,
        draft: TokenModel,
        expansion: str = "dyspec",
        num_draft: int = 12,
        max_depth: int = 6,
        branching: Sequence[int] = (3, 2, 1),
        ranks: Sequence[float] = RANKS,
        context: Callable[[list[list[int]]], Conditions] | None = None,
        acceptance: AcceptanceHead | str | Path | None = None,
        stop_threshold: float = 0.7,
        tokenizer: Any = None,
        online: float = 0.0,
        every: int = 16,
        capacity: int = 256,
    ) -> None:
        if expansion not in EXPANSIONS:
            raise unknown_name("expansion", expansion, EXPANSIONS)
        if num_draft < 1 or max_depth < 1 or not branching or min(branching) < 1:
            raise InputError(
                f"num_draft {num_draft}, max_depth {max_depth}, branching {tuple(branching)}: "
                "expected numbers >= 1"
            )
        self.learner: DraftLearner | None = None
        if online:
            if not isinstance(draft, HFCausalLM):
                raise InputError(
                    f"online {online} with a draft {type(draft).__name__}: expected a language "
                    "model of transformers"
                )
            draft = as_text_model(copy.deepcopy(draft.network), draft.num_tokens)
            self.learner = DraftLearner(draft.network, online, every, capacity)
        self.draft, self.expansion, self.max_depth = draft, expansion, max_depth
        self.branching, self.ranks, self._context = tuple(branching), tuple(ranks), context
        self.draft_vocab_size = draft.vocab_size
        self.tokenizer = tokenizer
        self.translation: Translation | None = None
        self.text_tokenizer: Any = None
        self.shaping = Shaping()
        if expansion in FIXED:
            full = len(parents_of(self.branching))
            num_draft = full if expansion != "beam" else sum(self.branching)
        self.num_draft = num_draft
        self.acceptance = AcceptanceHead.of(acceptance)
        self.stop_threshold = stop_threshold
        if self.acceptance is not None and (self.branches or not 0 < stop_threshold < 1):
            raise InputError(
                f"acceptance with expansion {expansion!r} and stop_threshold {stop_threshold}: "
                "expected a chain, and a probability between 0 and 1"
            )

    @property
    def draws(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """How drafts come about at the temperature of the run."""
        return DRAWN.get(self.expansion, "chosen") if self.shaping.temperature else "chosen"

    @property
    def branches(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether a node may have several children."""
        return self.expansion != "chain" and (
            self.expansion not in FIXED or max(self.branching) > 1
        )

    unread = (*TextDrafter.unread, "_known", "text_tokenizer")

    def start(self, noise: Noise, vocab_size: int, num_tokens: int) -> None:
        """A new batch begins."""
        super().start(noise, vocab_size, num_tokens)
        self._known = [0] * len(noise)
        self._plans: dict[int, Plan] = {}

    def begin(self, state: Any) -> None:
        """Prefill the draft."""

        read = self.histories if self._context is None else self._context(self.histories)
        shape = self.shaping if self.shaping.temperature else Shaping()

        def law(logits: Tensor) -> Tensor:
            return shape(in_vocabulary(logits, self.vocab_size))

        if self.acceptance is not None:
            self.acceptance.check_draft(self.draft, self.translation)
        if self.translation is None:
            self._state: Any = FollowingState(self.draft, read, 1.0, law, self.num_tokens)
            return
        if self.learner is not None:
            raise InputError(
                "online updates of a draft of another vocabulary: expected the target's"
            )
        draft = as_text_model(self.draft, FINER * self.num_tokens)
        texts = [torch.as_tensor(ids).tolist() for ids in read]
        self._state = TranslatedState(draft, self.translation, texts, law, self.vocab_size)

    def hear(self, new: Sequence[list[int]], told: Sequence[list[int]]) -> None:
        """Count what became final."""
        self._known = [known + len(own) for known, own in zip(self._known, new, strict=True)]
        super().hear(new, told)

    def observe(self, batch: Round, verdict: Verdict) -> None:
        """Note where drafts ended, if that is learned from."""
        if self.learner is not None and batch.number != 0:
            self.learner.hear(self.histories, batch, verdict)

    def save(self, folder: str | Path) -> None:
        """Write the draft as it is now, as transformers does, and its tokenizer where it is known."""
        network: Any = self.draft
        network.network.save_pretrained(user_path(folder))
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(user_path(folder))

    def select(self, rows: Tensor) -> None:
        """Keep batch rows `rows`."""
        for row in set(range(len(self.histories))) - set(rows.tolist()):
            self.histories[row] += self._fresh[row]  # what is learned from is whole
        super().select(rows)
        self._known = [self._known[row] for row in rows.tolist()]
        self._state.select(rows)

    @property
    def why_not_fixed(self) -> str | None:
        """Why the draft does not draft in passes of fixed shapes."""
        if self.translation is not None:
            return "a draft of another vocabulary reads the text itself, on the host"
        if self.learner is not None:
            return "a draft that learns online does so on the host"
        if self.acceptance is not None:
            return "chains that end where a rejection is likely have no fixed shape"
        if self.branches and not isinstance(self._state.state, TakesFixedTrees):
            return "the draft model has no trees of fixed shapes"
        return self._state.why_not_fixed

    def fix(self, num: int) -> None:
        """From now on the draft follows in passes of fixed shapes."""
        super().fix(num)
        self._state = self._state.fixed(num)

    def propose(self, tokens: Tensor, lengths: Tensor, num: int, round_number: int) -> TokenTree:
        """See `arvision.decoding.loop.Drafter`."""
        self.follow(tokens, lengths)
        if self.learner is not None:
            self.learner.learn()
        root = tokens.gather(1, lengths[:, None] - 1)
        law = self._state.follow(tokens, lengths, self._known)
        if law is None:  # another vocabulary's text has outgrown the draft
            logq = root.new_zeros(len(root), 0, self.vocab_size).float()
            return TokenTree(root[:, :0], None if self.draws == "chosen" else logq)
        if self.expansion in ("dyspec", "dyspec_drawn"):
            return self._greedy_expansion(root, law, lengths, num, round_number)
        if self.acceptance is not None:
            return self._likely_chain(root, law, lengths, num, round_number)
        if self.expansion == "beam" and self.draws == "distinct":
            return self._beam(root, law, lengths, round_number)
        if num not in self._plans:
            plan = Plan.of(self._parents(num), root.device)
            # Steps of fixed shapes ask for as many as there were: nothing is made in them.
            self._plans[num] = self._plans[len(plan.parents)] = plan
        return self._fill(root, law, lengths, self._plans[num], round_number)

    def _parents(self, num: int) -> Tensor:
        """Parents of a fixed tree of `num` candidates, or fewer, numbered level by level."""
        if self.expansion in FIXED:
            return parents_of(self.branching)[:num]
        if self.expansion == "chain":
            return torch.arange(-1, min(num, self.max_depth) - 1)
        return by_level(best_tree(self.ranks, num, self.max_depth))

    def _numbers(self, law: Tensor, positions: Tensor) -> Tensor:
        """What ranks chosen drafts at positions [B] besides log q: where tokens are drawn, the noise
        [B, V] of the level, computed once for all of its nodes."""
        if self.shaping.temperature == 0:
            return torch.zeros_like(law)
        where = positions[:, None].clamp(max=self.num_tokens - 1)
        return self.noise.gumbel(where, law.shape[-1], law.dtype)[:, 0]

    def _siblings(
        self, law: Tensor, positions: Tensor, num: int, round_number: int, place: int
    ) -> Tensor:
        """`num` children [B, num] of one node, drawn from its law [B, V]."""
        uniforms = self.noise.uniform(
            positions[:, None], "draft", round_number * LANES + place, num
        )[:, 0]
        left, chosen = law.exp(), []
        for number in range(num):
            # Where fewer tokens than siblings are possible the others are no drafts.
            has_more = left.sum(-1) > 0
            token = draw(left.where(has_more[:, None], 1.0), uniforms[:, number])
            if self.draws == "distinct":
                left = left.scatter(1, token[:, None], 0.0)
            chosen.append(token.where(has_more, -1))
        return torch.stack(chosen, dim=1)

    def _fill(
        self, root: Tensor, law: Tensor, lengths: Tensor, plan: Plan, round_number: int
    ) -> TokenTree:
        """Fill a fixed tree level by level."""
        drafts, before, laws = root[:, :0], root, law[:, None]
        wants_laws, drawn_from = self.draws != "chosen", []
        for number, level in enumerate(plan.levels):
            if number:
                fed = torch.cat([root, drafts.clamp(min=0)], dim=1)
                laws = self._state.extend(fed, plan.fed[number])[:, -before.shape[1] :]
            positions, laws = lengths + number, laws[:, level.above]
            if wants_laws:
                children = [
                    self._siblings(laws[:, place], positions, level.widest, round_number, node + 1)
                    for place, node in enumerate(level.parents)
                ]
                found = torch.stack(children, dim=1)
                drawn_from.append(laws[:, level.places])
            else:
                numbers = self._numbers(law, positions)
                found = (laws + numbers[:, None]).topk(level.widest, dim=-1).indices
            is_there = before[:, level.above][:, level.places] >= 0
            before = level.pick(found).where(is_there, -1)
            drafts = torch.cat([drafts, before], dim=1)
        return TokenTree(drafts, torch.cat(drawn_from, dim=1) if wants_laws else None, plan.parents)

    def _likely_chain(
        self, root: Tensor, law: Tensor, lengths: Tensor, num: int, round_number: int
    ) -> TokenTree:
        """A chain that ends in each row where a rejection is likely; see `StillLikely`.

        Chosen drafts go on as long as any row's do, which costs nothing and changes no text.
        """
        assert self.acceptance is not None
        levels = self.max_depth if self.expansion not in FIXED else len(self.branching)
        drafts, laws = root[:, :0], []
        likely = StillLikely(len(root), self.stop_threshold, law)
        for place in range(min(num, levels)):
            scores = law
            if self.draws == "chosen":
                scores = law + self._numbers(law, lengths + place)
                token = scores.argmax(-1)
            else:
                token = self._siblings(law, lengths + place, 1, round_number, place)[:, 0]
                token = token.where(likely.going, -1)
            drafts = torch.cat([drafts, token[:, None]], dim=1)
            laws.append(law)
            if place + 1 == min(num, levels):
                break
            fed = torch.cat([root, drafts.clamp(min=0)], dim=1)
            features = confidence_features(law, scores, token.clamp(min=0))
            law = self._state.extend(fed)[:, -1]
            likely.see(self.acceptance(self._state.hidden[:, -1], features))
            if not bool(likely.going.any()):  # a read, which is less than a pass of the draft
                break
        logq = None
        if self.draws != "chosen":
            logq = torch.stack(laws, dim=1) if laws else law[:, None][:, :0]
        return TokenTree(drafts, logq)

    def _greedy_expansion(
        self, root: Tensor, law: Tensor, lengths: Tensor, num: int, round_number: int
    ) -> TokenTree:
        """Grow each row's tree by the places with the largest estimated acceptance.

        A place is worth the probability that a rule tries it: the product of the draft's
        probabilities down to its parent, times what its elder siblings leave of the law where
        siblings are drawn; a chosen one is worth its own token. No place is worth more than the one
        above it or its elder sibling, so after each level the `num` best places so far are a tree,
        and only those of them that are new can have children among the best. Whether a place is
        among the best follows from what was drawn at better ones and never from its own token: so
        drawn trees keep the law. All rows grow at once, where the laws lie; what a row does not
        have is -1 with no probability.
        """
        width = min(num, 8, law.shape[-1])
        grow = self._chosen if self.draws == "chosen" else self._drawn
        laws = law[:, None]
        tree = Grown.roots(*grow(laws, lengths, 0, width, round_number))
        for level in range(1, self.max_depth):
            kept, _ = tree.best(num)
            fresh = (kept.depths == level - 1) & (kept.worth > float("-inf"))
            if none_left(fresh):
                break
            fed = torch.cat([root, kept.tokens.clamp(min=0)], dim=1)
            laws = self._state.extend(fed, topology_of(kept.parents, level).rooted)
            found = grow(laws[:, 1:], lengths, level, width, round_number)
            tree = kept.longer(level, fresh, *found)
        best, order = tree.best(num)
        logq = None
        if self.draws != "chosen":
            above = tree.parents.gather(1, order) + 1  # places of the last pass
            logq = laws.gather(1, above[..., None].expand(-1, -1, laws.shape[-1]))
        return TokenTree(
            best.tokens, logq, best.parents, num_levels=self.max_depth, most_children=width
        )

    def _chosen(
        self, laws: Tensor, lengths: Tensor, level: int, width: int, round_number: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The `width` best children of nodes with laws [B, N, V]: logarithms of their worth and of
        their probability (the same), and their tokens, [B, N, width]."""
        scores = laws + self._numbers(laws[:, 0], lengths + level)[:, None]
        best = scores.topk(width, dim=-1)
        values = best.values - scores.logsumexp(-1, keepdim=True)
        return values, values, best.indices

    def _drawn(
        self, laws: Tensor, lengths: Tensor, level: int, width: int, round_number: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`width` children drawn without replacement, as `_chosen`; worth what is left of the law."""
        batch, nodes, vocab = laws.shape
        number = round_number * LANES + level
        uniforms = self.noise.uniform((lengths + level)[:, None], "draft", number, nodes * width)
        uniforms = uniforms.reshape(batch * nodes, width)
        left = laws.reshape(-1, vocab).exp()
        worth, values, tokens = [], [], []
        for place in range(width):
            mass = left.sum(-1)
            token = draw(left.where((mass > 0)[:, None], 1.0), uniforms[:, place])[:, None]
            values.append(left.gather(1, token)[:, 0].log())
            left = left.scatter(1, token, 0.0)
            worth.append(mass.log())
            tokens.append(token[:, 0])
        shape = batch, nodes, width
        return tuple(torch.stack(part, dim=1).view(shape) for part in (worth, values, tokens))  # pyright: ignore[reportReturnType]

    def _beam(self, root: Tensor, law: Tensor, lengths: Tensor, round_number: int) -> TokenTree:
        """Stochastic beam search; every row grows a tree of its own, level by level, best first.

        The perturbed log-probability of a path is Gumbel noise around its own, conditioned to have
        its parent's for a maximum; the best paths of a level are drawn without replacement, and so
        are the children of one node, in the order of their values.

        Paper: Kool, van Hoof and Welling, "Stochastic Beams and Where to Find Them", 2019, section
        4.1.
        """
        batch, vocab = law.shape
        rows = torch.arange(batch, device=root.device)[:, None]
        drafts, parents, logq = root[:, :0], root[:, :0], law[:, None][:, :0]
        laws, total = law[:, None], law.new_zeros(batch, 1)
        value, place = law.new_zeros(batch, 1), torch.full_like(root, -1)
        for level, width in enumerate(self.branching):
            nodes, first = laws.shape[1], drafts.shape[1]
            positions = (lengths + level)[:, None]
            uniforms = self.noise.uniform(
                positions, "draft", round_number * LANES + level, num=nodes * vocab
            )
            noise = -(-uniforms.view(batch, nodes, vocab).log()).log()
            path = total[..., None] + laws
            raw = path + noise.to(path.dtype)
            bound = raw.amax(-1, keepdim=True)
            shifted = value[..., None] - raw + torch.log1p(-(raw - bound).exp().clamp(max=1.0))
            given = value[..., None] - shifted.clamp(min=0) - torch.log1p((-shifted.abs()).exp())
            given = torch.where(raw == bound, value[..., None], given)
            given = given.masked_fill(path == float("-inf"), float("-inf"))
            best = given.flatten(1).topk(min(width, nodes * vocab), dim=1)
            above, token = best.indices // vocab, best.indices % vocab
            # Where fewer paths than places are possible the others are no drafts.
            token = torch.where(best.values > float("-inf"), token, -1)
            drafts = torch.cat([drafts, token], dim=1)
            parents = torch.cat([parents, place.gather(1, above)], dim=1)
            logq = torch.cat([logq, laws[rows, above]], dim=1)
            total, value = path.flatten(1).gather(1, best.indices), best.values
            place = torch.arange(first, drafts.shape[1], device=root.device).expand_as(token)
            if level + 1 < len(self.branching):
                fed = torch.cat([root, drafts.clamp(min=0)], dim=1)
                laws = self._state.extend(fed, topology_of(parents).rooted)[:, first + 1 :]
        return TokenTree(
            drafts,
            logq,
            parents if self.branches else None,
            num_levels=len(self.branching),
            most_children=max(self.branching),
        )
