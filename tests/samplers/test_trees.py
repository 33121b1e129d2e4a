"""Jacobi decoding with trees: plain sampling's tokens, the law, what is refused, and what it saves."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from forms import covered

from arvision import InputError, get_sampler
from arvision.decoding import drift, static_tree, tree_rules, verify
from arvision.decoding.jacobi import FROM_LAWS
from arvision.decoding.noise import Noise
from arvision.samplers.sjd import SJDSampler
from arvision.testing import DroppingTableModel, TableModel, draw_joint, law_p_value, tiny_llamagen

ALPHA = 1e-4
NUM = 6_000
CAPTIONS = ["a dark ankle boot", "a grey sneaker", "a light shirt"]
MODELS = {"llamagen-fashion": list(range(10)), "llamagen-fashion-t2i": CAPTIONS}


@pytest.fixture(scope="module")
def model():
    return tiny_llamagen(grid=(6, 8)).to(torch.float64)


@pytest.fixture(scope="module")
def plain(model):
    seeds = list(range(8))
    ar = get_sampler("ar")
    return ar(model, [s % 3 for s in seeds], seeds=seeds, guidance_scale=2.0).tokens


@pytest.mark.parametrize(("init", "window"), covered(FROM_LAWS, [2, 5, 16, 32, 64]))
def test_a_drift_tree_gives_the_tokens_of_plain_sampling(model, plain, window, init):
    sampler = get_sampler("sjd", tree="drift", window=window, init=init)
    seeds = list(range(8))
    out = sampler(model, [s % 3 for s in seeds], seeds=seeds, guidance_scale=2.0)
    assert torch.equal(out.tokens, plain)
    assert len(set(out.stats.passes_per_image)) > 1, "the batch was meant to be ragged"
    assert set(out.stats.windows) == {window}, "root included, to the end of the image"
    alone = sampler(model, [2], seeds=[5], guidance_scale=2.0)
    assert torch.equal(alone.tokens[0], plain[5])


@pytest.mark.parametrize(
    "shaping", [{"top_k": 3}, {"top_p": 0.5}, {"temperature": 0}, {"temperature": 1.7}]
)
def test_shaped_laws_and_few_tokens_to_choose_from(model, shaping):
    given = {"seeds": [3, 4, 5], "guidance_scale": 1.5}
    expected = get_sampler("ar", **shaping)(model, [0, 1, 2], **given).tokens
    sampler = get_sampler("sjd", tree="drift", window=24, init="above", min_share=0.01, **shaping)
    assert torch.equal(sampler(model, [0, 1, 2], **given).tokens, expected)
    static = get_sampler("sjd", tree="static", coupling="maximal", window=24, **shaping)
    out = static(model, [0, 1, 2], **given)
    if shaping == {"temperature": 0}:
        assert torch.equal(out.tokens, expected)


def in_float64(pipe, run):
    pipe.transformer.to(torch.float64)
    try:
        return run(pipe.model)
    finally:
        pipe.transformer.to(torch.float32)


@pytest.mark.parametrize("window", [16, 32, 64])
@pytest.mark.parametrize("init", ["above", "memory"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.slow
def test_the_embedded_models_draw_the_same_pictures_for_twenty_seeds(name, init, window, request):
    import arvision

    conditions = [MODELS[name][k % len(MODELS[name])] for k in range(20)]
    seeds = [(7, k) for k in range(20)]

    def run(model):
        sampler = get_sampler("sjd", tree="drift", window=window, init=init)
        plain = get_sampler("ar")(model, conditions, seeds=seeds, guidance_scale=3.0)
        ragged = [slice(0, 7), slice(7, 8), slice(8, 20)]
        parts = [
            sampler(model, conditions[part], seeds=seeds[part], guidance_scale=3.0).tokens
            for part in ragged
        ]
        assert torch.equal(torch.cat(parts), plain.tokens)

    in_float64(arvision.load(name, device="cpu"), run)


def test_an_embedded_model_draws_the_same_pictures_in_fewer_passes(fashion):
    classes, seeds = [0, 3, 5, 7], [(11, k) for k in range(4)]

    def draw(model, **options):
        sampler = get_sampler(options.pop("name", "sjd"), **options)
        return sampler(model, classes, seeds=seeds, guidance_scale=3.0)

    def run(model):
        return [
            draw(model, name="ar"),
            draw(model, window=32),
            draw(model, window=32, tree="drift", init="above"),
            draw(model, window=32, tree="drift", init="above", min_share=0.1),
        ]

    plain, chain, tree, small = in_float64(fashion, run)
    for out in (chain, tree, small):
        assert torch.equal(out.tokens, plain.tokens)
    assert tree.stats.tokens_per_pass > 1.08 * chain.stats.tokens_per_pass
    assert small.stats.candidates < 0.95 * tree.stats.candidates
    assert small.stats.tokens_per_pass > chain.stats.tokens_per_pass
    static = draw(fashion.model, window=32, tree="static", coupling="maximal")
    assert static.stats.tokens_per_pass > 2.5


OPTIONS = {
    "drift": {"tree": "drift", "coupling": "gumbel"},
    "drift above": {"tree": "drift", "coupling": "gumbel", "init": "above"},
    "drift memory": {"tree": "drift", "coupling": "gumbel", "init": "memory"},
    "static": {"tree": "static", "coupling": "maximal"},
    "static above": {"tree": "static", "coupling": "maximal", "init": "above"},
    "chain above": {"coupling": "maximal", "init": "above"},
    "chain memory": {"coupling": "gumbel", "init": "memory"},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("drops", [False, True])
def test_joint_law(name, drops):
    sampler = get_sampler("sjd", window=4 if "chain" in name else 7, **OPTIONS[name])
    model = (DroppingTableModel if drops else TableModel)(4, 4, seed=2 + drops, grid=(2, 2))
    samples = draw_joint(sampler, model, NUM, seed=4)
    assert law_p_value(samples, model.joint(sampler.shaping())) > ALPHA


@pytest.mark.parametrize("name", ["static above", "chain above"])
def test_joint_law_where_lines_have_something_above(name):
    sampler = get_sampler("sjd", window=3, **OPTIONS[name])
    model = DroppingTableModel(2, 6, seed=9, grid=(3, 2))
    samples = draw_joint(sampler, model, NUM, seed=6)
    assert law_p_value(samples, model.joint(sampler.shaping())) > ALPHA


def recovered_from_the_whole_law(batch):
    """A walk that draws from p itself where it ends, and so draws what was drafted too often."""
    verdict = verify.gumbel_coupling(batch)
    if batch.topology is None or verdict.path is None:
        return verdict
    last = verdict.path.gather(1, (verdict.counts - 2).clamp(min=0)[:, None])[:, 0]
    end = torch.where(verdict.counts > 1, last + 1, 0)[:, None]
    rows = torch.arange(len(end))[:, None]
    law, position = batch.target_logp[rows, end], batch.positions.gather(1, end)
    uniforms = batch.noise.uniform(position, "recover", batch.number)
    fresh = verify.draw(law.exp(), uniforms)
    tokens = verdict.tokens.scatter(1, verdict.counts[:, None] - 1, fresh)
    return replace(verdict, tokens=tokens)


def siblings_as_from_the_whole_law(batch):
    """The released rule's first fault: siblings judged as if drawn from q with the first one in it."""
    return (
        verify.maximal_coupling(batch) if batch.topology is None else tree_rules.multi_round(batch)
    )


