"""Drafts on the parts of a long prompt that matter (RAPID): retrieval, and the enriched target's law."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from text_models import greedy_reference, random_prompts, text_folder, tiny_llama
from transformers import AutoTokenizer, BertConfig, BertModel

import arvision
from arvision import InputError
from arvision.decoding.logits import Shaping
from arvision.decoding.loop import FixedWindow, decode_tokens
from arvision.decoding.run import Run
from arvision.testing import DroppingTableModel, law_p_value
from arvision.text.drafters import DraftTree, Retrieved, RetrievedContext
from arvision.text.drafters.papers.retrieved import TextEncoder
from arvision.text.rules.lossy import transfer

LETTERS = [chr(code) for code in range(48, 112)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with a language model of letters, and one with an encoder of the same letters."""
    target = text_folder(tmp_path_factory.mktemp("target"))
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=64, intermediate_size=64, max_position_embeddings=256, **sizes)
    BertModel(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.pad_token = "0"
    tokenizer.save_pretrained(folder)
    return target, folder


def haystack(num, place):
    """A prompt of `num` letters of the first half; the needle at `place`, and the question at the
    end, are of the other half, in another order: they share letters, not their sequence."""
    chance = random.Random(5)
    text = [chance.choice(LETTERS[:32]) for _ in range(num)]
    needle = LETTERS[32:] * 2
    text[place : place + 64] = needle
    text[-64:] = needle[::-1]
    return "".join(text), "".join(needle)


def test_the_encoder_gives_unit_vectors_that_padding_does_not_change(folders):
    encoder = TextEncoder(folders[1])
    together = encoder(["ABCDE", "0123456789:;<=>?@ABCDEFG"])
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(together[:1], encoder(["ABCDE"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("place", [1024, 2560])
def test_the_part_that_answers_is_retrieved_from_a_prompt_of_four_thousand_tokens(folders, place):
    text, needle = haystack(4200, place)
    network = tiny_llama(max_position_embeddings=5000).float()
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    options: dict[str, Any] = {"tokenizer": tokenizer, "max_new_tokens": 12}
    drafter = Retrieved(str(folders[1]), context_tokens=256, chunk=64, query=64)
    out = arvision.generate(network, text, drafter=drafter, **options)
    assert out.tokens == arvision.generate(network, text, **options).tokens
    assert out.stats.lossless
    (kept,) = drafter._context([tokenizer(text)["input_ids"]])
    assert len(kept) <= 256
    assert needle in tokenizer.decode(kept)
    # Without the encoder's choice, the parts in the place of it are others.
    blind = RetrievedContext(256, 64, 64, embed=lambda texts: torch.ones(len(texts), 1),
                             decode=tokenizer.decode)  # fmt: skip
    assert needle not in tokenizer.decode(blind([tokenizer(text)["input_ids"]])[0])


def test_a_draft_that_reads_the_whole_prompt_is_the_target():
    network = tiny_llama()
    ids = random_prompts([150])
    out = arvision.generate(
        network,
        ids,
        drafter="retrieved",
        drafter_options={"context_tokens": 300},
        max_new_tokens=29,
    )
    assert out.tokens == [greedy_reference(network, ids[0], 29)]
    assert out.stats.tokens_per_pass == 7.0
    short = arvision.generate(
        network,
        ids,
        drafter="retrieved",
        drafter_options={"context_tokens": 64, "chunk": 16, "query": 16},
        max_new_tokens=29,
    )
    assert short.tokens == out.tokens
    assert short.stats.tokens_per_pass < 7.0


def test_parts_that_share_rare_tokens_with_the_end_are_kept():
    prompt = [*range(100, 164), *[5] * 640, *range(200, 264), *[5] * 640, *range(210, 230), 7]
    short = RetrievedContext(256, 64, 20)([prompt])[0]
    assert len(short) <= 256
    assert set(range(200, 264)) <= set(short)
    assert short[:64] == prompt[:64]
    assert short[-5:] == prompt[-5:]
    assert RetrievedContext(256)([[1, 2, 3]]) == [[1, 2, 3]]


def test_parts_below_the_threshold_are_left_out():
    vectors = {"1": [1.0, 0.0], "2": [0.6, 0.8], "3": [0.0, 1.0]}

    def embed(texts):
        return torch.tensor([vectors[text[0]] for text in texts])

    def decode(ids):
        return str(ids[0])

    prompt = [1] * 4 + [3] * 4 + [2] * 4 + [3] * 4 + [1] * 4
    for threshold, expected in ((-1.0, [1, 3, 2, 1]), (0.3, [1, 2, 1])):
        context = RetrievedContext(16, 4, 4, embed=embed, decode=decode, threshold=threshold)
        assert context([prompt])[0][::4] == expected


def transferred_law(target, draft, strength):
    """The joint law of all tokens where every one but the first is drawn from the enriched target."""
    num, vocab = target.num_tokens, target.vocab_size
    texts = torch.cartesian_prod(*[torch.arange(vocab)] * num)
    total = torch.zeros(len(texts), dtype=torch.float64)
    prefix = torch.zeros(len(texts), dtype=torch.int64)
    for place in range(num):
        depth = torch.full_like(prefix, place)
        logp = target.table[target.row(prefix, depth)].double().log_softmax(-1)
        q = draft.table[draft.row(prefix, depth)].double().softmax(-1)
        if place:
            logp = (logp + strength * (q - logp.exp())).log_softmax(-1)
        total += logp.gather(1, texts[:, place : place + 1])[:, 0]
        prefix = prefix * vocab + texts[:, place]
    return total.exp()


@pytest.mark.parametrize("strength", [0.0, 2.0])
def test_the_transfer_draws_from_the_enriched_law(strength):
    target, draft = DroppingTableModel(seed=3), DroppingTableModel(seed=4, sharpness=1.0)
    num = 60_000
    drafter = DraftTree(draft, "independent", branching=(1,) * target.num_tokens)
    out = decode_tokens(
        target,
        [[0]] * num,
        Run(num, target.num_tokens, [(5, row) for row in range(num)]),
        drafter=drafter,
        rule=transfer(strength),
        shape=Shaping(),
        policy=FixedWindow(drafter.num_draft + 1),
    )
    found = target.number(out.tokens)
    assert law_p_value(found, transferred_law(target, draft, strength)) > 1e-4
    plain = law_p_value(found, target.joint(Shaping()))
    assert plain > 1e-4 if strength == 0 else plain < 1e-6


def test_the_transfer_says_that_it_is_lossy_and_accepts_more():
    network, ids = tiny_llama(), random_prompts([150])
    options: dict[str, Any] = {
        "drafter": "retrieved",
        "drafter_options": {"context_tokens": 64, "chunk": 16, "query": 16},
        "temperature": 1.0,
        "max_new_tokens": 60,
    }
    plain = arvision.generate(network, ids, rule="independent", **options)
    rich = arvision.generate(
        network, ids, rule="transfer", rule_options={"strength": 20.0}, **options
    )
    assert plain.stats.lossless
    assert not rich.stats.lossless
    assert rich.stats.tokens_per_pass > plain.stats.tokens_per_pass + 0.3
    greedy: dict[str, Any] = options | {"temperature": 0.0}
    with pytest.raises(InputError, match="rule 'transfer' cannot judge drafts that are chosen"):
        arvision.generate(network, ids, rule="transfer", **greedy)
    with pytest.raises(InputError, match="strength -1: expected a number >= 0"):
        arvision.generate(network, ids, rule="transfer", rule_options={"strength": -1}, **options)


def test_bad_input_has_one_clear_message(folders):
    network, ids = tiny_llama(), random_prompts([150])
    with pytest.raises(InputError, match="an encoder reads text: expected the model's tokenizer"):
        arvision.generate(network, ids, drafter=Retrieved(str(folders[1])), max_new_tokens=8)
    with pytest.raises(InputError, match="num_tokens 64, chunk 64"):
        Retrieved(context_tokens=64, chunk=64)
    with pytest.raises(InputError, match="no such folder"):
        TextEncoder("./none")
