"""Distilling a draft: divergences, calibration, and a whole miniature run that resumes."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from arvision import InputError, get_sampler
from arvision.decoding.draft_model import Calibration
from arvision.decoding.teacher_forcing import teacher_forced
from arvision.models.llamagen import LlamaGen, LlamaGenTransformer
from arvision.testing import tiny_llamagen
from arvision.training.llamagen_draft import (
    DIVERGENCES,
    DraftObjective,
    DraftTraining,
    calibrate,
    divergence,
    measure,
    train_draft,
)
from arvision.training.llamagen_samples import Drawn, draw_from_target
from arvision.training.llamagen_text import build_text_encoder, build_text_tokenizer
from arvision.training.loop import Chance, FitConfig

SMALL = FitConfig(steps=12, batch_size=16, learning_rate=5e-3, warmup=2, save_every=6, log_every=6)


@pytest.fixture(scope="module")
def target():
    return tiny_llamagen(grid=(4, 4), sharpness=2.0)


@pytest.fixture(scope="module")
def training():
    return DraftTraining(
        sizes={"hidden_size": 16, "num_layers": 1, "intermediate_size": 16},
        samples={3.0: 96, 1.0: 64},
        held_out=32,
        batch_size=32,
        start_fit=SMALL,
        pilot_fit=SMALL,
        final_fit=SMALL,
    )


def test_divergences():
    torch.manual_seed(3)
    logp, logq = torch.randn(5, 7).log_softmax(-1), torch.randn(5, 7).log_softmax(-1)
    p, q = (
        torch.distributions.Categorical(logits=logp),
        torch.distributions.Categorical(logits=logq),
    )
    kl = torch.distributions.kl_divergence
    torch.testing.assert_close(divergence("forward_kl", logp, logq), kl(p, q))
    torch.testing.assert_close(divergence("reverse_kl", logp, logq), kl(q, p))
    overlap = torch.minimum(logp, logq).exp().sum(-1)
    torch.testing.assert_close(divergence("total_variation", logp, logq), 1 - overlap)
    for name in DIVERGENCES:
        assert divergence(name, logp, logp).abs().max() < 1e-6


def test_samples_are_those_of_plain_sampling_with_their_laws(target, tmp_path):
    drawn = draw_from_target(target, tmp_path, {3.0: 20}, batch_size=8, progress=False)
    seeds = [(k, 3000) for k in range(20)]
    plain = get_sampler("ar")(target, drawn.labels.tolist(), seeds=seeds, guidance_scale=3.0)
    assert torch.equal(drawn.tokens, plain.tokens)
    torch.testing.assert_close(
        drawn.logp.float().exp().sum(-1), torch.ones(20, 16), atol=1e-2, rtol=0
    )
    # The target itself has these very laws along its samples.
    own = DraftObjective(target.transformer, drawn, "forward_kl")
    with torch.no_grad():
        figures = own(torch.arange(20), torch.Generator())
    assert figures["acceptance"] > 0.999
    again = draw_from_target(target, tmp_path, {3.0: 20}, batch_size=8, progress=False)
    assert torch.equal(again.logp, drawn.logp)


def test_calibration_recovers_a_logistic_law():
    torch.manual_seed(4)
    features = torch.cat([torch.ones(20_000, 1), torch.randn(20_000, 3)], dim=1)
    weights = torch.tensor([0.5, 1.0, -2.0, 0.3])
    found = calibrate(features, (features @ weights).sigmoid().bernoulli())
    torch.testing.assert_close(torch.tensor(found), weights, atol=0.08, rtol=0)


def test_a_whole_run_and_its_resumption(target, training, tmp_path):
    done = train_draft(target, tmp_path, training, progress=False)
    figures = done.figures
    assert set(figures["pilots"]) == {"forward_kl", "reverse_kl", "total_variation"}
    assert figures["divergence"] in DIVERGENCES
    assert figures["parameters"] == done.transformer.num_parameters()
    assert set(figures["acceptance"]) == {
        f"{coupling} at guidance {scale}"
        for coupling in ("gumbel", "independent")
        for scale in (1, 3)
    }
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    Calibration(done.calibration)
    # The final run was cut short: only its missing steps are made again, and they come out the same.
    (tmp_path / "final" / "checkpoint.pt").unlink()
    before = (tmp_path / "start" / "checkpoint.pt").stat().st_mtime_ns
    again = train_draft(target, tmp_path, training, progress=False)
    assert (tmp_path / "start" / "checkpoint.pt").stat().st_mtime_ns == before
    for ours, theirs in zip(
        done.transformer.parameters(), again.transformer.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_training_makes_drafts_more_acceptable(target, tmp_path):
    drawn = draw_from_target(target, tmp_path, {3.0: 64}, batch_size=64, progress=False)
    for name in DIVERGENCES:
        draft = tiny_llamagen(grid=(4, 4), sharpness=2.0, seed=1, num_layers=1).transformer
        objective = DraftObjective(draft, drawn, name)
        optimizer = torch.optim.Adam(draft.parameters(), lr=1e-2)
        every, losses, overlaps = torch.arange(64), [], []
        for _ in range(15):
            figures = objective(every, torch.Generator())
            optimizer.zero_grad()
            figures["loss"].backward()
            optimizer.step()
            losses.append(float(figures["loss"].detach()))
            overlaps.append(float(figures["acceptance"]))
        assert losses[-1] < losses[0]
        assert overlaps[-1] > overlaps[0]


def test_bad_input(target, training, tmp_path):
    with pytest.raises(InputError, match=r"unknown divergence 'kl': .*expected one of forward_kl"):
        DraftTraining(divergences=("kl",))
    with pytest.raises(InputError, match="expected more samples than held out"):
        DraftTraining(samples={1.0: 256})
    drawn = draw_from_target(target, tmp_path, {1.0: 4}, batch_size=4, progress=False)
    with pytest.raises(InputError, match="unknown divergence 'tv'"):
        DraftObjective(target.transformer, drawn, "tv")
    with pytest.raises(InputError, match="4 laws over 64 tokens: expected"):
        DraftObjective(tiny_llamagen(grid=(2, 2)).transformer, drawn, "forward_kl")
    text = tiny_llamagen(num_classes=None, caption_dim=8, caption_length=4)
    with pytest.raises(InputError, match="conditions: expected captions with a text-conditional"):
        train_draft(text, tmp_path, training)
    with pytest.raises(InputError, match="on_policy 2: expected a share"):
        DraftTraining(on_policy=2)
    with pytest.raises(InputError, match="unknown coupling 'greedy'"):
        DraftTraining(coupling="greedy")


CAPTIONS = ["a dark boot", "a light bag", "a tee"]


@pytest.fixture(scope="module")
def text_target():
    model = tiny_llamagen((4, 4), sharpness=2.0, num_classes=None, caption_dim=16, caption_length=6)
    words = build_text_tokenizer()
    encoder = build_text_encoder(len(words), 16, 0)
    return LlamaGen(model.transformer, model.tokenizer, encoder, words)


def test_a_draft_of_captions_with_samples_of_its_own(text_target, training, tmp_path):
    once = dataclasses.replace(
        training, conditions=CAPTIONS, on_policy=0.5, divergences=("reverse_kl",), samples={3.0: 96}
    )
    done = train_draft(text_target, tmp_path, once, progress=False)
    assert done.figures["on_policy"] == 0.5
    draft = LlamaGen(done.transformer, None, *_texts(text_target))
    out = get_sampler("draft", max_draft=3).bind(draft=draft)(
        text_target, CAPTIONS[:2], seeds=[0, 1], guidance_scale=3.0
    )
    plain = get_sampler("ar")(text_target, CAPTIONS[:2], seeds=[0, 1], guidance_scale=3.0)
    assert torch.equal(out.tokens, plain.tokens), "exact under Gumbel coupling"
    # A trained draft is accepted more often than one with the start's weights.
    drawn = draw_from_target(
        text_target, tmp_path, {3.0: 32}, batch_size=32, progress=False, conditions=CAPTIONS
    )
    torch.manual_seed(0)
    sizes = {k: v for k, v in done.transformer.config.items() if not k.startswith("_")}
    fresh = LlamaGenTransformer(**sizes)
    found = [
        float(measure(net, drawn, 0, text_target, CAPTIONS)["independent"]["acceptance"].mean())
        for net in (fresh, done.transformer)
    ]
    assert found[1] > found[0]


def _texts(model):
    return model.captions.text_encoder, model.captions.text_tokenizer


def test_own_samples_are_the_drafts_and_carry_the_targets_laws(target):
    draft = tiny_llamagen(grid=(4, 4), sharpness=2.0, seed=1, num_layers=1)
    drawn = Drawn(
        torch.zeros(4, 16, dtype=torch.int64),
        torch.zeros(4, 16, 64),
        torch.tensor([0, 1, 2, 0]),
        torch.tensor([3.0, 1.0, 3.0, 1.0]),
    )
    objective = DraftObjective(draft.transformer, drawn, "forward_kl", target, on_policy=1.0)
    own = objective._own(drawn, Chance(torch.Generator().manual_seed(1), torch.device("cpu")))
    assert own.scales.tolist() == [1.0, 1.0, 3.0, 3.0]
    assert own.labels.tolist() == [1, 0, 0, 2]
    numbers = torch.randint(1 << 31, (4,), generator=torch.Generator().manual_seed(1)).tolist()
    plain = get_sampler("ar")(draft, [0, 2], seeds=[numbers[0], numbers[2]], guidance_scale=3.0)
    assert torch.equal(own.tokens[2:], plain.tokens)
    laws = teacher_forced(target, [0, 2], plain.tokens, 3.0).log_softmax(-1)
    torch.testing.assert_close(own.logp[2:], laws.clamp(min=-40.0))
