"""Distilling a draft: divergences, calibration, and a whole miniature run that resumes."""

from __future__ import annotations

import json

import pytest
import torch

from arvision import InputError, get_sampler
from arvision.decoding.draft_model import Calibration
from arvision.testing import tiny_llamagen
from arvision.training.llamagen_draft import (
    DIVERGENCES,
    DraftObjective,
    DraftTraining,
    calibrate,
    divergence,
    train_draft,
)
from arvision.training.llamagen_samples import draw_from_target
from arvision.training.loop import FitConfig

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
    with pytest.raises(InputError, match="expected a class-conditional model"):
        train_draft(text, tmp_path, training)
