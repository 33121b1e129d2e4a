"""Drafts of another vocabulary: the same text in other tokens, laws over the target's, every rule exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from text_models import greedy_reference, random_prompts, tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import arvision
from arvision import InputError
from arvision.testing import law_p_value
from arvision.text.drafters import DraftTree
from arvision.text.drafters.cross import Translation, same_tokens, spellings
from arvision.text.model import as_text_model

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,"


def letter_tokenizer(order):
    """A tokenizer of the letters in some order, one token each, and of nothing else."""
    vocabulary = {LETTERS[place]: number for number, place in enumerate(order)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_tokenizer(merges=(), reverse=False):
    """A byte-level tokenizer with some merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=reverse)
    words = [*letters, *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def renumbered(network, order, vocab=64):
    """A network whose token n is the given one's token `order[n]`."""
    draft = tiny_llama(vocab_size=vocab)
    draft.load_state_dict(network.state_dict())
    for weight in (draft.model.embed_tokens.weight, draft.lm_head.weight):
        weight.data.copy_(weight.data[torch.tensor(order)])
    return draft


@pytest.fixture(scope="module")
def order():
    return torch.randperm(64, generator=torch.Generator().manual_seed(5)).tolist()


@pytest.mark.parametrize("expansion", ["chain", "dyspec", "beam", "distinct"])
def test_the_target_under_other_numbers_drafts_as_the_target_does(expansion, order):
    network = tiny_llama()
    options: dict[str, Any] = {"max_new_tokens": 30, "tokenizer": letter_tokenizer(range(64))}
    prompts = random_prompts([9, 6])
    expected = [greedy_reference(network, ids, 30) for ids in prompts]

    def run(draft, tokenizer):
        chosen = {"draft": draft, "expansion": expansion, "tokenizer": tokenizer}
        return arvision.generate(
            network, prompts, drafter="draft_model", drafter_options=chosen, **options
        )

    own = run(network, letter_tokenizer(range(64)))
    other = run(renumbered(network, order), letter_tokenizer(order))
    assert own.tokens == other.tokens == expected
    assert own.stats.tokens_per_pass == other.stats.tokens_per_pass > 2.0
    # Without its tokenizer the same draft is wrong nearly everywhere.
    lost = run(renumbered(network, order), None)
    assert lost.tokens == expected
    assert lost.stats.tokens_per_pass < 1.5


def test_a_draft_that_knows_half_of_the_letters_drafts_those(order):
    network = tiny_llama()
    half = renumbered(network, order)
    tokenizer = letter_tokenizer(order)
    known = set(order[:32])
    vocabulary = {LETTERS[place]: number for number, place in enumerate(order[:32])}
    small = Tokenizer(models.BPE(vocabulary, [], unk_token=LETTERS[order[0]]))
    small.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=small)
    drafter = DraftTree(as_text_model(half, 30), expansion="independent", tokenizer=tokenizer)
    prompts = random_prompts([9])
    out = arvision.generate(
        network,
        prompts,
        tokenizer=letter_tokenizer(range(64)),
        drafter=drafter,
        temperature=1.0,
        max_new_tokens=20,
    )
    assert drafter.translation is not None
    assert set(drafter.translation.ours.tolist()) == known
    assert out.stats.lossless


