"""Score distillation against closed forms: the denoised mean, and a law that a student must reach."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import arvision.training.score_distill as module
from arvision.decoding.logits import Shaping
from arvision.decoding.student import nearest_code
from arvision.models import (
    VAR,
    LlamaGenStudent,
    VARStudent,
    VARTokenizer,
    VARTransformer,
)
from arvision.pipeline import ARPipeline
from arvision.testing import tiny_llamagen
from arvision.training.distill_objective import Described
from arvision.training.loop import FitConfig, fit
from arvision.training.pairs import pair_noise
from arvision.training.score_distill import (
    ScoreObjective,
    ScoreSettings,
    TeacherScores,
    TrainedFeatures,
    denoised_mean,
)

CODES = torch.tensor([[1.0, 0.0], [-0.5, 0.9], [-0.5, -0.9], [0.2, 0.3]])


def test_denoised_mean_is_bayes():
    """Against a sum over codes with densities from torch."""
    logp = torch.randn(6, 4).log_softmax(-1)
    logp[0, 2] = -torch.inf
    x, t = torch.randn(6, 2), torch.rand(6) * 0.9 + 0.05
    for row in range(6):
        around = torch.distributions.Normal((1 - t[row]) * CODES, t[row])
        weight = logp[row].exp() * around.log_prob(x[row]).sum(-1).exp()
        expected = (weight[:, None] * CODES).sum(0) / weight.sum()
        found = denoised_mean(logp[row], CODES, x[row], t[row])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


FIRST = torch.tensor([[0.6, 0.2, 0.15, 0.05], [0.05, 0.15, 0.2, 0.6]])
SECOND = torch.tensor(
    [[0.1, 0.7, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1], [0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]]
)
"""Two classes; the second token depends on the first."""


def toy_scores(labels, tokens):
    logp = torch.stack([FIRST[labels], SECOND[tokens[:, 0]]], dim=1).log()
    features = torch.zeros(len(labels), 2, 6)
    features[torch.arange(len(labels)), 0, labels] = 1
    features[torch.arange(len(labels)), 1, 2 + tokens[:, 0]] = 1
    return logp, features


class ToyStudent(nn.Module):
    """Each vector from the class and the noise up to its place."""

    def __init__(self):
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(
                nn.Linear(2 + 2 * (k + 1), 128),
                nn.SiLU(),
                nn.Linear(128, 128),
                nn.SiLU(),
                nn.Linear(128, 2),
            )
            for k in range(2)
        )

    def forward(self, labels, noise, known):
        one_hot = nn.functional.one_hot(labels, 2).float()
        parts = []
        for k, net in enumerate(self.nets):
            seen = torch.cat([one_hot, noise[:, : k + 1].flatten(1)], dim=1)
            parts.append(0.5 * noise[:, k] + net(seen))
        return None, torch.stack(parts, dim=1)


def joint(student, num=8000):
    """Law of both tokens for each class, [2, 16]."""
    images = torch.arange(num)
    labels = images % 2
    with torch.no_grad():
        vectors = student(labels, pair_noise(7, images, 2, 2), None)[1]
    tokens = nearest_code(vectors, CODES)
    counts = torch.zeros(2, 16)
    counts.index_put_((labels, tokens[:, 0] * 4 + tokens[:, 1]), torch.ones(num), accumulate=True)
    return counts / counts.sum(1, keepdim=True)


GOAL = (FIRST[:, :, None] * SECOND[None]).flatten(1)


def train(tmp_path, steps=450):
    torch.manual_seed(0)
    student = ToyStudent()
    before = 0.5 * float((joint(student) - GOAL).abs().sum(1).mean())
    settings = ScoreSettings(warmup=100, guidance_updates=2, student_rate=0.5, width=64, depth=2)
    objective = ScoreObjective(student, toy_scores, CODES, (2, 2, 6), settings)
    config = FitConfig(
        steps=steps,
        batch_size=128,
        learning_rate=4e-3,
        warmup=20,
        weight_decay=0.0,
        betas=(0.0, 0.95),
        save_every=10_000,
        average_decay=0.98,
    )
    fit(objective, config, tmp_path / "run", progress=False)
    return before, 0.5 * float((joint(student) - GOAL).abs().sum(1).mean())


def test_a_student_moves_to_the_joint_law(tmp_path):
    """Total variation of the joint law, as far as seconds of training take it."""
    before, after = train(tmp_path)
    assert before > 0.5
    assert after < 0.36


def test_the_score_matters(tmp_path, monkeypatch):
    """With the teacher's score of uniform laws instead, the law is missed."""
    right = module.denoised_mean
    monkeypatch.setattr(
        module, "denoised_mean", lambda logp, *rest: right(torch.zeros_like(logp), *rest)
    )
    assert train(tmp_path)[1] > 0.45


