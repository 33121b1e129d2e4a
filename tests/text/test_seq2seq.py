"""Encoder-decoder models: the tokens of `model.generate`, whatever drafts them, and the exact law."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from text_models import random_prompts, text_folder, tiny_llama
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

import arvision
from arvision import InputError
from arvision.errors import StateError
from arvision.testing import law_p_value
from arvision.text.drafters import ParallelDraft
from arvision.text.fitting.data import answer
from arvision.text.fitting.parallel import ParallelTraining, shallow_copy, train_parallel
from arvision.text.generation import drafter_of
from arvision.text.seq2seq import Seq2SeqLM
from arvision.training.loop import FitConfig

DRAFTERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (None, {}),
    "input_copy": ("input_copy", {}),
    "lookup": ("prompt_lookup", {"max_branches": 1}),
    "draft_model": ("draft_model", {"expansion": "chain"}),
}


def tiny(kind, seed=0, vocab_size=64, sharpness=4.0):
    """A randomly initialised T5 or BART of a few thousand parameters, float64."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "t5":
            network: Any = T5ForConditionalGeneration(
                T5Config(
                    vocab_size=vocab_size, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4,
                    decoder_start_token_id=0, pad_token_id=0, eos_token_id=None,
                )
            )  # fmt: skip
        else:
            network = BartForConditionalGeneration(
                BartConfig(
                    vocab_size=vocab_size, d_model=32, encoder_layers=2, decoder_layers=3,
                    encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
                    decoder_ffn_dim=64, max_position_embeddings=64, decoder_start_token_id=2,
                    pad_token_id=1, bos_token_id=0, eos_token_id=None, forced_eos_token_id=None,
                )
            )  # fmt: skip
        for name, parameter in network.named_parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.5 if "shared" not in name else 1.0)
        network.get_output_embeddings().weight.data.mul_(sharpness / 4)
    return network.eval().double()


def reference(network, ids, num):
    """What transformers generates greedily, new ids only."""
    out = network.generate(torch.tensor([ids]), max_new_tokens=num, do_sample=False, num_beams=1)
    return out[0, 1:].tolist()


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("name", sorted(DRAFTERS))
def test_greedy_tokens_are_those_of_transformers(kind, name):
    network = tiny(kind)
    drafter, options = DRAFTERS[name]
    if name == "draft_model":
        options = options | {"draft": network}
    prompts = random_prompts([9, 5, 12])
    out = arvision.generate(
        network, prompts, drafter=drafter, drafter_options=options, max_new_tokens=20
    )
    assert out.tokens == [reference(network, ids, 20) for ids in prompts]
    assert out.stats.lossless
    if name == "draft_model":
        assert out.stats.tokens_per_pass > 3.0


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_the_generation_config_acts_as_in_transformers(kind):
    network = tiny(kind)
    prompt = random_prompts([9])[0]
    network.generation_config.no_repeat_ngram_size = 2
    network.generation_config.forced_bos_token_id = 7
    network.generation_config.eos_token_id = reference(network, prompt, 20)[12]
    found = arvision.generate(network, [prompt], drafter="input_copy", max_new_tokens=20)
    assert found.tokens == [reference(network, prompt, 20)]
    assert found.tokens[0][0] == 7
    assert len(found.tokens[0]) < 20


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_a_state_answers_as_a_plain_pass_does(kind):
    """Rows of different lengths, candidates forgotten, a row that leaves."""
    network = tiny(kind)
    prompts = random_prompts([9, 5])
    state, first = Seq2SeqLM(network, 20).start(prompts)
    texts: list[list[int]] = [[], []]

    def wanted(row, fed):
        before = [network.config.decoder_start_token_id, *texts[row], *fed]
        with torch.no_grad():
            return network(
                input_ids=torch.tensor([prompts[row]]), decoder_input_ids=torch.tensor([before])
            ).logits[0, len(texts[row]) :]

    for row in range(2):
        torch.testing.assert_close(first[row], wanted(row, [])[0])
    for fed, counts in (([[4, 5, 6], [7, 8, 9]], [3, 1]), ([[10, 11], [12, 13]], [0, 2])):
        state.extend(torch.tensor(fed).flip(1))
        logits = state.extend(torch.tensor(fed))
        for row in range(2):
            torch.testing.assert_close(logits[row], wanted(row, fed[row])[1:])
            texts[row] += fed[row][: counts[row]]
        state.commit(torch.arange(3).expand(2, 3)[:, : len(fed[0])], torch.tensor(counts))
    state.select(torch.tensor([1]))
    texts, prompts = texts[1:], prompts[1:]
    torch.testing.assert_close(state.extend(torch.tensor([[3, 4]]))[0], wanted(0, [3, 4])[1:])
    with pytest.raises(StateError, match="each kept candidate must follow its parent"):
        state.commit(torch.tensor([[1]]), torch.tensor([1]))


