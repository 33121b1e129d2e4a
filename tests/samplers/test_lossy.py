"""Lossy samplers: what they approximate, by how much at most, and that tests can tell."""

from __future__ import annotations

import pytest
import torch

import arvision
from arvision import InputError, get_sampler
from arvision.decoding.noise import Noise
from arvision.decoding.relaxed import grouped_log_ratio, neighbour_log_ratio
from arvision.decoding.verify import Round
from arvision.testing import DroppingTableModel, TableModel, draw_joint, law_p_value, tiny_llamagen

ALPHA = 1e-4
NUM = 50_000
LOSSY = ["gsd", "lantern", "pjd", "zipar"]


@pytest.fixture(scope="module")
def model():
    return tiny_llamagen(grid=(6, 6)).to(torch.float64)


class CodedTable(DroppingTableModel):
    """A table whose four tokens have codes on a circle, two close pairs."""

    angles = torch.tensor([0.0, 0.2, 2.0, 2.2])
    codebook = torch.stack([angles.cos(), angles.sin()], dim=1)


def run(name, model, num=3, **options):
    sampler = get_sampler(name, **options)
    seeds, classes = [(4, k) for k in range(num)], [k % 3 for k in range(num)]
    return sampler(model, classes, seeds=seeds, guidance_scale=1.5)


def random_step(seed, vocab=6, num=1):
    """A chain in which every token is once the draft: p [V] and q [V], one row per draft."""
    generator = torch.Generator().manual_seed(seed)
    p, q = (
        (2.0 * torch.randn(vocab, generator=generator, dtype=torch.float64)).log_softmax(-1)
        for _ in range(2)
    )
    codes = torch.randn(vocab, 3, generator=generator)
    codes = torch.nn.functional.normalize(codes, dim=-1)
    drafts = torch.arange(vocab)[:, None]
    positions = torch.zeros(vocab, 2, dtype=torch.int64)
    chain = Round(
        drafts,
        q.expand(vocab, 1, vocab),
        p.expand(vocab, 2, vocab),
        positions,
        Noise(list(range(vocab))),
        1,
    )
    return chain, p.exp(), q.exp(), codes


def law_of_step(acceptance, p, q):
    """The law [V] of one step that keeps draft x with acceptance[x], else draws (p - q)+."""
    residual = (p - q).clamp(min=0)
    rejected = (q * (1 - acceptance)).sum()
    return q * acceptance + rejected * residual / residual.sum()


def total_variation(a, b):
    return 0.5 * float((a - b).abs().sum())


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_samplers_say_so(name):
    listed = {str(entry): entry.lossless for entry in arvision.list_samplers()}
    assert listed[name] is False
    assert not get_sampler(name).is_exact
    assert listed["sjd"] is True


@pytest.mark.parametrize("coupling", ["independent", "maximal"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lantern", {"tv": 0.0}),
        ("lantern", {"neighbours": 0}),
        ("lantern", {"tv": 0.0, "bound": "draft"}),
        ("lantern", {"factor": 1.0, "bound": "factor"}),
        ("gsd", {"max_distance": 0.0}),
        ("gsd", {"rank_radius": 0}),
        ("sjd", {"reuse": 1.0}),
    ],
)
def test_without_relaxation_they_are_sjd(model, name, options, coupling):
    expected = run("sjd", model, coupling=coupling)
    out = run(name, model, coupling=coupling, **options)
    assert torch.equal(out.tokens, expected.tokens)
    assert out.stats.commit_pass == expected.stats.commit_pass


@pytest.mark.parametrize("max_tv", [0.02, 0.1, 0.5])
def test_the_law_of_a_relaxed_step_stays_within_its_bound(max_tv):
    largest, as_published = 0.0, 0.0
    for seed in range(300):
        chain, p, q, codes = random_step(seed)
        ratio = neighbour_log_ratio(codes, 3, max_tv)(chain)[:, 0].exp()
        law = law_of_step(ratio.clamp(max=1), p, q)
        assert float(law.sum()) == pytest.approx(1.0, abs=1e-12)
        realised = total_variation(law, p)
        assert realised <= max_tv + 1e-12
        exact = law_of_step((p / q).clamp(max=1), p, q)
        assert total_variation(exact, p) < 1e-12
        largest = max(largest, realised)
        # The bound of the paper, for each draft alone, lets the step as a whole drift further.
        ratio = neighbour_log_ratio(codes, 3, max_tv, "draft")(chain)[:, 0].exp()
        alone = law_of_step(ratio.clamp(max=1), p, q)
        as_published = max(as_published, total_variation(alone, p))
    assert largest > 0.9 * max_tv * min(1.0, 0.5 / max_tv), "the bound was meant to be used"
    assert as_published > max_tv


@pytest.mark.parametrize(("bound", "limit"), [("draft", 0.2), ("factor", 3.0)])
def test_published_loans_against_a_slow_twin(bound, limit):
    for seed in range(60):
        chain, p, q, codes = random_step(seed, vocab=12)
        ratio = neighbour_log_ratio(codes, 5, limit, bound)(chain)[:, 0].exp()
        for x in range(12):
            near = (codes @ codes[x]).argsort(descending=True).tolist()
            near.remove(x)
            most = limit if bound == "draft" else (limit - 1) * float(p[x])
            lent = 0.0
            for y in near[:5]:
                if lent + float(p[y]) > most:
                    break
                lent += float(p[y])
            assert float(ratio[x]) == pytest.approx((float(p[x]) + lent) / float(q[x]), rel=1e-9)