@pytest.mark.parametrize(
    ("expansion", "rule"),
    [
        ("dyspec", "gumbel"),
        ("independent", "multi_round"),
        ("distinct", "without_replacement"),
        ("independent", "block"),
    ],
)
def test_every_rule_judges_a_translated_draft_exactly(expansion, rule, monkeypatch):
    monkeypatch.setattr("arvision.text.drafters.cross.LEAST_SHARED", 1)
    network = tiny_llama(vocab_size=4, num_hidden_layers=2, sharpness=1.0)
    draft = tiny_llama(seed=1, vocab_size=4, num_hidden_layers=2, sharpness=1.0)
    texts = torch.cartesian_prod(*[torch.arange(4)] * 3)
    ids = torch.cat([torch.tensor([0, 1]).expand(64, 2), texts], dim=1)
    with torch.no_grad():
        logp = network(ids).logits[:, 1:-1].log_softmax(-1)
    joint = logp.gather(2, texts[..., None])[..., 0].sum(1).exp()
    # The draft's third token is one that the target does not have, so it cannot draft the fourth.
    theirs = Tokenizer(models.BPE({"c": 0, "a": 1, "x": 2, "b": 3}, [], unk_token="x"))
    theirs.decoder = decoders.Fuse()
    mine = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2, "d": 3}, []))
    mine.decoder = decoders.Fuse()
    drafter = DraftTree(
        as_text_model(draft, 3),
        expansion=expansion,
        num_draft=4,
        branching=(1, 1) if rule == "block" else (2, 1),
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=theirs),
    )
    out = arvision.generate(
        network,
        [[0, 1]] * 600,
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=mine),
        drafter=drafter,
        rule=rule,
        temperature=1.0,
        max_new_tokens=3,
    )
    assert drafter.translation is not None
    assert sorted(drafter.translation.ours.tolist()) == [0, 1, 2]
    found = (torch.tensor(out.tokens) * torch.tensor([16, 4, 1])).sum(1)
    assert law_p_value(found, joint) > 1e-5
    assert out.stats.tokens_per_pass > 1.05


def test_tokens_are_compared_by_what_they_spell():
    plain = byte_tokenizer()
    merged = byte_tokenizer([("h", "e"), ("\u0120", "w")])
    assert spellings(merged)[b" w"] == 257
    assert spellings(plain)[b" "] == plain.get_vocab()["\u0120"]
    assert len(Translation.between(merged, plain).ours) == 256
    assert same_tokens(plain, byte_tokenizer())
    # Every token has its number in both; the larger vocabulary has more.
    assert same_tokens(merged, plain)
    assert not same_tokens(letter_tokenizer(range(64)), letter_tokenizer(range(63, -1, -1)))
    marked = Tokenizer(models.BPE({"\u2581hi": 0, "<0x0A>": 1, "\u00e9": 2}, []))
    found = spellings(PreTrainedTokenizerFast(tokenizer_object=marked))
    assert found == {b" hi": 0, b"\n": 1, "\u00e9".encode(): 2}
    # A target's token of two letters is read as the draft's two.
    translation = Translation.between(merged, byte_tokenizer([("l", "o")]))
    ids = merged("hello wé", add_special_tokens=False)["input_ids"]
    draft = translation.draft
    assert draft.decode(translation.read(ids)) == "hello wé"
    # Half of a letter is not read.
    assert draft.decode(translation.read(ids[:-1])) == "hello w"


def test_a_draft_of_finer_tokens_keeps_the_text_and_stops_where_it_has_no_room():
    target = byte_tokenizer([("a", "b"), ("ab", "c"), ("c", "a")])
    network = tiny_llama(vocab_size=len(target))
    draft = tiny_llama(seed=2, vocab_size=256, max_position_embeddings=48)
    prompt = target("abcabcab ca", add_special_tokens=False)["input_ids"]
    out = arvision.generate(
        network,
        [prompt],
        tokenizer=target,
        drafter="draft_model",
        drafter_options={"draft": draft, "tokenizer": byte_tokenizer(reverse=True)},
        max_new_tokens=120,
    )
    assert out.tokens == [greedy_reference(network, prompt, 120)]
    assert out.stats.windows[0] > 1
    assert out.stats.windows[-1] == 1


def test_too_little_in_common_has_one_clear_message():
    with pytest.raises(InputError, match="spells 3 of the target's 64 alike: expected at least 16"):
        arvision.generate(
            tiny_llama(),
            random_prompts([3]),
            tokenizer=letter_tokenizer(range(64)),
            drafter="draft_model",
            drafter_options={
                "draft": tiny_llama(vocab_size=3),
                "tokenizer": PreTrainedTokenizerFast(
                    tokenizer_object=Tokenizer(models.BPE({"b": 0, "a": 1, "c": 2}, []))
                ),
            },
        )
