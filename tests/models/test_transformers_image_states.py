"""Image models of transformers: trees, rows in parallel, the law, half precision, bad input."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from image_networks import (
    CHAMELEON,
    EMU,
    GLM,
    chameleon_prompts,
    emu3_prompts,
    glm_prompts,
    janus_prompts,
    tiny_chameleon,
    tiny_emu3,
    tiny_glm,
    tiny_janus,
)

from arvision import CheckpointError, InputError, StateError, get_sampler
from arvision.decoding.tree import topology_of
from arvision.models import Chameleon, ChameleonDecoder, Emu3, GlmImage, ImagePrompt, Janus
from arvision.models.transformers_image import Layout
from arvision.testing import law_p_value


def made(family, seed=0) -> tuple[Any, list[Any], float]:
    """A model, ragged prompts of three images, and a guidance scale."""
    lengths = [5, 2, 8]
    if family == "janus":
        return Janus(tiny_janus(seed)), janus_prompts(lengths, seed), 2.5
    if family == "glm":
        return GlmImage(tiny_glm(seed), grids=[(2, 3), (4, 5)]), glm_prompts(lengths, seed), 1.0
    if family == "glm-editing":
        codes = torch.arange(6).view(2, 3)
        prompts = [ImagePrompt(p, images=[codes]) for p in glm_prompts(lengths, seed, [(2, 3)])]
        return GlmImage(tiny_glm(seed), grids=[(5, 4)]), prompts, 1.0
    if family == "emu3":
        return Emu3(tiny_emu3(seed), grids=[(5, 3)]), emu3_prompts(lengths, seed), 3.0
    if family == "chameleon":
        model = Chameleon(tiny_chameleon(seed), grids=[(4, 5)])
        return model, chameleon_prompts(lengths, seed), 3.0
    if family == "chameleon-images":
        model = Chameleon(tiny_chameleon(seed), grids=[(3, 4)])
        place = torch.full((4,), CHAMELEON["place"])
        prompts = [torch.cat([p[:1], place, p[1:]]) for p in chameleon_prompts(lengths, seed)]
        codes = torch.tensor([[3, 1], [0, 2]])
        return model, [ImagePrompt(p, images=[codes]) for p in prompts], 3.0
    model = Chameleon(tiny_chameleon(seed), layout="lumina", grids=[(6, 4)])
    return model, chameleon_prompts(lengths, seed, (6, 4)), 3.0


FAMILIES = ["janus", "glm", "glm-editing", "emu3", "chameleon", "chameleon-images", "lumina"]
WITH_GRID = [name for name in FAMILIES if name != "glm"]


@pytest.mark.parametrize("own", [False, True], ids=["one-tree", "trees-of-rows"])
@pytest.mark.parametrize("family", FAMILIES)
def test_trees_on_ragged_rows_say_what_chains_say(family, own):
    model, prompts, scale = made(family)
    generator = torch.Generator().manual_seed(1)
    first = torch.randint(model.vocab_size, (3, 5), generator=generator)
    counts = [4, 1, 0]
    state, _ = model.start(prompts, scale)
    state.extend(first)
    state.commit(torch.arange(5).expand(3, -1), torch.tensor(counts))
    parents = torch.tensor([-1, -1, 0, 0, 2, 1, 4])
    if own:
        parents = torch.stack([parents, parents, torch.tensor([-1, 0, -1, 0, 3, 4, 5])])
    tree = torch.randint(model.vocab_size, (3, 7), generator=generator)
    logits = state.extend(tree, parents)
    paths = topology_of(parents).ancestors.expand(3, -1, -1)
    for row in range(3):
        for node in range(7):
            path = paths[row, node].nonzero()[:, 0]
            chain = torch.cat([first[row, : counts[row]], tree[row, path]])
            alone, _ = model.start([prompts[row]], scale)
            expected = alone.extend(chain[None])[0, -1]
            torch.testing.assert_close(logits[row, node], expected, rtol=0.0, atol=1e-8)
    kept = torch.tensor([[0, 2, 4], [1, 5, 0], [0, 3, 0]])
    state.commit(kept, torch.tensor([3, 2, 2]))
    state.select(torch.tensor([2, 0]))
    assert state.lengths.tolist() == [2, 7]
    after = torch.randint(model.vocab_size, (2, 3), generator=generator)
    logits = state.extend(after)
    for place, row in enumerate((2, 0)):
        path = kept[row, : [3, 2, 2][row]]
        chain = torch.cat([first[row, : counts[row]], tree[row, path], after[place]])
        alone, _ = model.start([prompts[row]], scale)
        expected = alone.extend(chain[None])[0, -3:]
        torch.testing.assert_close(logits[place], expected, rtol=0.0, atol=1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_has_the_size_of_an_image_until_a_tree_needs_more(family):
    model, prompts, scale = made(family)
    state, _ = model.start(prompts[:2], scale)
    begun = state.cache.host_lengths[0]
    assert state.cache.capacity == begun + model.layout.num_places + 1
    draw = torch.Generator().manual_seed(2)
    most = model.num_tokens - 1
    tokens = torch.randint(model.vocab_size, (2, most), generator=draw)
    state.extend(tokens)
    state.commit(torch.arange(most).expand(2, -1), torch.tensor([most, most - 2]))
    last = torch.randint(model.vocab_size, (2, 6), generator=draw)
    said = state.extend(last, torch.tensor([-1, -1, -1, 1, 1, 2]))
    assert state.cache.capacity == begun + model.layout.num_places + 64
    for row, num in enumerate([most, most - 2]):
        alone, _ = model.start([prompts[row]], scale)
        chain = torch.cat([tokens[row, :num], last[row, 1:2]])
        torch.testing.assert_close(
            said[row, 1], alone.extend(chain[None])[0, -1], rtol=0.0, atol=1e-8
        )
    state.commit(torch.tensor([[1], [1]]), torch.tensor([0, 1]))
    other, _ = model.start([prompts[2]], scale)
    state.select(torch.tensor([1]))
    state.join(other)
    assert state.cache.capacity >= other.cache.capacity
    fed = torch.cat([last[1, 3:4], tokens[0, :1]])[:, None]
    both = state.extend(fed)
    alone, _ = model.start([prompts[2]], scale)
    torch.testing.assert_close(both[1:], alone.extend(fed[1:]), rtol=0.0, atol=1e-8)


@pytest.mark.parametrize("family", WITH_GRID)
@pytest.mark.parametrize("sampler", ["zipar", "pjd"])
def test_rows_in_parallel_with_a_lead_of_a_row_are_plain_sampling(family, sampler):
    model, prompts, scale = made(family)
    run = {"seeds": [3, 4, 5], "guidance_scale": scale}
    plain = get_sampler("ar")(model, prompts, **run)
    out = get_sampler(sampler, local_window=model.grid[1])(model, prompts, **run)
    assert torch.equal(out.tokens, plain.tokens)
    fast = get_sampler(sampler, local_window=1)(model, prompts, **run)
    assert fast.stats.forward_passes < plain.stats.forward_passes


@pytest.mark.parametrize("family", FAMILIES)
def test_relaxed_and_draft_samplers_run(family):
    model, prompts, scale = made(family)
    run = {"seeds": [1, 2, 3], "guidance_scale": scale}
    plain = get_sampler("ar")(model, prompts, **run).tokens
    draft = made(family)[0]
    assert torch.equal(get_sampler("draft", draft=draft)(model, prompts, **run).tokens, plain)
    for name in ("gsd", "lantern"):
        tokens = get_sampler(name, window=4)(model, prompts, **run).tokens
        assert int(tokens.max()) < model.vocab_size


def test_the_law_of_jacobi_decoding_is_that_of_the_network():
    network = tiny_emu3(seed=5, codes=4)
    model, prompt = Emu3(network, grids=[(2, 2)]), emu3_prompts([3])[0]
    sampler = get_sampler("sjd", window=3, coupling="maximal", temperature=2.0)
    every = torch.tensor(list(itertools.product(range(4), repeat=4)))
    # Straight through the class: prompt, two codes, the line end, two codes.
    ids = every + EMU["first"]
    ends = torch.full((256, 1), EMU["line_end"])
    whole = torch.cat([prompt.expand(256, -1), ids[:, :2], ends, ids[:, 2:]], dim=1)
    with torch.no_grad():
        logits = network(whole).logits[..., EMU["first"] : EMU["first"] + 4] / 2.0
    places = len(prompt) - 1 + torch.tensor([0, 1, 3, 4])
    law = logits[:, places].log_softmax(-1).gather(2, every[..., None])[..., 0].sum(1).exp()
    assert abs(float(law.sum()) - 1) < 1e-9
    num = 1000
    out = sampler(model, [prompt] * num, seeds=[(0, k) for k in range(num)])
    numbers = (out.tokens * torch.tensor([64, 16, 4, 1])).sum(1)
    assert law_p_value(numbers, law) > 1e-4
    wrong = law.view(4, 64).flip(0).flatten()
    assert law_p_value(numbers, wrong) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_and_eager_attention(family):
    model, prompts, scale = made(family)
    run = {"seeds": [1, 2, 3], "guidance_scale": scale}
    plain = get_sampler("sjd")(model, prompts, **run).tokens
    model.network.set_attn_implementation("eager")
    assert torch.equal(get_sampler("sjd")(model, prompts, **run).tokens, plain)
    model.to(torch.bfloat16)
    for name in ("ar", "sjd"):
        tokens = get_sampler(name)(model, prompts, **run).tokens
        assert int(tokens.max()) < model.vocab_size


def test_images_in_a_prompt_are_guided_apart():
    model, prompts, scale = made("chameleon-images")
    mixed = [prompts[0], chameleon_prompts([5], 0)[0]]
    state, logits = model.start(mixed, scale)
    assert state.cache.keys.shape[1] == 6
    apart = []
    for start in (prompts[0], _images_only(prompts[0]), _null()):
        apart.append(model.start([start])[1][0])
    conditional, images, null = apart
    expected = null + 1.2 * (images - null) + scale * (conditional - images)
    torch.testing.assert_close(logits[0], expected, rtol=0.0, atol=1e-9)
    torch.testing.assert_close(logits[1], model.start(mixed[1:], scale)[1][0], rtol=0.0, atol=1e-9)


def _images_only(prompt):
    start, end = CHAMELEON["image_start"], CHAMELEON["image_end"]
    codes = (prompt.images[0].flatten() + CHAMELEON["first"]).tolist()
    return torch.tensor([0, start, *codes, end, start])


def _null():
    return torch.tensor([0, CHAMELEON["image_start"]])


def test_pixels_are_those_of_the_classes():
    network = tiny_janus()
    model = Janus(network)
    tokens = torch.randint(model.vocab_size, (2, 25))
    ours = model.decode(tokens)
    theirs = network.decode_image_tokens(tokens).permute(0, 3, 1, 2).clamp(-1, 1)
    torch.testing.assert_close(ours, theirs.float())
    network = tiny_emu3()
    model = Emu3(network, grids=[(3, 2)])
    tokens = torch.randint(model.vocab_size, (2, 6))
    sequence = model.sequence(tokens)
    theirs = network.decode_image_tokens(image_tokens=sequence, height=3, width=2).clamp(-1, 1)
    torch.testing.assert_close(model.decode(tokens), theirs.float())
    assert model.decode(tokens).shape == (2, 3, 24, 16)


def test_chameleon_takes_the_decoder_of_the_published_file(tmp_path):
    decoder = ChameleonDecoder(32, (1, 2), 1, 16)
    extra = {"loss.logvar": torch.zeros(1), "encoder.conv_in.weight": torch.zeros(1)}
    tensors = {**decoder.state_dict(), **extra}
    torch.save({"state_dict": tensors}, tmp_path / "vqgan.ckpt")
    network = tiny_chameleon()
    model: Any = Chameleon(network, decoder=tmp_path / "vqgan.ckpt", grids=[(3, 2)])
    model.decoder.double()
    pixels = model.decode(torch.zeros(1, 6, dtype=torch.int64))
    vq = network.model.vqmodel
    latents = vq.quantize.embedding(torch.zeros(1, 3, 2, dtype=torch.int64)).permute(0, 3, 1, 2)
    expected = decoder.double()(vq.post_quant_conv(latents)).clamp(-1, 1).float()
    torch.testing.assert_close(pixels, expected)
    del tensors["decoder.conv_in.bias"]
    with pytest.raises(CheckpointError, match=r"'decoder.conv_in.bias' is missing"):
        ChameleonDecoder.from_official({"state_dict": tensors})


def test_a_size_is_what_the_authors_make_of_it():
    network = tiny_glm()
    assert GlmImage(network).grids == [(16, 16), (32, 32)]
    assert GlmImage(network, height=1152, width=768).grids == [(19, 13), (36, 24)]
    editing = GlmImage(network, height=64, width=96, editing=True)
    assert (editing.grid, editing.num_tokens) == ((2, 3), 6)
    assert [Emu3(tiny_emu3(), ratio=r).grid for r in ("1:1", "16:9", "4:3")] == [
        (90, 90),
        (68, 120),
        (78, 104),
    ]
    lumina = Chameleon(tiny_chameleon(), layout="lumina", height=768, width=512)
    assert lumina.grid == (48, 32)


BAD = [
    (lambda: GlmImage(tiny_glm(), height=100), "height 100: expected a multiple of 32"),
    (lambda: GlmImage(tiny_glm(), grids=[(0, 2)]), "expected .*rows, columns"),
    (lambda: Emu3(tiny_emu3(), ratio="wide"), "ratio 'wide': expected 'W:H'"),
    (lambda: Janus(tiny_janus(), grids=[(2, 2), (3, 3)]), "Janus draws one grid"),
    (lambda: Chameleon(tiny_chameleon(), layout="anole"), "unknown layout 'anole'"),
    (lambda: Chameleon(tiny_chameleon(), height=256), "512x512 only"),
    (lambda: Chameleon(tiny_chameleon(), layout="lumina", height=2048, width=256), "ratio"),
    (lambda: Emu3(tiny_emu3(), grids=[(2, 2)], ids={"eol": 3}), "special id of Emu3.*'eol'"),
    (lambda: Emu3(tiny_janus()), "JanusForConditionalGeneration: Emu3 drives"),
    (lambda: Layout(4, {3: [1]}), "behind token 3"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message[:20] for _, message in BAD])
def test_what_cannot_be_made_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_bad_conditions_have_one_clear_message(monkeypatch):
    janus, prompts, _ = made("janus")
    glm = made("glm")[0]
    monkeypatch.setattr(type(janus), "run", None)
    for model, conditions, scale, message in (
        (janus, [], 1.0, "no conditions"),
        (janus, ["a cat"], 1.0, "no processor"),
        (janus, [prompts[0][:-1]], 1.0, "expected the image start"),
        (janus, [torch.tensor([[1, 2]])], 1.0, r"expected \[L\]"),
        (janus, [torch.tensor([1, 900, 2])], 1.0, "holds the id 900: expected 0..119"),
        (janus, [{"a": 1}], 1.0, "expected ids"),
        (janus, [ImagePrompt(prompts[0], images=[1])], 3.0, "draws from text alone"),
        (janus, [ImagePrompt(prompts[0], prompts[1])], 1.0, "no guidance at guidance_scale 1"),
        (glm, glm_prompts([3]), 2.0, "guidance_scale 2.0: GLM-Image takes 1 only"),
        (glm, [ImagePrompt(glm_prompts([3])[0], [64])], 1.0, "GLM-Image has none"),
        (glm, [torch.tensor([5, 6])], 1.0, "expected the image start"),
        (glm, glm_prompts([3], 0, [(2, 2)]), 1.0, "4 places for tokens of source images"),
        (glm, [torch.tensor([70, GLM["end"], 64])], 1.0, "holds 1 whole images"),
    ):
        with pytest.raises(InputError, match=message):
            model.start(conditions, scale)
    emu, emu_prompts, _ = made("emu3")
    lumina, lumina_prompts, _ = made("lumina")
    for model, conditions, scale, message in (
        (emu, [emu_prompts[0][:-1]], 3.0, "expected the image token"),
        (emu, [torch.tensor([EMU["bos"], 5, EMU["image_token"]])], 3.0, "no image start"),
        (emu, [ImagePrompt(emu_prompts[0], emu_prompts[1])], 1.0, "no guidance"),
        (emu, [ImagePrompt(emu_prompts[0], images=[1])], 3.0, "Emu3 draws from text alone"),
        (made("chameleon")[0], [chameleon_prompts([3])[0][:-1]], 3.0, "expected the image start"),
        (lumina, [lumina_prompts[0][:-2]], 3.0, "expected the image start and the sides"),
    ):
        with pytest.raises(InputError, match=message):
            model.start(conditions, scale)
    with pytest.raises(InputError, match="GlmImagePipeline"):
        glm.decode(torch.zeros(1, glm.num_tokens, dtype=torch.int64))


def test_a_state_is_used_in_order():
    model, prompts, scale = made("emu3")
    state, _ = model.start(prompts, scale)
    with pytest.raises(StateError, match="call extend first"):
        state.commit(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, dtype=torch.int64))
    state.extend(torch.zeros(3, 5, dtype=torch.int64))
    with pytest.raises(StateError, match="not a path"):
        state.commit(torch.ones(3, 1, dtype=torch.int64), torch.ones(3, dtype=torch.int64))


@pytest.mark.parametrize("family", ["janus", "glm-editing", "emu3", "chameleon"])
def test_offloaded_networks_draw_the_same(family):
    import accelerate

    model, prompts, scale = made(family)
    run = {"seeds": [1, 2, 3], "guidance_scale": scale}
    plain = get_sampler("sjd")(model, prompts, **run).tokens
    here = torch.device("cpu")
    again = made(family)[0]
    accelerate.cpu_offload_with_hook(again.network, execution_device=here)
    assert torch.equal(get_sampler("sjd")(again, prompts, **run).tokens, plain)
    again = made(family)[0]
    accelerate.cpu_offload(again.network, execution_device=here)
    assert next(again.network.parameters()).device.type == "meta"
    assert torch.equal(get_sampler("sjd")(again, prompts, **run).tokens, plain)


def test_a_network_on_several_devices_is_refused():
    network = tiny_janus()
    network.hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(InputError, match="spread over 0, 1: expected one device"):
        Janus(network)