def test_a_static_tree_of_lenient_siblings(model):
    """Without a loan the tree of `sjd`; with one more tokens per pass, in the same places."""
    exact = run("sjd", model, 6, tree="static", coupling="maximal", window=24)
    none = run("lantern", model, 6, tree="static", window=24, tv=0.0)
    assert torch.equal(none.tokens, exact.tokens)
    options = {"bound": "factor", "factor": 8.0, "neighbours": 20}
    lent = run("lantern", model, 6, tree="static", window=24, **options)
    chain = run("lantern", model, 6, window=24, **options)
    assert lent.stats.tokens_per_pass > exact.stats.tokens_per_pass
    assert lent.stats.tokens_per_pass > chain.stats.tokens_per_pass
    assert not lent.stats.lossless


def test_groups_against_a_slow_twin():
    for seed in range(60):
        chain, p, q, codes = random_step(seed, vocab=12)
        ratio = grouped_log_ratio(codes, 3, 0.15, 0.9)(chain)[:, 0].exp()
        ranks = {int(token): rank for rank, token in enumerate(p.argsort(descending=True))}
        for x in range(12):
            group = [
                y
                for y in range(12)
                if y == x
                or (
                    abs(ranks[x] - ranks[y]) <= 3
                    and abs(float(p[x] - p[y])) < 0.15
                    and float((codes[x] - codes[y]).norm()) < 0.9
                )
            ]
            expected = float(p[group].sum() / q[group].sum())
            assert float(ratio[x]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sjd", {"coupling": "independent", "reuse": 0.5}),
        # Maximal coupling keeps most confident drafts anyway, so this one errs less.
        ("sjd", {"coupling": "maximal", "reuse": 0.3}),
        ("gsd", {"max_gap": 0.5}),
        ("lantern", {"neighbours": 1, "tv": 0.3}),
    ],
)
def test_the_law_test_tells_lossy_from_exact(name, options):
    model = CodedTable(seed=2, sharpness=2.5)
    sampler = get_sampler(name, window=4, init="random", **options)
    samples = draw_joint(sampler, model, NUM, seed=0)
    law = model.joint(sampler.shaping())
    assert law_p_value(samples, law) < ALPHA
    assert not sampler.is_exact
    if name == "lantern":
        found = torch.bincount(samples, minlength=len(law)).double() / NUM
        assert total_variation(found, law) < 4 * 0.3


def test_a_bounded_relaxation_errs_less_than_an_unbounded_one():
    model, distances = CodedTable(seed=0), []
    for tv in (0.0, 0.05, 0.4):
        sampler = get_sampler("lantern", window=4, init="random", neighbours=1, tv=tv)
        samples = draw_joint(sampler, model, NUM, seed=1)
        law = model.joint(sampler.shaping())
        found = torch.bincount(samples, minlength=len(law)).double() / NUM
        distances.append(total_variation(found, law))
    # Sampling noise alone gives about 0.03 for 256 outcomes.
    assert distances[0] < distances[1] + 0.01 < distances[2]
    assert distances[1] < 4 * 0.05 + distances[0]


def test_statistics_and_configurations_tell_exact_from_lossy(model, tmp_path):
    lossy = get_sampler("sjd", coupling="independent", reuse=0.3)
    assert not lossy.is_exact
    assert run("sjd", model, 1, coupling="independent", reuse=0.3).stats.lossless is False
    assert run("sjd", model, 1).stats.lossless is True
    assert run("gsd", model, 1).stats.lossless is False
    assert run("lantern", model, 1, tv=0.0).stats.lossless is True
    lossy.save_pretrained(tmp_path)
    again = type(lossy).from_pretrained(tmp_path)
    assert not isinstance(again, tuple)
    assert again.config["reuse"] == 0.3
    assert not again.is_exact


def test_looser_groups_take_fewer_passes(model):
    passes = [
        run("gsd", model, 12, max_distance=distance, max_gap=1.0, rank_radius=63).stats[
            "forward_passes"
        ]
        for distance in (0.0, 2.1)
    ]
    assert passes[1] < 0.5 * passes[0], "one group of all tokens keeps every guess"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sjd", {"reuse": 0.5}, "reuse and relaxation need 'independent'"),
        ("sjd", {"reuse": 1.5, "coupling": "maximal"}, "reuse 1.5: expected a probability"),
        ("gsd", {"coupling": "gumbel"}, "coupling 'gumbel' draws every token"),
        ("gsd", {"coupling": "maximum"}, "did you mean 'maximal'"),
        ("gsd", {"max_gap": -1}, "max_gap -1"),
        ("gsd", {"window": 0}, "window 0"),
        ("lantern", {"tv": 1.5}, "tv 1.5: expected a total variation"),
        ("lantern", {"neighbours": -1}, "neighbours -1"),
        ("lantern", {"coupling": "gumbel"}, "coupling 'gumbel'"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(InputError, match=message):
        get_sampler(name, **options)


@pytest.mark.parametrize("name", ["gsd", "lantern"])
def test_a_model_without_a_codebook(name):
    with pytest.raises(InputError, match=f"'{name}' compares tokens.*no `codebook`"):
        get_sampler(name)(TableModel(), [None], seeds=[0])
    tokens_only = tiny_llamagen()
    tokens_only.tokenizer = None
    with pytest.raises(InputError, match="no `codebook`"):
        get_sampler(name)(tokens_only, [0], seeds=[0])