def recovered_static(batch):
    verdict = static_tree.tree_coupling(batch)
    if batch.topology is None:
        return verdict
    return replace(verdict, tokens=recovered_from_the_whole_law_of(batch, verdict))


def recovered_from_the_whole_law_of(batch, verdict):
    last = verdict.path.gather(1, (verdict.counts - 2).clamp(min=0)[:, None])[:, 0]
    end = torch.where(verdict.counts > 1, last + 1, 0)[:, None]
    rows = torch.arange(len(end))[:, None]
    uniforms = batch.noise.uniform(batch.positions.gather(1, end), "recover", batch.number)
    fresh = verify.draw(batch.target_logp[rows, end].exp(), uniforms)
    return verdict.tokens.scatter(1, verdict.counts[:, None] - 1, fresh)


@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("drift", recovered_from_the_whole_law),
        ("static", recovered_static),
        ("static", siblings_as_from_the_whole_law),
    ],
)
def test_mutants_are_found(name, mutant):
    sampler = get_sampler("sjd", window=7, **OPTIONS[name])
    sampler.__class__ = type("Mutant", (SJDSampler,), {"rule": lambda self, model: mutant})
    model = DroppingTableModel(4, 4, seed=2, sharpness=2.0, grid=(2, 2))
    samples = draw_joint(sampler, model, NUM, seed=4)
    assert law_p_value(samples, model.joint(sampler.shaping())) < ALPHA