def test_nothing_moves_the_student_before_the_guidance_is_warm(tmp_path):
    student = ToyStudent()
    kept = [parameter.clone() for parameter in student.parameters()]
    objective = ScoreObjective(
        student, toy_scores, CODES, (2, 2, 6), ScoreSettings(warmup=5, width=16, depth=1)
    )
    config = FitConfig(steps=5, batch_size=8, weight_decay=0.0)
    fit(objective, config, tmp_path / "run", progress=False)
    assert all(map(torch.equal, kept, student.parameters()))


@pytest.mark.parametrize("kind", ["llamagen", "captions", "var"])
def test_the_guidance_network_learns_as_a_whole(kind):
    """Its trunk gives the teacher's features at first, and moves; the teacher and its head do not."""
    if kind == "var":
        net = VARTransformer(
            patch_nums=(1, 2), codebook_size=8, z_channels=4, hidden_size=16, num_layers=1,
            num_heads=2, num_classes=3,
        )  # fmt: skip
        tokenizer = VARTokenizer(
            patch_nums=(1, 2), codebook_size=8, z_channels=4, ch=32, ch_mult=(1,), num_res_blocks=1
        )
        model, num = VAR(net, tokenizer), 5
    else:
        captions = {"num_classes": None, "caption_dim": 8, "caption_length": 4}
        model = tiny_llamagen((2, 2), **(captions if kind == "captions" else {}))
        num = 4
    vocab = model.vocab_size
    conditions = [torch.randn(2, 8), torch.randn(3, 8)] if kind == "captions" else range(2)
    scores = TeacherScores(model, Shaping(), 1.0, conditions)
    family: Any = VARStudent if kind == "var" else LlamaGenStudent
    student = family.from_teacher(model, (0,))
    described = Described(student, conditions)
    trunk = TrainedFeatures(model)
    labels, tokens = torch.tensor([0, 1]), torch.randint(vocab, (2, num))
    condition, *mask = described(labels)
    given = scores(labels, tokens)[1]
    torch.testing.assert_close(trunk(tokens, condition, *mask), given, rtol=1e-3, atol=1e-4)
    settings = ScoreSettings(warmup=2, guidance_updates=1, width=16, depth=1)
    objective = ScoreObjective(
        student.transformer,
        scores,
        student.codebook.detach(),
        (num, 2, given.shape[-1]),
        settings,
        described=described,
        trunk=trunk,
    )
    kept = {name: p.detach().clone() for name, p in objective.named_parameters()}
    teacher = {name: p.detach().clone() for name, p in model.transformer.named_parameters()}
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.1)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        objective(torch.arange(4), generator)["loss"].backward()
        optimizer.step()
        objective.after_step(step)
    moved = {n for n, p in objective.named_parameters() if not torch.equal(p, kept[n])}
    assert any(name.startswith("trunk.network") for name in moved)
    assert any(name.startswith("student.") for name in moved)
    assert all(torch.equal(p, teacher[n]) for n, p in model.transformer.named_parameters())
    assert objective.rate_share("trunk.network.norm.weight") == settings.feature_rate


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Under `accelerate launch`: one student, figures from the main process alone."""
    teacher, first = tmp_path / "tiny", tmp_path / "one"
    ARPipeline.from_model(tiny_llamagen((2, 2)), guidance_scale=1.0).save_pretrained(teacher)
    options = "--num-pairs 40 --num-held-out 10 --steps 4 --batch-size 8 --timesteps 0 --quiet"
    options += " --score-steps 4 --method dd2 --card-samples 4"
    launch = "-m accelerate.commands.launch --cpu --num_processes 2 --num_machines 1"
    launch += " --mixed_precision no --dynamo_backend no --main_process_port 29611 -m arvision.cli"
    command = f"{launch} distill --teacher {teacher} --out {first} {options}"
    done = subprocess.run(
        [sys.executable, *command.split()], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (first / "tiny-dd" / "card.json").exists()
    assert (first / "dd2" / "checkpoint.pt").exists()
