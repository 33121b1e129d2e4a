"""Rules by name: what each asks of the drafts, and whether it keeps the target's law."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...decoding.verify import (
    Rule,
    greedy,
    gumbel_coupling,
    independent_redraw,
    maximal_coupling,
)
from ...errors import InputError, renamed, unknown_name
from .block import block_verification
from .lossy import judge, transfer, typical, unverified
from .tree import k_sequential, multi_round, without_replacement


@dataclass(frozen=True)
class RuleEntry:
    """A rule and its conditions.

    Attributes:
        make: the rule, from its options.
        lossless: whether it draws from the target's law.
        draws: the kinds of drafts that it may judge, see `arvision.text.drafters.base.DRAWS`.
        takes_trees: whether drafts may branch.
        summary: one line.
    """

    make: Callable[..., Rule]
    lossless: bool
    draws: tuple[str, ...]
    takes_trees: bool
    summary: str


def _always(rule: Rule) -> Callable[..., Rule]:
    return lambda: rule


ANY = ("chosen", "independent", "distinct")
RULES: dict[str, RuleEntry] = {
    "greedy": RuleEntry(_always(greedy), True, ANY, True, "the most likely token everywhere"),
    "gumbel": RuleEntry(
        _always(gumbel_coupling),
        True,
        ANY,
        True,
        "plain sampling's own tokens, whatever is drafted",
    ),
    "independent": RuleEntry(
        _always(independent_redraw),
        True,
        ("independent", "distinct"),
        False,
        "chain speculative sampling (Leviathan et al., Chen et al. 2023)",
    ),
    "maximal": RuleEntry(
        _always(maximal_coupling),
        True,
        ("independent", "distinct"),
        False,
        "likewise: it differs behind the first rejection, which text drafts anew",
    ),
    "block": RuleEntry(
        _always(block_verification),
        True,
        ("independent", "distinct"),
        False,
        "block verification (Sun et al. 2024)",
    ),
    "multi_round": RuleEntry(
        _always(multi_round), True, ("chosen", "independent"), True, "multi-round tree (SpecInfer)"
    ),
    "without_replacement": RuleEntry(
        _always(without_replacement), True, ("chosen", "distinct"), True, "recursive (RSD)"
    ),
    "k_sequential": RuleEntry(
        _always(k_sequential), True, ("chosen", "independent"), True, "k-SEQ transport (SpecTr)"
    ),
    "typical": RuleEntry(typical, False, ANY, True, "typical acceptance (Medusa)"),
    "judge": RuleEntry(judge, False, ANY, True, "a learned judge (Judge Decoding)"),
    "unverified": RuleEntry(
        unverified, False, ("chosen",), True, "every draft, unseen (lexical units, LUD)"
    ),
    "transfer": RuleEntry(
        transfer,
        False,
        ("independent", "distinct"),
        False,
        "the target moved towards the draft's laws (RAPID)",
    ),
}
OLD_RULES = {"chain": "independent"}
"""Words of earlier releases for rules; they go with the next one."""

LOSSLESS = {"chosen": "gumbel", "independent": "multi_round", "distinct": "without_replacement"}
"""What "lossless" means for each kind of draft when tokens are drawn (greedy when they are not)."""


@dataclass(frozen=True)
class ChosenRule:
    """A rule picked for a run.

    Attributes:
        name: in `RULES`.
        rule: to hand to the decoding loop.
        wants_logits: whether it is content with logits instead of laws.
        lossless: as in `RuleEntry`.
    """

    name: str
    rule: Rule
    wants_logits: bool
    lossless: bool


def choose_rule(
    name: str, draws: str, temperature: float, *, branches: bool = False, **options: Any
) -> ChosenRule:
    """The rule of that name for drafts that come about as `draws` says.

    Args:
        name: in `RULES`, or "lossless" for one that keeps the target's law.
        draws: see `arvision.text.drafters.base.DRAWS`.
        temperature: of the run; at 0 every lossless rule is the greedy one.
        branches: whether the drafts may branch.
        **options: of the rule.

    Raises:
        InputError: an unknown rule, or one that such drafts cannot be judged by.
    """
    name = renamed("rule", name, OLD_RULES)
    if name not in RULES and name != "lossless":
        raise unknown_name("rule", name, [*RULES, "lossless"])
    if name == "lossless":
        name = "greedy" if temperature == 0 else LOSSLESS[draws]
    entry = RULES[name]
    if name == "greedy" and temperature != 0:
        raise InputError(f"rule 'greedy' at temperature {temperature}: expected temperature 0")
    if temperature == 0 and entry.lossless:
        if options:
            raise InputError(
                f"rule_options {', '.join(options)}: at temperature 0 rule {name!r} is 'greedy', which "
                "takes none"
            )
        return ChosenRule("greedy", greedy, True, True)
    fitting = [
        other
        for other, facts in RULES.items()
        if draws in facts.draws and (facts.takes_trees or not branches) and other != "greedy"
    ]
    if name not in fitting:
        kind = draws if draws not in entry.draws else "trees with branches"
        raise InputError(
            f"rule {name!r} cannot judge drafts that are {kind}: expected one of "
            f"{', '.join(fitting)}"
        )
    if not entry.lossless:
        options["is_greedy"] = temperature == 0
    try:
        rule = entry.make(**options)
    except TypeError as error:
        raise InputError(f"rule {name!r}: {error}") from error
    return ChosenRule(name, rule, not entry.lossless and temperature == 0, entry.lossless)