def test_rows_have_trees_of_their_own_and_candidates_are_not_wasted(fashion):
    sampler: Any = get_sampler("sjd", tree="drift", window=16, init="above")
    drafter = sampler.drafter(fashion.model)
    seen = []
    inner = drafter.propose

    def propose(tokens, lengths, num, number):
        tree = inner(tokens, lengths, num, number)
        seen.append((tree, lengths.clone(), tokens.shape[1]))
        return tree

    drafter.propose = propose
    sampler.drafter = lambda model: drafter
    sampler(fashion.model, [0, 1, 2], seeds=[0, 1, 2], guidance_scale=3.0)
    ragged = 0
    for tree, lengths, num_tokens in seen[3:]:
        assert tree.parents.dim() == 2
        ragged += len({tuple(row) for row in tree.parents.tolist()}) > 1
        for row, (own, parents) in enumerate(
            zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True)
        ):
            depth = {-1: 0}
            paths: dict[int, tuple[int, ...]] = {-1: ()}
            for node, (token, parent) in enumerate(zip(own, parents, strict=True)):
                depth[node] = depth[parent] + 1
                paths[node] = (*paths[parent], token)
                if token >= 0:
                    assert int(lengths[row]) + depth[node] <= num_tokens, "past the last token"
            real = [paths[node] for node, token in enumerate(own) if token >= 0]
            assert len(set(real)) == len(real), "no path is drafted twice"
    assert ragged > len(seen) / 2


def test_static_trees_hold_a_chain_and_their_spines_follow_paths():
    for num, levels in ((5, 3), (31, 18), (63, 26), (3, 3)):
        parents = static_tree.static_parents(num, levels)
        assert parents[:levels] == tuple(range(-1, levels - 1))
        assert len(parents) == num
        table = static_tree.spines(parents, levels, torch.device("cpu"))
        depth = {-1: 0} | {}
        for node, parent in enumerate(parents):
            assert parent < node
            depth[node] = depth[parent] + 1
            assert depth[node] <= levels
        for end, spine in enumerate(table.tolist()):
            assert spine[0] == 0
            assert spine[depth[end - 1]] == end, "a walk ends where its spine says"
            assert [depth[law - 1] for law in spine] == list(range(levels + 1))


def test_the_memory_shortens_later_runs_and_stays_with_its_sampler(fashion):
    given = {"seeds": [(5, k) for k in range(4)], "guidance_scale": 3.0}
    sampler = get_sampler("sjd", tree="drift", window=32, init="memory")
    first, again = (sampler(fashion.model, [1, 1, 2, 3], **given) for _ in range(2))
    assert torch.equal(first.tokens, again.tokens)
    assert again.stats.tokens_per_pass > 1.05 * first.stats.tokens_per_pass
    for other in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        out = other(fashion.model, [1, 1, 2, 3], **given)
        assert out.stats.passes_per_image == first.stats.passes_per_image


