"""Lengths of drafts by row (SmartSpec): by each row's own acceptances, the same text, the same law."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from text_models import greedy_reference, random_prompts, tiny_llama

import arvision
from arvision.decoding.logits import Shaping
from arvision.decoding.loop import FixedWindow, decode_tokens
from arvision.decoding.run import Run
from arvision.decoding.tree import TokenTree
from arvision.decoding.verify import greedy
from arvision.decoding.window import CostTable, RowGoodput
from arvision.testing import DroppingTableModel, law_p_value
from arvision.text.drafters import DraftTree
from arvision.text.model import as_text_model
from arvision.text.rules import choose_rule


def test_a_shorter_tree_holds_the_first_candidates_of_each_row():
    tokens, parents = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([-1, -1, 0])
    tree = TokenTree(tokens, parents=parents, rows=[([1, 2, 3], [-1, -1, 0]), ([4], [-1])])
    shorter = tree.shortened([2, 0])
    assert shorter.tokens.tolist() == [[1, 2, -1], [-1, -1, -1]]
    assert shorter.rows == [([1, 2], [-1, -1]), ([], [])]
    assert shorter.parents is parents


class Told(RowGoodput):
    """Remembers what it said."""

    def __init__(self, table):
        super().__init__(table)
        self.said = []

    def next_of(self, rows, most):
        self.said.append((list(rows), super().next_of(rows, most)))
        return self.said[-1][1]


class RightInTheFirstRow(DraftTree):
    """Another network's tokens in all rows but the first."""

    def _fill(self, *arguments):
        tree = super()._fill(*arguments)
        tokens = tree.tokens.clone()
        tokens[1:] = (tokens[1:] + 1) % 64
        return replace(tree, tokens=tokens)


def test_rows_of_a_batch_get_lengths_of_their_own_and_the_same_text():
    network, prompts = tiny_llama(), random_prompts([8, 8, 6], seed=3)
    table = [[rows, w, 1 + rows * w / 40, 1 + 0.7 * (w - 1)] for rows in (1, 4) for w in (1, 4, 8)]
    policy, model = Told(CostTable(table)), as_text_model(network, 64)
    drafter = RightInTheFirstRow(model, "chain", num_draft=7, max_depth=7)
    drafter.shaping = Shaping(temperature=0.0)
    out = decode_tokens(
        model,
        prompts,
        Run(3, 64, [0, 1, 2]),
        drafter=drafter,
        rule=greedy,
        shape=lambda logits: logits,
        policy=policy,
    )
    assert out.tokens.tolist() == [greedy_reference(network, ids, 64) for ids in prompts]
    # Before the first row is done: it drafts as far as it may, the others have stopped.
    whole = [own for rows, own in policy.said if len(rows) == 3 and own[0] == 8]
    assert whole[0] == [8, 8, 8]
    assert whole[-1] == [8, 1, 1]
    assert out.stats["passes_per_image"][0] < 12


def test_auto_takes_a_length_for_each_row():
    network, prompts = tiny_llama(), random_prompts([8, 5], seed=3)
    plain = arvision.generate(network, prompts, max_new_tokens=12)
    out = arvision.generate(
        network, prompts, drafter="prompt_lookup", num_draft="auto", max_new_tokens=12
    )
    assert out.tokens == plain.tokens


class Windows(FixedWindow):
    """Row k has 1 + k % 6 candidates, whatever was drawn."""

    def next_of(self, rows, most):
        return [min(1 + row % 6, most) for row in rows]

    def observe_of(self, rows, given, counts, room):
        """Nothing to adapt."""


@pytest.mark.parametrize("expansion", ["independent", "distinct", "dyspec_drawn"])
def test_fewer_candidates_in_some_rows_keep_the_law(expansion):
    target, num = DroppingTableModel(seed=3), 12_000
    draft = DroppingTableModel(seed=4, sharpness=1.0)
    drafter = DraftTree(draft, expansion, num_draft=5, branching=(2, 1, 1))
    out = decode_tokens(
        target,
        [[0]] * num,
        Run(num, target.num_tokens, [(3, row) for row in range(num)]),
        drafter=drafter,
        rule=choose_rule("lossless", drafter.draws, 1.0, branches=True).rule,
        shape=Shaping(),
        policy=Windows(6),
    )
    assert law_p_value(target.number(out.tokens), target.joint(Shaping())) > 1e-4
