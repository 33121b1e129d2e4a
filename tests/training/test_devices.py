"""Training where the module is not on the CPU: every objective, in the runs that its user starts.

The device of `elsewhere` refuses to mix its tensors with the CPU's, and computes what the CPU does:
so each run must end with the very weights and figures of a run on the CPU.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from accelerate import PartialState
from elsewhere import ELSEWHERE, Elsewhere, There, outside
from text_models import random_prompts, tiny_llama

import arvision
from arvision.models import MAR, VAR, VARTokenizer, VARTransformer
from arvision.networks import place_of
from arvision.pipeline import ARPipeline
from arvision.testing import tiny_llamagen
from arvision.text.fitting.data import Answers, answer
from arvision.text.fitting.eagle3 import Eagle3Training, train_eagle3
from arvision.text.fitting.heads import HeadTraining, train_heads
from arvision.text.fitting.judge import JudgedTokens, JudgeObjective
from arvision.text.fitting.pseudo import PseudoTraining, train_pseudo
from arvision.text.fitting.small_model import SmallTraining, train_small_model
from arvision.text.rules.lossy import JudgeHead
from arvision.training import stages
from arvision.training.distill import DistillSettings, distill
from arvision.training.llamagen_draft import DraftTraining, train_draft
from arvision.training.loop import FitConfig, Objective, fit
from arvision.training.mar_draft import MAR_DRAFT_RECIPES
from arvision.training.recipes import RECIPES
from arvision.training.score_distill import ScoreSettings
from arvision.training.stages import Work

FIT = FitConfig(steps=3, batch_size=4, learning_rate=1e-4, warmup=1, log_every=1, average_decay=0.9)

COUNTS = ("agreement", "agreement_known", "codes_used", "right")
"""Figures that count."""


@pytest.fixture(autouse=True)
def pictures(monkeypatch):
    """Invented garments in place of the data set."""
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(32, 32, 32, dtype=torch.uint8)
    for image in images:
        half = int(torch.randint(4, 14, (), generator=generator))
        image[4:28, 16 - half : 16 + half] = int(torch.randint(60, 255, (), generator=generator))
    content = (images, torch.arange(32) % 10)
    monkeypatch.setattr("arvision.training.stages.load_fashion", lambda split: content)


@pytest.fixture
def both(tmp_path):
    """Runs work on the CPU and elsewhere; compares the logs and weights of every stage of it."""

    def run(work) -> None:
        work(tmp_path / "here")
        state = PartialState()
        home = state.device
        try:
            state.device = ELSEWHERE
            with Elsewhere():
                work(tmp_path / "there")
        finally:
            state.device = home
        logs = sorted((tmp_path / "here").rglob("log.jsonl"))
        assert logs
        for path in logs:
            twin = tmp_path / "there" / path.relative_to(tmp_path / "here")
            ours, theirs = ([json.loads(line) for line in p.open()] for p in (path, twin))
            for here, there in zip(ours, theirs, strict=True):
                for name in here.keys() - {"seconds"}:
                    # Other kernels round otherwise, which may turn a code or a guess or two.
                    slack = 0.2 if name in COUNTS else 0.02
                    wanted = pytest.approx(here[name], rel=slack, abs=slack, nan_ok=True)
                    assert there[name] == wanted, (path, name)

    return run


def test_the_device_refuses_what_an_accelerator_refuses():
    with Elsewhere():
        there = torch.ones(3).to(ELSEWHERE)
        with pytest.raises(RuntimeError, match="same device"):
            _ = there + torch.ones(3)
        with pytest.raises(RuntimeError, match="same device"):
            torch.ones(3)[torch.tensor([0, 1]).to(ELSEWHERE)]
        assert (there * 2 + torch.tensor(1)).tolist() == [3.0] * 3
        assert isinstance(torch.zeros(2, device=ELSEWHERE), There)
        moved = there.cpu()
        moved += 1
        assert there.tolist() == [1.0] * 3


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "var-fashion-small"])
def test_recipes(name, both):
    recipe = RECIPES[name].shortened(2, 32, batch_size=4, mixed_precision="no")
    both(lambda folder: recipe.run(folder, progress=False))


def test_tokenizers_whose_codebook_follows(both):
    """Past the steps without a codebook."""

    def work(folder):
        for name in ("llamagen-fashion", "var-fashion"):
            recipe = RECIPES[name].shortened(4, 32, batch_size=4, mixed_precision="no")
            stage = recipe.stages[0]
            torch.manual_seed(0)
            objective: Any = stage.objective(Work(*stages.load_fashion("train")))
            objective.unquantised_steps = 1
            fit(objective, stage.fit, folder / name, progress=False)

    both(work)


def test_the_draft_of_mar(both):
    def work(folder):
        recipe = RECIPES["mar-fashion"].shortened(1, 32, batch_size=4, mixed_precision="no")
        parts = recipe.run(folder / "target", progress=False)
        target = MAR(parts["transformer"], parts["tokenizer"])
        draft = MAR_DRAFT_RECIPES["mar-fashion-draft"]
        draft = draft.shortened(2, 32, batch_size=4, mixed_precision="no")
        draft.run(folder / "draft", target=target, progress=False)

    both(work)


def test_the_draft_of_llamagen(both):
    training = DraftTraining(
        sizes={"hidden_size": 16, "num_layers": 1, "intermediate_size": 16},
        samples={3.0: 24, 1.0: 16},
        held_out=8,
        batch_size=8,
        start_fit=FIT,
        pilot_fit=FIT,
        final_fit=FIT,
    )
    target = tiny_llamagen(grid=(3, 3), sharpness=2.0)
    both(lambda folder: train_draft(target, folder, training, progress=False))


def tiny_var():
    """A randomly initialised VAR with 3 classes and 16 codes."""
    torch.manual_seed(0)
    sizes = {"patch_nums": (1, 2, 3), "codebook_size": 16, "z_channels": 8}
    transformer = VARTransformer(
        num_classes=3, hidden_size=32, num_layers=2, num_heads=2, shared_aln=True, **sizes
    )
    return VAR(transformer.eval(), VARTokenizer(ch=32, ch_mult=(1, 1), **sizes).eval())


@pytest.mark.parametrize("teacher", [lambda: tiny_llamagen(grid=(3, 3), sharpness=3.0), tiny_var])
def test_distillation(teacher, both, tmp_path, monkeypatch):
    for module in ("distill", "students"):
        monkeypatch.setattr(f"arvision.training.{module}.load", outside(arvision.load))
    pipe = ARPipeline.from_model(teacher(), guidance_scale=1.5)
    pipe.save_pretrained(tmp_path / "tiny")
    settings = DistillSettings(
        num_pairs=24,
        num_held_out=8,
        shard_size=16,
        num_card=4,
        sheet_every=3,
        fit=FIT,
        score_fit=FIT,
        picture_weight=0.5,
        score=ScoreSettings(warmup=1, guidance_updates=2, width=8, depth=1),
    )
    both(lambda out: distill(tmp_path / "tiny", out, settings, method="dd2", progress=False))


@pytest.mark.parametrize("kind", ["heads", "ppd", "hidden_transfer", "model", "eagle3"])
def test_drafts_of_text(kind, both, monkeypatch):
    # Weights "on the meta device" are refused where they are not loaded; here they are.
    monkeypatch.setattr("arvision.text.model.device_of", place_of)
    texts = answer(tiny_llama(), random_prompts([6] * 6, seed=9), num_tokens=20, progress=False)

    def work(folder):
        network: Any = tiny_llama()
        if folder.name == "there":
            network.to(ELSEWHERE)
        if kind == "heads":
            training = HeadTraining(num_heads=2, num_vocabulary=50, fit=FIT)
            train_heads(network, texts, folder, training, progress=False)
        elif kind == "model":
            small = SmallTraining(share=0.5, on_policy=0.5, fit=FIT, pretrain_fit=FIT)
            blocks = torch.tensor([text[:20] for text in texts.texts])
            train_small_model(network, None, texts, folder, small, blocks=blocks, progress=False)
        elif kind == "eagle3":
            training = Eagle3Training(num_vocabulary=50, fit=FIT)
            train_eagle3(network, texts, folder, training, progress=False)
        else:
            training = PseudoTraining(kind=kind, num_guesses=2, length=24, fit=FIT)
            train_pseudo(network, texts, folder, training, progress=False)

    both(work)


def test_a_device_is_kept_though_accelerate_would_choose_another(tmp_path):
    """A target on the CPU is fitted there, on a machine with an accelerator, too."""
    state = PartialState()
    home = state.device
    network = tiny_llama()
    texts = random_prompts([20] * 6, seed=9)
    answers = Answers(texts, [6] * 6)
    try:
        state.device = ELSEWHERE
        with Elsewhere():
            training = HeadTraining(num_heads=2, num_vocabulary=50, fit=FIT)
            train_heads(network, answers, tmp_path, training, progress=False)
    finally:
        state.device = home


def test_the_judge(both):
    generator = torch.Generator().manual_seed(0)
    tokens = JudgedTokens(
        torch.randn(40, 8, generator=generator), (torch.arange(40) % 3 > 0).float()
    )

    def work(folder):
        torch.manual_seed(0)
        head = JudgeHead(8)
        fit(JudgeObjective(head, tokens), FIT, folder, progress=False)
        assert bool((head(tokens.hidden) > 0).any())  # back on the CPU

    both(work)


def test_no_objective_is_forgotten():
    """Every objective of the package is trained by a test above."""

    def known(cls):
        return {cls.__name__} | {name for sub in cls.__subclasses__() for name in known(sub)}

    assert {name for name in known(Objective) if not name.startswith("_")} == {
        "Objective",
        "CodebookObjective",  # the base of the two below
        "TokenizerObjective",
        "VARTokenizerObjective",
        "ClassObjective",
        "CaptionObjective",
        "ConsistencyObjective",
        "DraftObjective",
        "VARClassObjective",
        "BitTokenizerObjective",
        "BitCaptionObjective",
        "AutoencoderObjective",
        "MARObjective",
        "MARDraftObjective",
        "DistillObjective",
        "ScoreObjective",
        "HeadObjective",
        "PseudoObjective",
        "SmallModelObjective",
        "PretrainObjective",
        "ParallelObjective",
        "JudgeObjective",
        "Eagle3Objective",
    }