def test_memory_tells_conditions_apart_as_far_as_there_is_room(monkeypatch):
    from arvision.decoding import first_laws

    monkeypatch.setattr(first_laws, "MEMORY_BYTES", 2 * 3 * 4 * 4)
    memory = first_laws.LawMemory(3, 4, torch.device("cpu"))
    slots = memory.slots(["a", 3, "a", "b", torch.zeros(2)])
    assert slots.tolist() == [1, 2, 1, 0, 0]
    laws = torch.randn(2, 1, 4).log_softmax(-1)
    place = torch.zeros(2, 1, dtype=torch.int64)
    memory.add(slots[:2], place, laws, torch.ones(2, dtype=torch.int64))
    mean, known = memory.mean(slots[[0, 3]], place)
    assert known.all()
    common = laws.mean(0)
    torch.testing.assert_close(mean[0], (laws[0] + common) / 2)
    torch.testing.assert_close(mean[1], common)
    assert not memory.mean(slots[:1], place[:1] + 1)[1].any()


def test_a_saved_sampler_draws_the_same(model, plain, tmp_path):
    made = get_sampler("sjd:tree=drift:window=16:init=above:min_share=0.02")
    made.save_pretrained(tmp_path)
    loaded = SJDSampler.from_pretrained(tmp_path)
    assert loaded.config["tree"] == "drift"
    assert loaded.config["min_share"] == 0.02
    given = {"seeds": [0, 1], "guidance_scale": 2.0}
    out, expected = (s(model, [0, 1], **given) for s in (loaded, made))
    assert torch.equal(out.tokens, plain[:2])
    assert out.stats.passes_per_image == expected.stats.passes_per_image


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tree": "drifts"}, "unknown tree 'drifts': did you mean 'drift'"),
        ({"tree": True}, "unknown tree"),
        ({"tree": "drift", "coupling": "maximal"}, "expected coupling 'gumbel'"),
        ({"tree": "static"}, "tree 'static' with coupling 'gumbel': expected coupling 'maximal'"),
        ({"tree": "drift", "init": "random"}, "init 'random' with tree \"drift\".*above, memory"),
        ({"tree": "static", "coupling": "maximal", "reuse": 0.5}, "expected reuse None"),
        ({"tree": "drift", "window": 65}, "window 65 with tree 'drift': expected at most 64"),
        (
            {"min_share": 0.1},
            "min_share 0.1 with tree None: it would have no effect, expected tree",
        ),
        ({"tree": "drift", "min_share": 1.0}, "expected a number, 0 <= min_share < 1"),
        ({"tree": "drift", "min_share": float("nan")}, "expected a number, 0 <= min_share < 1"),
        ({"tree": "drift", "min_share": "x"}, "min_share 'x': expected a number"),
        ({"init": "memory", "coupling": "maximal"}, "init \"memory\" with coupling 'maximal'"),
        ({"window": "auto", "cost_table": [[1, 4, 1.0, "bush"]]}, "unknown tree 'bush'"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(InputError, match=message) as raised:
        get_sampler("sjd", **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["gsd", "lantern"])
def test_other_samplers_keep_no_memory(name):
    with pytest.raises(InputError, match='init "memory" is for sampler "sjd"'):
        get_sampler(name, init="memory")


def test_models_without_trees_are_refused_before_they_run():
    model = TableModel(4, 4)
    del model.takes_trees
    model.start = None  # type: ignore[assignment]
    with pytest.raises(InputError, match="TableModel, which takes no tree of its own"):
        get_sampler("sjd", tree="drift", window=4)(model, [0], seeds=[0])
    without_grid = DroppingTableModel(4, 4)
    for init in ("above", "memory"):
        with pytest.raises(InputError, match="looks at the image grid, and this model has none"):
            get_sampler("sjd", tree="drift", init=init)(without_grid, [0], seeds=[0])
    out = get_sampler("sjd", tree="drift", window=4)(without_grid, [0], seeds=[0])
    expected = get_sampler("ar")(without_grid, [0], seeds=[0])
    assert torch.equal(out.tokens, expected.tokens)


def table_of(chain, tree, name="drift"):
    """A pass of 8 candidates costs 1, and gives `chain` or `tree` tokens."""
    return [[1, 1, 0.9, 1], [1, 8, 1.0, chain], [1, 1, 0.9, 1, name], [1, 8, 1.0, tree, name]]


def test_window_auto_chooses_among_chains_and_trees(model, plain):
    given = {"seeds": [0, 1, 2], "guidance_scale": 2.0}
    for table, chosen in (
        (table_of(2, 4), "drift"),
        (table_of(4, 2), None),
        (table_of(2, 2), None),
    ):
        sampler = get_sampler("sjd", window="auto", cost_table=table)
        out = sampler(model, [0, 1, 2], **given)
        assert out.stats.tree == chosen
        assert out.stats.cost_table == table
        assert torch.equal(out.tokens, plain[:3])
        assert max(out.stats.windows) == 8
    maximal = get_sampler("sjd", window="auto", coupling="maximal", cost_table=table_of(2, 4))
    assert maximal(model, [0], seeds=[0]).stats.tree is None, "drift trees are for Gumbel coupling"
    static = table_of(2, 4, "static")
    maximal = get_sampler("sjd", window="auto", coupling="maximal", cost_table=static)
    assert maximal(model, [0], seeds=[0]).stats.tree == "static"
    with pytest.raises(InputError, match="cost_table for trees alone"):
        get_sampler("sjd", window="auto", cost_table=static[2:])(model, [0], seeds=[0])


def test_window_auto_measures_trees_too(tmp_path, monkeypatch):
    from arvision.decoding import window

    monkeypatch.setattr(window, "WINDOWS", (1, 4))
    monkeypatch.setattr(window, "MAX_SECONDS", 0.01)
    model = tiny_llamagen(grid=(3, 3))
    sampler = get_sampler("sjd", window="auto", cost_file=str(tmp_path / "costs.json"))
    table = sampler(model, [0], seeds=[0]).stats.cost_table
    assert [entry[4:] for entry in table] == [[], [], ["drift"], ["drift"]]
    asked = sampler.with_options(tree="drift")(model, [0], seeds=[0])
    assert asked.stats.tree == "drift"
    assert {entry[4] for entry in asked.stats.cost_table} == {"drift"}


def test_laws_are_looked_up_by_what_stands_before_them():
    """Of two laws of a position that whose tokens before differ less counts, where it matters."""
    weights = drift.mismatch_weights(8)
    assert (weights[0], weights[7], weights[8], weights[15]) == (1.0, 0.9, 0.2, 0.1)
    assert drift.mismatch_weights(None)[:4] == [1.0, 0.35, 0.1, 0.05]
    from arvision.decoding.first_laws import FirstLaws

    drafter = drift.DriftDrafter(FirstLaws(None), None)
    drafter.start(Noise([0]), 5, 20)
    drafter.attach(None, [0])
    numbers = Noise([0]).gumbel(torch.arange(4, 5)[None], 5)[0, 0]

    def sure_of(token):
        return torch.full((5,), -9.0, dtype=torch.float64).index_fill(
            0, torch.tensor(token), 9.0
        ) - (numbers)

    laws = torch.zeros(1, 3, 5, dtype=torch.float64)
    laws[0, 1], laws[0, 2] = sure_of(1), sure_of(2)  # behind token 3, and behind token 4
    drafter._contexts = torch.full((1, 3, 8), -1)
    drafter._contexts[0, 1, 0], drafter._contexts[0, 2, 0] = 3, 4
    drafter._levels = 1
    drafter.observe(
        verify.Round(torch.tensor([[3, 4]]), None, laws, torch.tensor([[3, 4, 4]]), Noise([0]), 1),
        verify.Verdict(torch.tensor([[3, 0, 0]]), torch.tensor([1])),
    )
    for before, expected in ((3, 1), (4, 2)):
        known = torch.zeros(1, 20, dtype=torch.int64)
        known[0, 3] = before
        tree = drafter.propose(known, torch.tensor([4]), 1, 2)
        assert tree.tokens.tolist() == [[expected]]
