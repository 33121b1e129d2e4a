"""Tiny random image networks of transformers, float64, and what they generate themselves."""

from __future__ import annotations

from typing import Any

import torch

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
}


def redraw(network: Any, seed: int) -> Any:
    """Weights with which not one token repeats for ever: embeddings N(0, 1), matrices scaled."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if parameter.dim() < 2:
            continue
        fan_in = parameter[0].numel()
        is_embedding = "embed" in name and parameter.dim() == 2 and "proj" not in name
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = (noise if is_embedding else noise / fan_in**0.5).to(parameter.dtype)
    return network.eval().double()


def ids_of(lengths, low, high, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(low, high, (num,), generator=generator) for num in lengths]


def pad_left(rows, pad):
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, longest - len(row) :] = row
        mask[place, longest - len(row) :] = 1
    return ids, mask


def tiny_janus(seed=0, side=5, codes=48, vocab=120) -> Any:
    import transformers

    t: Any = transformers

    config = t.JanusConfig(
        text_config=t.LlamaConfig(vocab_size=vocab, max_position_embeddings=256, **TEXT),
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "image_size": 16 * side,
            "patch_size": 16,
            "projection_dim": 32,
            "num_image_tokens": side * side,
        },
        vq_config={
            "embed_dim": 8,
            "num_embeddings": codes,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "num_patches": side,
            "projection_dim": 32,
            "image_token_embed_dim": 32,
        },
        image_token_id=vocab - 1,
        tie_word_embeddings=False,
    )
    network = redraw(t.JanusForConditionalGeneration(config), seed)
    settings = network.generation_config
    settings.bos_token_id, settings.pad_token_id = 1, 0
    settings.generation_kwargs = {"boi_token_id": 2}
    return network


def janus_generate(network, prompts, scale):
    import transformers

    t: Any = transformers

    ids, mask = pad_left(prompts, 0)
    side = network.model.vision_model.config.num_image_tokens
    config = t.GenerationConfig(
        do_sample=False,
        guidance_scale=scale,
        bos_token_id=1,
        pad_token_id=0,
        generation_kwargs={"boi_token_id": 2},
        max_length=ids.shape[1] + side,
    )
    return network.generate(
        ids, attention_mask=mask, generation_mode="image", generation_config=config
    )


def janus_prompts(lengths, seed=0, vocab=120):
    rows = ids_of(lengths, 3, vocab - 1, seed)
    return [torch.cat([torch.tensor([1]), row, torch.tensor([2])]) for row in rows]


GLM = {"codes": 64, "start": 64, "end": 65, "place": 590, "pad": 599}


def tiny_glm(seed=0) -> Any:
    import transformers

    t: Any = transformers

    config = t.GlmImageConfig(
        text_config={
            **TEXT,
            "vocab_size": 600,
            "vision_vocab_size": 80,
            "pad_token_id": GLM["pad"],
            "eos_token_id": GLM["end"],
            "max_position_embeddings": 512,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 1, 1],
            },
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "num_heads": 4,
            "intermediate_size": 64,
            "patch_size": 16,
            "image_size": 64,
        },
        vq_config={"embed_dim": 16, "num_embeddings": GLM["codes"], "latent_channels": 32},
        image_token_id=GLM["place"],
        image_start_token_id=GLM["start"],
        image_end_token_id=GLM["end"],
    )
    return redraw(t.GlmImageForConditionalGeneration(config), seed)


def glm_prompts(lengths, seed=0, sources=()):
    """Prompts of random text; with sources (h, w), placeholders for them in front."""
    rows = ids_of(lengths, 70, 580, seed)
    start, end = torch.tensor([GLM["start"]]), torch.tensor([GLM["end"]])
    parts = []
    for rows_, columns in sources:
        parts += [start, torch.full((rows_ * columns,), GLM["place"]), end]
    return [torch.cat([*parts, row, start]) for row in rows]


def glm_generate(network, prompts, grids, sources=(), pixels=None):
    """Greedy tokens [B, N]; `grids` in drawing order, the class lists the picture first."""
    ids, mask = pad_left(prompts, GLM["pad"])
    each = [[1, *grid] for grid in [*sources, *reversed(grids)]]
    num = sum(rows * columns for rows, columns in grids)
    extra = {} if pixels is None else {"pixel_values": pixels}
    out = network.generate(
        input_ids=ids,
        attention_mask=mask,
        image_grid_thw=torch.tensor(each * len(prompts)),
        images_per_sample=torch.tensor([len(each)] * len(prompts)),
        max_new_tokens=num,
        do_sample=False,
        suppress_tokens=list(range(GLM["codes"], 80)),
        **extra,
    )
    return out[:, ids.shape[1] :]


EMU = {
    "codes": 40,
    "first": 100,
    "line_end": 90,
    "frame_end": 91,
    "image_end": 92,
    "image_start": 93,
    "image_token": 94,
    "bos": 95,
    "eos": 96,
    "pad": 97,
}


def tiny_emu3(seed=0, codes=40) -> Any:
    import transformers

    t: Any = transformers

    first = EMU["first"]
    vocabulary = {f"<|visual token {k:06d}|>": first + k for k in range(codes)}
    vocabulary |= {
        "<|extra_200|>": EMU["line_end"],
        "<|extra_201|>": EMU["frame_end"],
        "<|image start|>": EMU["image_start"],
        "<|image end|>": EMU["image_end"],
        "<|image token|>": EMU["image_token"],
        "<image>": 98,
    }
    config = t.Emu3Config(
        text_config={
            **TEXT,
            "vocab_size": first + codes + 5,
            "bos_token_id": EMU["bos"],
            "eos_token_id": EMU["eos"],
            "pad_token_id": EMU["pad"],
            "max_position_embeddings": 64,
        },
        vq_config={
            "codebook_size": codes,
            "embed_dim": 4,
            "latent_channels": 4,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1],
            "num_res_blocks": 1,
            "hidden_size": 32,
            "attn_resolutions": [],
        },
        vocabulary_map=vocabulary,
    )
    network = redraw(t.Emu3ForConditionalGeneration(config), seed)
    network.generation_config.pad_token_id = EMU["pad"]
    return network


def emu3_prompts(lengths, seed=0):
    opening = torch.tensor([EMU["image_start"], 7, 8, EMU["image_token"]])
    rows = ids_of(lengths, 1, 88, seed)
    return [torch.cat([torch.tensor([EMU["bos"]]), row, opening]) for row in rows]


def forced_generate(network, prompts, sequence, codes, pad, scale, negatives=None):
    """Greedy ids [B, M] under a prefix function: `sequence[m]` is forced, None where a code is."""
    ids, mask = pad_left(prompts, pad)

    def allowed(_, prefix):
        forced = sequence[len(prefix) - ids.shape[1]]
        return codes if forced is None else [forced]

    extra: dict[str, Any] = {}
    if negatives is not None:
        null, null_mask = pad_left(negatives, pad)
        extra = {"negative_prompt_ids": null, "negative_prompt_attention_mask": null_mask}
    if scale != 1:
        extra["guidance_scale"] = scale
    out = network.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=len(sequence),
        do_sample=False,
        prefix_allowed_tokens_fn=allowed,
        **extra,
    )
    return out[:, ids.shape[1] :]


def emu3_sequence(rows, columns):
    line = [None] * columns + [EMU["line_end"]]
    return line * rows + [EMU["frame_end"], EMU["image_end"], EMU["eos"]]


CHAMELEON = {
    "first": 4,
    "bos": 0,
    "image_end": 60,
    "image_start": 61,
    "end_of_turn": 62,
    "line_end": 63,
    "size": 64,
    "place": 90,
}


def letters(code):
    return "IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + "Z"


def tiny_chameleon(seed=0, codes=48, swin_norm=False, size_of_ids=100) -> Any:
    import transformers

    t: Any = transformers

    vocabulary = {letters(k): CHAMELEON["first"] + k for k in range(codes)}
    vocabulary |= {
        "<s>": CHAMELEON["bos"],
        "<racm3:break>": CHAMELEON["image_start"],
        "<eoss>": CHAMELEON["image_end"],
        "<reserved08706>": CHAMELEON["end_of_turn"],
        "<reserved08799>": CHAMELEON["line_end"],
        "<reserved08800>": CHAMELEON["size"],
        "<image>": CHAMELEON["place"],
    }
    config = t.ChameleonConfig(
        **TEXT | {"num_key_value_heads": 4},
        vocab_size=size_of_ids,
        max_position_embeddings=64,
        bos_token_id=CHAMELEON["bos"],
        eos_token_id=99,
        pad_token_id=1,
        swin_norm=swin_norm,
        vocabulary_map=vocabulary,
        vq_config={
            "embed_dim": 16,
            "num_embeddings": codes,
            "latent_channels": 16,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "resolution": 32,
        },
    )
    network = redraw(t.ChameleonForConditionalGeneration(config), seed)
    # The class bars image tokens from its own answers.
    network.model.vocabulary_mapping.__dict__["image_tokens"] = []
    return network


def chameleon_prompts(lengths, seed=0, sides=None):
    """Prompts for layout "chameleon", or "lumina" with sides (rows, columns)."""
    rows = ids_of(lengths, 66, 89, seed)
    opening = [CHAMELEON["end_of_turn"], CHAMELEON["image_start"]]
    if sides is not None:
        opening += [CHAMELEON["size"] + side // 2 for side in sides]
    return [torch.cat([torch.tensor([0]), row, torch.tensor(opening)]) for row in rows]


def glm_processor() -> Any:
    """A `GlmImageProcessor` whose words are single characters."""
    import transformers
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    t: Any = transformers
    special = {
        "<start>": GLM["start"],
        "<end>": GLM["end"],
        "<|image|>": GLM["place"],
        "<sop>": 66,
        "<eop>": 67,
        "<pad>": GLM["pad"],
    }
    letters = {chr(32 + k): 70 + k for k in range(95)}
    core = Tokenizer(models.WordLevel({**special, **letters}, unk_token=" "))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = t.PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token=" ",
        bos_token="<start>",
        eos_token="<end>",
        pad_token="<pad>",
        padding_side="left",
        additional_special_tokens=["<|image|>", "<sop>", "<eop>"],
        extra_special_tokens={
            "image_token": "<|image|>",
            "grid_bos_token": "<sop>",
            "grid_eos_token": "<eop>",
        },
    )
    template = (
        "{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}"
        "<start><|image|><end>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endfor %}"
    )
    pictures = t.GlmImageImageProcessor(
        patch_size=16,
        temporal_patch_size=1,
        merge_size=1,
        size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64},
    )
    return t.GlmImageProcessor(pictures, tokenizer, chat_template=template)


def tiny_glm_pipeline(seed=0) -> Any:
    """A `GlmImagePipeline` of diffusers with random weights."""
    import diffusers
    import transformers

    d: Any = diffusers
    t: Any = transformers
    torch.manual_seed(seed)
    encoder = t.T5EncoderModel(
        t.T5Config(vocab_size=400, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    )
    vae = d.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8, 8, 8, 8],
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    transformer = d.GlmImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=32,
        time_embed_dim=16,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=GLM["codes"],
    )
    network = tiny_glm(seed).float()
    network.generation_config.top_k = 1
    network.generation_config.suppress_tokens = list(range(GLM["codes"], 80))
    pipe = d.GlmImagePipeline(
        tokenizer=t.ByT5Tokenizer(),
        processor=glm_processor(),
        text_encoder=encoder.eval(),
        vision_language_encoder=network,
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    network.double()
    return pipe


def character_tokenizer(special, first, most, **names) -> Any:
    """A tokenizer of single characters, ids `first` to `most`, and special tokens by id."""
    import transformers
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    t: Any = transformers
    letters = {chr(32 + k): first + k % (most - first + 1) for k in range(95)}
    core = Tokenizer(models.WordLevel({**special, **letters}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return t.PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<pad>",
        padding_side="left",
        additional_special_tokens=list(special),
        extra_special_tokens=names.pop("extra"),
        **names,
    )


def janus_processor() -> Any:
    import transformers

    t: Any = transformers
    special = {"<pad>": 0, "<bos>": 1, "<boi>": 2, "<eoi>": 3, "<image>": 119}
    extra = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    tokenizer = character_tokenizer(
        special, 10, 110, bos_token="<bos>", pad_token="<pad>", extra=extra
    )
    template = "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}"
    pictures = t.JanusImageProcessor()
    return t.JanusProcessor(pictures, tokenizer, chat_template="<bos>" + template + "::")


def emu3_processor() -> Any:
    import transformers

    t: Any = transformers
    special = {
        "<bos>": EMU["bos"],
        "<eos>": EMU["eos"],
        "<pad>": EMU["pad"],
        "<boi>": EMU["image_start"],
        "<eoi>": EMU["image_end"],
        "<wrap>": EMU["image_token"],
        "<image>": 98,
        "<eof>": EMU["frame_end"],
    }
    extra = {
        "image_token": "<image>",
        "boi_token": "<boi>",
        "eoi_token": "<eoi>",
        "image_wrapper_token": "<wrap>",
        "eof_token": "<eof>",
    }
    tokenizer = character_tokenizer(
        special, 0, 85, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", extra=extra
    )
    return t.Emu3Processor(t.Emu3ImageProcessor(), tokenizer)


def chameleon_processor() -> Any:
    import transformers

    t: Any = transformers
    special = {
        "<s>": CHAMELEON["bos"],
        "<pad>": 1,
        "<boi>": CHAMELEON["image_start"],
        "<eoi>": CHAMELEON["image_end"],
        "<sep>": CHAMELEON["end_of_turn"],
        "<image>": CHAMELEON["place"],
    }
    extra = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    tokenizer = character_tokenizer(
        special, 66, 89, bos_token="<s>", sep_token="<sep>", pad_token="<pad>", extra=extra
    )
    size = {"shortest_edge": 32}
    pictures = t.ChameleonImageProcessor(size=size, crop_size={"height": 32, "width": 32})
    return t.ChameleonProcessor(pictures, tokenizer, image_seq_length=256)
