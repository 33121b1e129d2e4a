"""Rules over trees: the enumerated law of every lossless one, and mutants that must be found."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from forms import SHORT, by_draws, by_fault
from mutants import generous

from arvision import InputError
from arvision.decoding import verify
from arvision.decoding.logits import Shaping
from arvision.decoding.loop import FixedWindow, decode_tokens
from arvision.decoding.noise import Noise, draw
from arvision.decoding.run import Run
from arvision.decoding.tree import TokenTree, topology, topology_of
from arvision.decoding.verify import Round
from arvision.testing import DroppingTableModel, law_p_value
from arvision.text.rules import RULES, choose_rule
from arvision.text.rules import tree as rules_tree
from arvision.text.rules.lossy import JudgeHead, judge, typical

ALPHA = 1e-4
HARDER = {"block": 2}
"""How many times the usual number of rows a mutant takes to be found."""
TREES = {
    "chain": [-1, 0, 1],
    "wide": [-1, -1, -1, 0, 1],
    "mixed": [-1, 0, 0, -1, 1, 2, 3],
}


class TableDrafter:
    """A tree drafted from another table, its siblings drawn in one of three ways."""

    def __init__(self, table: DroppingTableModel, parents: list[int], draws: str) -> None:
        self.table, self.draws = table, draws
        is_chain = parents == list(range(-1, len(parents) - 1))
        self.parents = None if is_chain else torch.tensor(parents)
        self.shape = topology(tuple(parents), torch.device("cpu"))

    def start(self, noise, vocab_size, num_tokens):
        self.noise = noise

    def observe(self, batch, verdict):
        pass

    def select(self, rows):
        self.noise = self.noise.select(rows)

    def propose(self, tokens, lengths, num, round_number):
        vocab, num = self.table.vocab_size, len(self.shape.parents)
        places = torch.arange(tokens.shape[1])
        known = torch.where(places < lengths[:, None], tokens, 0)
        powers = vocab ** (lengths[:, None] - 1 - places).clamp(min=0)
        prefix = {-1: (known * powers * (places < lengths[:, None])).sum(1)}
        depth = {-1: lengths}
        drafts = torch.full((len(tokens), num), -1)
        laws = torch.full((len(tokens), num, vocab), 0.25).log().double()
        for law, siblings in enumerate(self.shape.children.tolist()):
            own, parent = [child for child in siblings if child >= 0], law - 1
            if not own:
                continue
            beyond = depth[parent] >= self.table.num_tokens
            row = self.table.row(
                prefix[parent].masked_fill(beyond, 0), depth[parent].masked_fill(beyond, 0)
            )
            logq = self.table.table[row].log_softmax(-1)
            uniforms = self.noise.uniform(
                depth[parent][:, None], "draft", round_number * 16 + law, len(own)
            )[:, 0]
            left = logq.exp()
            for place, child in enumerate(own):
                token = draw(left, uniforms[:, place])
                if self.draws == "distinct":
                    left = left.scatter(1, token[:, None], 0.0)
                drafts[:, child], laws[:, child] = token, logq
                prefix[child] = prefix[parent] * vocab + token
                depth[child] = depth[parent] + 1
        logq = None if self.draws == "chosen" else laws
        return TokenTree(drafts, logq, self.parents)


def drawn(rule, parents, draws, seed=0, num=SHORT):
    target = DroppingTableModel(seed=seed)
    drafter = TableDrafter(DroppingTableModel(seed=seed + 10, sharpness=1.0), parents, draws)
    out = decode_tokens(
        target,
        [None] * num,
        Run(num, target.num_tokens, [(seed, row) for row in range(num)]),
        drafter=drafter,
        rule=rule,
        shape=Shaping(),
        policy=FixedWindow(8),
    )
    return law_p_value(target.number(out.tokens), target.joint(Shaping())), out


CASES = [
    pytest.param("gumbel", "chain", "chosen", marks=pytest.mark.slow),
    ("gumbel", "mixed", "distinct"),
    ("independent", "chain", "independent"),
    ("maximal", "chain", "independent"),
    ("block", "chain", "independent"),
    pytest.param("multi_round", "chain", "independent", marks=pytest.mark.slow),
    pytest.param("multi_round", "wide", "independent", marks=pytest.mark.slow),
    ("multi_round", "mixed", "independent"),
    ("multi_round", "mixed", "chosen"),
    pytest.param("without_replacement", "chain", "distinct", marks=pytest.mark.slow),
    pytest.param("without_replacement", "wide", "distinct", marks=pytest.mark.slow),
    ("without_replacement", "mixed", "distinct"),
    pytest.param("k_sequential", "chain", "independent", marks=pytest.mark.slow),
    ("k_sequential", "wide", "independent"),
    pytest.param("k_sequential", "mixed", "independent", marks=pytest.mark.slow),
]


def test_every_lossless_rule_is_tested():
    assert {name for name, entry in RULES.items() if entry.lossless} - {"greedy"} == {
        getattr(case, "values", case)[0] for case in CASES
    }


@by_draws
@pytest.mark.parametrize(("name", "tree", "draws"), CASES)
def test_lossless_rules_keep_the_law(name, tree, draws, num):
    num *= HARDER.get(name, 1)
    p_value, out = drawn(RULES[name].make(), TREES[tree], draws, num=num)
    assert p_value > ALPHA
    assert out.stats.tokens_per_pass > 1.4


@by_fault
@pytest.mark.parametrize(
    ("name", "tree", "draws"),
    [
        ("independent", "chain", "independent"),
        ("block", "chain", "independent"),
        ("multi_round", "mixed", "independent"),
        ("multi_round", "mixed", "chosen"),
        ("without_replacement", "mixed", "distinct"),
        ("k_sequential", "wide", "independent"),
    ],
)
def test_a_mutant_is_found(name, tree, draws, num, off):
    mutant, num = generous(RULES[name].make(), off), num * HARDER.get(name, 1)
    assert drawn(mutant, TREES[tree], draws, num=num)[0] < ALPHA


def test_a_walk_that_clings_to_drafts_is_found():
    def clinging(batch):
        choice = verify.gumbel_draw(batch.target_logp, batch.positions, batch.noise)
        laws = topology(tuple(TREES["mixed"]), torch.device("cpu")).laws
        if batch.topology is None:
            return verify.gumbel_coupling(batch)
        holds = batch.noise.uniform(batch.positions[:, 1:], "accept", batch.number) < 0.05
        return verify.deepest(batch, (batch.drafts == choice[:, laws]) | holds, choice)

    assert drawn(clinging, TREES["mixed"], "distinct", num=20_000)[0] < ALPHA


def test_rules_with_the_wrong_drafts_are_found():
    """The laws differ between independent and distinct siblings, and the test sees it."""
    num = 20_000
    assert drawn(rules_tree.multi_round, TREES["wide"], "distinct", num=num)[0] < ALPHA
    assert drawn(rules_tree.without_replacement, TREES["wide"], "independent", num=num)[0] < ALPHA
    assert drawn(rules_tree.k_sequential, TREES["wide"], "distinct", num=num)[0] < ALPHA


def test_block_verification_accepts_at_least_what_the_chain_rule_does():
    chain = drawn(RULES["independent"].make(), TREES["chain"], "independent")[1]
    block = drawn(RULES["block"].make(), TREES["chain"], "independent")[1]
    assert block.stats.tokens_per_pass > chain.stats.tokens_per_pass


@pytest.mark.parametrize("tree", sorted(TREES))
def test_the_gumbel_walk_gives_the_tokens_of_plain_sampling(tree):
    tree_tokens = drawn(verify.gumbel_coupling, TREES[tree], "distinct", num=500)[1].tokens
    assert torch.equal(tree_tokens, drawn(verify.gumbel_coupling, [], "chosen", num=500)[1].tokens)


def test_the_old_word_of_a_rule_still_works_for_a_release():
    with pytest.warns(FutureWarning, match="rule 'chain' is called 'independent' now"):
        assert choose_rule("chain", "independent", 1.0).name == "independent"


def hand_made(drafts, laws, parents=None):
    """One row, a tree of drafts, log-laws by place."""
    num = len(drafts)
    shape = None if parents is None else topology(tuple(parents), torch.device("cpu"))
    return Round(
        torch.tensor([drafts]),
        None,
        torch.tensor([laws]).log(),
        torch.zeros(1, num + 1, dtype=torch.int64),
        Noise([0]),
        1,
        shape,
    )


@pytest.mark.parametrize("name", ["greedy", "gumbel", "multi_round", "without_replacement"])
def test_rows_with_trees_of_their_own_are_judged_as_alone(name):
    rules = {
        "greedy": verify.greedy,
        "gumbel": verify.gumbel_coupling,
        "multi_round": rules_tree.multi_round,
        "without_replacement": rules_tree.without_replacement,
    }
    generator = torch.Generator().manual_seed(3)
    num, vocab = 7, 3
    shapes = [TREES["mixed"], [-1, 0, 1, 2, 3, 4, 5], [-1] * 7, [-1, -1, -1, 0, 0, 3, 4]] * 8
    rows = len(shapes)
    drafts = torch.randint(vocab, (rows, num), generator=generator)
    laws = torch.randn(rows, num + 1, vocab, generator=generator).log_softmax(-1)
    noise = Noise(list(range(rows)))
    shape = topology_of(torch.tensor(shapes))
    places = torch.cat([torch.zeros(rows, 1, dtype=torch.int64), shape.depths + 1], dim=1)
    whole = rules[name](Round(drafts, None, laws, places, noise, 1, shape))
    assert whole.path is not None
    assert int(whole.counts.max()) > 2
    for row, parents in enumerate(shapes):
        alone = rules[name](
            Round(
                drafts[row : row + 1],
                None,
                laws[row : row + 1],
                places[row : row + 1],
                noise.select(torch.tensor([row])),
                1,
                topology_of(torch.tensor(parents)),
            )
        )
        count = int(alone.counts[0])
        assert alone.path is not None
        assert count == int(whole.counts[row])
        assert torch.equal(whole.tokens[row, :count], alone.tokens[0, :count])
        assert torch.equal(whole.path[row, : count - 1], alone.path[0, : count - 1])


def test_greedy_walks_to_the_end_of_the_right_branch():
    laws = [[0.1, 0.8, 0.1], [0.3, 0.3, 0.4], [0.9, 0.05, 0.05], [0.1, 0.1, 0.8]]
    verdict = verify.greedy(hand_made([0, 1, 0], laws, [-1, -1, 1]))
    assert verdict.path is not None
    count = int(verdict.counts[0])
    assert verdict.tokens[0, :count].tolist() == [1, 0, 2]
    assert verdict.path[0, : count - 1].tolist() == [1, 2]


def test_typical_acceptance_keeps_what_is_likely_enough():
    laws = [[0.5, 0.3, 0.2], [0.98, 0.01, 0.01], [0.1, 0.1, 0.8]]
    rule = typical(epsilon=0.3, delta=1.0, is_greedy=True)
    verdict = rule(hand_made([1, 2], laws))
    assert verdict.tokens[0, : int(verdict.counts[0])].tolist() == [0]
    verdict = typical(epsilon=0.29, delta=1.0, is_greedy=True)(hand_made([1, 2], laws))
    assert verdict.tokens[0, : int(verdict.counts[0])].tolist() == [1, 0]


def test_both_constants_of_typical_acceptance_bind():
    """Medusa: threshold 0.09 binds where the law is sure, alpha 0.3 where many tokens are likely."""

    def passes(law, token):
        verdict = typical(is_greedy=True)(hand_made([token], [law, law]))
        return int(verdict.counts[0]) == 2

    # Entropy near 0: 0.3 exp(-H) is near 0.3, so a token needs 0.09.
    sure = [0.88, 0.095, 0.02, 0.005]
    assert passes(sure, 1)
    assert not passes([0.89, 0.085, 0.02, 0.005], 1)
    # Sixteen equal tokens: 0.3 / 16 is enough, and 0.09 is far away.
    assert passes([1 / 16] * 16, 5)
    wide = [1 / 15.2] * 15 + [1 - 15 / 15.2]
    assert wide[15] < 0.3 / 16
    assert not passes(wide, 15)


def test_the_judge_keeps_what_its_head_calls_fine():
    head = JudgeHead(1)
    with torch.no_grad():
        head.score.weight.fill_(1.0)
        head.score.bias.zero_()
    laws = [[0.5, 0.3, 0.2], [0.98, 0.01, 0.01], [0.1, 0.1, 0.8]]
    batch = replace(hand_made([1, 2], laws), hidden=torch.tensor([[[0.0], [3.0], [-3.0]]]))
    verdict = judge(head, 0.6, is_greedy=True)(batch)
    assert verdict.tokens[0, : int(verdict.counts[0])].tolist() == [1, 0]
    with pytest.raises(InputError, match="hidden states"):
        judge(head)(hand_made([1, 2], laws))


def test_names_and_conditions_of_rules():
    assert choose_rule("lossless", "chosen", 0.0).name == "greedy"
    assert choose_rule("lossless", "chosen", 0.7).name == "gumbel"
    assert choose_rule("lossless", "independent", 0.7).name == "multi_round"
    assert choose_rule("lossless", "distinct", 0.7).name == "without_replacement"
    assert not choose_rule("typical", "chosen", 0.0).lossless
    with pytest.raises(InputError, match="unknown rule 'gredy': did you mean 'greedy'"):
        choose_rule("gredy", "chosen", 0.0)
    with pytest.raises(InputError, match="cannot judge drafts that are chosen"):
        choose_rule("block", "chosen", 1.0)
    with pytest.raises(InputError, match="expected temperature 0"):
        choose_rule("greedy", "chosen", 1.0)
    with pytest.raises(InputError, match="epsilon"):
        choose_rule("typical", "chosen", 1.0, epsilon=2.0)
