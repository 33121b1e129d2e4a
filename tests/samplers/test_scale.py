"""Samplers of scale models: the model's law, one picture per seed, and what is lossy."""

from __future__ import annotations

import pytest
import torch
from forms import SHORT, by_draws, by_fault

import arvision
from arvision import InputError, get_sampler
from arvision.decoding.run import Run
from arvision.decoding.scale_loop import decode_scales
from arvision.decoding.verify import gumbel_draw
from arvision.errors import StateError
from arvision.eval.classifier import class_consistency
from arvision.models import VAR
from arvision.testing import ScaleTable, TableModel, draw_joint, law_p_value
from arvision.training.publish import draw

ALPHA = 1e-4


@pytest.fixture(scope="module")
def model(request):
    """A real network with random weights, float64: rounding cannot flip an argmax."""
    folder = request.config.rootpath / "tests" / "goldens" / "var"
    model = VAR.from_official(
        folder / "var_d2_shared_aln.pth", folder / "var_d2_shared_aln_vae.pth"
    )
    return model.to(torch.float64)


@pytest.fixture(scope="module")
def embedded():
    return arvision.load("var-fashion", device="cpu")


@by_draws
@pytest.mark.parametrize("shaping", [{}, {"temperature": 1.4, "top_k": 2}, {"top_p": 0.8}])
def test_joint_law(shaping, num):
    sampler = get_sampler("ar", **shaping)
    table = ScaleTable(seed=3)
    samples = draw_joint(sampler, table, num, seed=3)
    assert law_p_value(samples, table.joint(sampler.shaping())) > ALPHA


@by_fault
def test_a_mutant_is_found(num, off):
    def clinging(laws, positions, noise):
        """A share of the tokens is that of the token before."""
        drawn = gumbel_draw(laws, positions, noise)
        holds = noise.uniform(positions, "accept") < off
        return torch.where(holds, drawn.roll(1, dims=1), drawn)

    table, shape = ScaleTable(seed=3), get_sampler("ar").shaping()
    seeds = [(3, image) for image in range(num)]
    out = decode_scales(
        table, [None] * num, Run(num, table.num_tokens, seeds), shape=shape, pick=clinging
    )
    assert law_p_value(table.number(out.tokens), table.joint(shape)) < ALPHA


def test_tokens_of_a_scale_are_drawn_independently_given_the_coarser_ones():
    table = ScaleTable(seed=4)
    shape = get_sampler("ar").shaping()
    out = get_sampler("ar")(table, [None] * SHORT, seeds=[(4, k) for k in range(SHORT)])
    after = out.tokens[out.tokens[:, 0] == 1]
    laws = shape(table.tables[1][1]).exp()
    pair = (laws[0][:, None] * laws[3]).flatten()
    assert law_p_value(after[:, 1] * 3 + after[:, 4], pair) > ALPHA


def test_a_seed_names_a_picture(model):
    seeds, classes = [(5, k) for k in range(5)], [0, 1, 2, 9, 1]
    for name, options in (("ar", {}), ("ar", {"prune": 0.5}), ("code", {"draft": model})):
        sampler = get_sampler(name, **options)
        batch = sampler(model, classes, seeds=seeds, guidance_scale=2.0)
        assert batch.tokens.shape == (5, 30)
        again = sampler(model, classes, seeds=seeds, guidance_scale=2.0)
        assert torch.equal(batch.tokens, again.tokens)
        for row in (0, 3):
            alone = sampler(model, classes[row : row + 1], seeds=[seeds[row]], guidance_scale=2.0)
            assert torch.equal(alone.tokens[0], batch.tokens[row])
    other = get_sampler("ar")(model, classes, seeds=[(6, k) for k in range(5)], guidance_scale=2.0)
    assert not torch.equal(other.tokens, batch.tokens)


def test_statistics_and_stopping(model):
    calls = []
    sampler = get_sampler("ar")
    out = sampler(model, [0, 1], seeds=[0, 1], on_step=lambda *args: calls.append(args))
    assert out.stats.forward_passes == len(calls) == len(model.scales) == 4
    assert (out.stats.tokens, out.stats.tokens_per_pass) == (30, 7.5)
    assert out.stats.lossless
    step, figures = calls[1]
    told = {name: figures[name] for name in ("finished", "total", "accepted")}
    assert (step, told) == (2, {"finished": 10, "total": 60, "accepted": [4, 4]})
    short = sampler(model, [0], seeds=[0], on_step=lambda step, figures: step == 2)
    assert torch.equal(short.tokens[0, :5], out.tokens[0, :5])
    assert short.tokens[0, 5:].eq(0).all()


def test_pruning_computes_fewer_tokens_and_none_of_the_coarse_ones_change(model):
    run = {"seeds": [0, 1], "guidance_scale": 2.0}
    plain = get_sampler("ar")(model, [0, 1], **run)
    pruned = get_sampler("ar", prune=0.5, prune_scales=1)(model, [0, 1], **run)
    assert pruned.stats.computed_tokens == 14 + 8 < plain.stats.computed_tokens == 30
    assert not pruned.stats.lossless
    assert torch.equal(pruned.tokens[:, :14], plain.tokens[:, :14])
    assert not torch.equal(pruned.tokens[:, 14:], plain.tokens[:, 14:])
    hardly = get_sampler("ar", prune=0.01)(model, [0, 1], **run)  # rounds to no token at all
    assert torch.equal(hardly.tokens, plain.tokens)