def test_a_rule_judges_drawn_drafts_exactly():
    sizes = {"vocab_size": 4, "sharpness": 0.4}
    network, draft = tiny("bart", **sizes), tiny("bart", seed=1, **sizes)
    texts = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    before = torch.cat([torch.full((16, 1), 2), texts[:, :1]], dim=1)
    with torch.no_grad():
        source = torch.tensor([[1, 3, 2]]).expand(16, -1)
        logp = network(input_ids=source, decoder_input_ids=before).logits.log_softmax(-1)
    joint = logp.gather(2, texts[..., None])[..., 0].sum(1).exp()
    out = arvision.generate(
        network,
        [[1, 3, 2]] * 150,
        drafter="draft_model",
        drafter_options={"draft": draft, "expansion": "independent", "branching": (1,)},
        rule="independent",
        temperature=1.0,
        max_new_tokens=2,
    )
    assert out.stats.lossless
    found = (torch.tensor(out.tokens) * torch.tensor([4, 1])).sum(1)
    assert law_p_value(found, joint) > 1e-5


def test_a_parallel_draft_learns_and_keeps_the_text(tmp_path):
    """Trained on the target's own answers, against the same draft untrained, on prompts not seen."""
    network = tiny("bart").float()
    prompts, unseen = random_prompts([8] * 30, seed=9), random_prompts([8] * 5, seed=10)
    answers = answer(network, prompts, num_tokens=24, batch_size=30, progress=False)
    assert answers.texts[2] == prompts[2] + reference(network, prompts[2], 24)
    fit = FitConfig(steps=120, batch_size=16, learning_rate=1e-2, warmup=5)
    training = ParallelTraining(num_places=4, fit=fit)
    tokenizer = AutoTokenizer.from_pretrained(text_folder(tmp_path / "letters"))
    figures = train_parallel(
        network, tokenizer, answers, tmp_path / "draft", training, progress=False
    )
    assert len(figures["agreement"]) == 4
    fresh = shallow_copy(network, training.share).eval()
    assert fresh.config.decoder_layers == 1
    expected = [reference(network, ids, 20) for ids in unseen]
    passes = []
    for options in ({"draft": fresh, "num_draft": 4}, {"folder": tmp_path / "draft"}):
        out = arvision.generate(
            network, unseen, drafter="parallel", drafter_options=options, max_new_tokens=20
        )
        assert out.tokens == expected
        passes.append(out.stats.tokens_per_pass)
    assert passes[1] > passes[0] + 1.0
    assert drafter_of(tmp_path / "draft") == ("parallel", "folder")
    drawn = {"temperature": 0.8, "max_new_tokens": 12, "seed": 3}
    plain = arvision.generate(network, unseen[:2], **drawn)
    found = arvision.generate(
        network, unseen[:2], drafter="parallel", drafter_options=options, **drawn
    )
    assert found.tokens == plain.tokens


def test_bad_input_has_one_clear_message():
    network, ids = tiny("bart"), random_prompts([9])
    with pytest.raises(InputError, match="PromptLookup drafts trees, and BartForConditional"):
        arvision.generate(network, ids, drafter="prompt_lookup", max_new_tokens=8)
    with pytest.raises(InputError, match="the model has 64 positions"):
        arvision.generate(network, ids, max_new_tokens=64)
    with pytest.raises(InputError, match="LayerSkip drafts trees"):
        arvision.generate(network, ids, drafter="layer_skip", max_new_tokens=8)
    with pytest.raises(InputError, match="has an encoder: expected"):
        network.generate(torch.tensor(ids), custom_generate=arvision.custom_generate)
    state, _ = Seq2SeqLM(network, 8).start(ids)
    with pytest.raises(InputError, match="takes chains of candidates, and these branch"):
        state.extend(torch.tensor([[1, 2]]), torch.tensor([-1, -1]))
    with pytest.raises(InputError, match="a folder or a network: expected one of the two"):
        ParallelDraft()
    with pytest.raises(InputError, match="expected an encoder-decoder target of as many"):
        arvision.generate(tiny_llama(), ids, drafter=ParallelDraft(draft=network), max_new_tokens=8)
    with pytest.raises(InputError, match="expected an encoder-decoder language"):
        Seq2SeqLM(torch.nn.Linear(2, 2), 8)