def test_more_smooth_mixes_codes(model):
    sampler = get_sampler("ar", more_smooth=True)
    out = sampler(model, [0], seeds=[0], guidance_scale=2.0)
    assert not out.stats.lossless
    assert out.embeddings is not None
    codes = model.tokenizer.look_up(out.tokens)
    assert out.embeddings.shape == codes.shape
    assert not torch.allclose(out.embeddings, codes)
    # The temperature of the mix is 0.005 at the last scale: nearly one code each, and codes mixed
    # of codes stay within their range.
    last = (out.embeddings - codes)[:, -16:].abs().amax(-1)
    assert last.median() < 1e-3
    assert model.decode(out.embeddings).shape == (1, 3, 16, 16)


def test_code_with_itself_as_draft_is_plain_sampling(model):
    run = {"seeds": [1, 2], "guidance_scale": 2.5}
    plain = get_sampler("ar")(model, [3, 4], **run)
    for count in (1, 2, 3):
        out = get_sampler("code", draft=model, draft_scales=count)(model, [3, 4], **run)
        assert torch.equal(out.tokens, plain.tokens)
        assert (out.stats.draft_passes, out.stats.forward_passes) == (count, 4)


def test_code_draws_the_coarse_scales_from_the_draft():
    large, small = ScaleTable(seed=0), ScaleTable(seed=1)
    sampler = get_sampler("code", draft=large, draft_scales=1)
    samples = draw_joint(sampler, small, SHORT, seed=7)
    mixed = ScaleTable(seed=1)
    mixed.tables[0] = large.tables[0]
    assert law_p_value(samples, mixed.joint(sampler.shaping())) > ALPHA
    assert law_p_value(samples, small.joint(sampler.shaping())) < ALPHA


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prune": 1.0}, "prune 1.0: expected a share"),
        ({"prune_scales": 0}, "prune_scales 0: expected an integer >= 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        get_sampler("ar", **options)


def test_what_does_not_fit_the_model(model):
    run = {"seeds": [0], "guidance_scale": 1.0}
    with pytest.raises(InputError, match=r"prune 0\.5: a token model has no such option"):
        get_sampler("ar", prune=0.5)(TableModel(), [None], **run)
    with pytest.raises(InputError, match="num_iter 4: a scale model has no such option"):
        get_sampler("ar", num_iter=4)(model, [0], **run)
    with pytest.raises(InputError, match="this model computes all tokens"):
        get_sampler("ar", prune=0.5)(ScaleTable(), [None], **run)
    with pytest.raises(InputError, match="this model has no codebook"):
        get_sampler("ar", more_smooth=True)(ScaleTable(), [None], **run)
    with pytest.raises(InputError, match="no draft: expected a scale model"):
        get_sampler("code")(model, [0], **run)
    with pytest.raises(InputError, match=r"the draft has scales \(1, 2\): expected \(1, 2, 3, 4\)"):
        get_sampler("code", draft=ScaleTable())(model, [0], **run)
    with pytest.raises(InputError, match="draft_scales 4: expected 1 to 3"):
        get_sampler("code", draft=model, draft_scales=4)(model, [0], **run)
    with pytest.raises(InputError, match="draft TableModel: expected"):
        get_sampler("code", draft=TableModel())
    with pytest.raises(InputError, match="2 seeds for 1 conditions"):
        get_sampler("ar")(model, [0], seeds=[0, 1])


def test_states_refuse_what_is_out_of_turn(model):
    state = model.start([0])
    with pytest.raises(StateError, match="feed before next"):
        state.feed(torch.zeros(1, 1, dtype=torch.int64))
    state.next()
    with pytest.raises(StateError, match="next before feed"):
        state.next()
    with pytest.raises(InputError, match=r"tokens \(1, 2\): expected \[1, 1\] at scale 0"):
        state.feed(torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(InputError, match=r"tokens must lie in 0\.\.63"):
        state.feed(torch.full((1, 1), 64))
    with pytest.raises(InputError, match="expected those of whole scales"):
        model.start([0]).catch_up(torch.zeros(1, 3, dtype=torch.int64))


def test_the_embedded_model(embedded):
    out = arvision.sample(embedded, ["sneaker", "boot"], seed=1, progress=False)
    assert out.stats.forward_passes == len(embedded.model.scales) == 6
    assert out.images[0].size == (32, 32)
    smooth = arvision.sample(embedded, "bag", seed=1, progress=False, more_smooth=True)
    assert smooth.tokens.shape == (1, 130)
    with pytest.raises(InputError, match="expected one of ar, code"):
        arvision.sample(embedded, "bag", "sjd", progress=False)


def test_the_embedded_model_draws_what_it_is_asked_for(embedded):
    """The card says 0.989 of 1,000; 200 leave room for their standard error of 0.01."""
    labels = torch.arange(200) % 10
    assert float(class_consistency(draw(embedded, labels.tolist()), labels)) >= 0.95
