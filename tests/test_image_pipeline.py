"""Image models of transformers by name: loaded from folders as the hub has them, and drawn."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import image_networks as tiny
import pytest
import torch
from hub_server import Hub
from image_folders import chameleon_folder, emu3_folder, glm_folder, janus_folder
from PIL import Image

import arvision
from arvision import CheckpointError, InputError, get_sampler
from arvision.image_pipeline import ImageModelPipeline
from arvision.models import Chameleon, Emu3, GlmImage, ImagePrompt, Janus
from arvision.models.transformers_image.emu3 import NEGATIVE

MAKERS = {
    "janus": janus_folder,
    "emu3": emu3_folder,
    "chameleon": chameleon_folder,
    "glm": glm_folder,
}
PICTURE: dict[str, dict[str, Any]] = {
    "janus": {},
    "emu3": {"height": 32, "width": 40},
    "chameleon": {},
    "glm": {"height": 64, "width": 64, "num_inference_steps": 1},
}
SMALL: dict[str, dict[str, Any]] = {"chameleon": {"grids": [(4, 4)]}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    found = {}
    for name, make in MAKERS.items():
        found[name] = tmp_path_factory.mktemp(name)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            make(found[name])
    return found


@pytest.fixture(scope="module")
def pipes(folders) -> dict[str, Any]:
    return {
        name: arvision.load(folder, device="cpu", dtype="float64", **SMALL.get(name, {}))
        for name, folder in folders.items()
    }


def authors(name, pipe):
    """The token model and the law that the authors' settings make, by hand."""
    network = pipe.vision_language_encoder if name == "glm" else pipe.transformer
    if name == "janus":
        return Janus(network, pipe.processor), 5.0, {}, None
    if name == "emu3":
        model = Emu3(network, pipe.processor, "5:4", 32 * 40)
        return model, 3.0, {"top_k": 2048}, NEGATIVE
    if name == "chameleon":
        model = Chameleon(network, pipe.processor, pipe.decoder, grids=[(4, 4)])
        return model, 3.0, {"temperature": 0.7, "top_p": 0.9}, None
    model = GlmImage(network, pipe.processor, 64, 64)
    # The folder's own generation configuration says top_k 1.
    return model, 1.0, {"temperature": 0.9, "top_p": 0.75, "top_k": 1}, None


@pytest.mark.parametrize("name", MAKERS)
def test_the_authors_settings_are_the_defaults(name, pipes):
    pipe = pipes[name]
    model, scale, law, negative = authors(name, pipe)
    sampler = get_sampler("ar", **law)
    expected = sampler(
        model, [ImagePrompt("a cat", negative)], seeds=[(7, 0)], guidance_scale=scale
    )
    out = pipe("a cat", seed=7, progress=False, **PICTURE[name])
    assert torch.equal(out.tokens, expected.tokens)
    assert out.images[0].mode == "RGB"
    again = arvision.sample(pipe, "a cat", seed=7, progress=False, **PICTURE[name])
    assert torch.equal(again.tokens, expected.tokens)
    assert again.stats.forward_passes < out.stats.forward_passes  # sjd, which draws the same
    assert again.images[0].tobytes() == out.images[0].tobytes()


HUB_IDS = {
    "deepseek-community/Janus-Pro-1B": "janus",
    "Emu3-community/Emu3-Gen-hf": "emu3",
    "leloy/Anole-7b-v0.1-hf": "chameleon",
    "zai-org/GLM-Image": "glm",
}


def test_the_lines_of_the_readme(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parent.parent / "README.md").read_text()
    found = [b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "zai-org" in b]
    assert len(found) == 2
    assert all(name in found[0] for name in HUB_IDS)
    for block in found:
        for name, tiny_name in HUB_IDS.items():
            block = block.replace(name, str(folders[tiny_name]))
        block = block.replace("vqgan.ckpt", str(folders["chameleon"] / "vqgan.ckpt"))
        # Sizes and steps that a tiny network draws in seconds.
        block = re.sub(r"(720|1024)", "64", block)
        block = block.replace('decoder="', 'grids=[(4, 4)], decoder="')
        block = block.replace("width=64).images", "width=64, num_inference_steps=1).images")
        (tmp_path / "fox.png").unlink(missing_ok=True)
        exec(compile(block, "README.md", "exec"), {})
        with Image.open(tmp_path / "fox.png") as picture:
            assert picture.size == (64, 64)


@pytest.mark.parametrize("name", MAKERS)
def test_batches_equal_singles_and_a_saved_pipeline(name, pipes, tmp_path):
    pipe = pipes[name]
    run = {"progress": False, "output_type": "np", **PICTURE[name]}
    source: dict[str, Any] = {}
    if name == "glm":
        source["image"] = [Image.new("RGB", (64, 64), "red")]
    both = pipe(["a cat", "two owls"], seed=[3, 4], **run, **{k: v * 2 for k, v in source.items()})
    alone = pipe("two owls", seed=[4], **run, **source)
    assert torch.equal(alone.tokens[0], both.tokens[1])
    assert abs(alone.images[0] - both.images[1]).max() < 1e-6
    pipe.sampler = get_sampler("sjd", window=4, **_law(pipe))
    pipe.save_pretrained(tmp_path)
    loaded = arvision.load(tmp_path, device="cpu", dtype="float64")
    assert type(loaded) is type(pipe)
    if name != "glm":  # diffusers' folder has no place for a sampler
        assert loaded.sampler.config["window"] == 4
    again = loaded("two owls", seed=[4], **run, **source)
    assert torch.equal(again.tokens, alone.tokens)
    assert abs(again.images - alone.images).max() < 1e-6
    pipe.sampler = get_sampler("ar", **_law(pipe))


def _law(pipe):
    return {key: pipe.config[key] for key in ("temperature", "top_k", "top_p")}


def test_editing_by_name(pipes):
    pipe = pipes["glm"]
    pictures = [Image.new("RGB", (64, 32), "red"), Image.new("RGB", (32, 32), "blue")]
    out = arvision.sample(
        pipe, "make it green", "ar", image=pictures, seed=1, progress=False, output_type="pt"
    )
    assert out.images.shape == (1, 3, 32, 64)  # the size of the first source
    assert out.tokens.shape == (1, 2)
    model = GlmImage(pipe.vision_language_encoder, pipe.processor, 32, 64, editing=True)
    sampler = get_sampler("ar", temperature=0.9, top_p=0.75, top_k=1)
    prompt = ImagePrompt("make it green", images=pictures)
    expected = sampler(model, [prompt], seeds=[(1, 0)]).tokens
    assert torch.equal(out.tokens, expected)


def test_negative_prompts_and_sizes(pipes):
    pipe = pipes["emu3"]
    run = {"seed": 2, "progress": False, "output_type": "latent", "height": 32, "width": 24}
    own = pipe("a cat", **run).tokens
    assert own.shape == (1, 12)
    assert torch.equal(pipe("a cat", negative_prompt=NEGATIVE, **run).tokens, own)
    assert not torch.equal(pipe("a cat", negative_prompt="blurry", **run).tokens, own)
    two = pipe(["a cat", "a cat"], negative_prompt=["blurry", NEGATIVE], **run)
    assert torch.equal(two.tokens[1:], pipe("a cat", **run | {"seed": [(2, 1)]}).tokens)
    plain = pipe("a cat", negative_prompt="", **run).tokens
    model = Emu3(pipe.transformer, pipe.processor, "3:4", 32 * 24)
    sampler = get_sampler("ar", top_k=2048)
    expected = sampler(model, ["a cat"], seeds=[(2, 0)], guidance_scale=3.0).tokens
    assert torch.equal(plain, expected)


@pytest.mark.parametrize(
    ("name", "prompt", "call", "message"),
    [
        ("janus", "a cat", {"height": 512}, "512x10: Janus draws 10x10 pixels only"),
        ("janus", "a cat", {"image": Image.new("RGB", (8, 8))}, "1 source images: Janus draws"),
        ("emu3", "a cat", {"height": 30}, "height 30: expected a multiple of 8"),
        ("emu3", "a cat", {"width": 0}, "width 0: expected an integer"),
        ("emu3", ["a", "b"], {"negative_prompt": ["c"]}, "1 negative prompts for 2 prompts"),
        ("emu3", " ", {}, "empty prompt"),
        ("emu3", [], {}, "no prompt"),
        ("janus", 5, {}, "prompt '5': expected a text"),
        ("janus", {"a": 1}, {}, "expected a text, ids"),
        ("janus", "a cat", {"negative_prompt": 3}, "negative prompt '3': expected a text"),
        ("chameleon", "a cat", {"width": 320}, "Chameleon and Anole draw 512x512 only"),
        ("chameleon", "a cat", {"output_type": "jpg"}, "output_type 'jpg': expected one of"),
        ("glm", "a cat", {"height": 100}, "height 100: expected a multiple of 32"),
        ("glm", "a cat", {"negative_prompt": "blurry"}, "GLM-Image has none"),
        ("glm", torch.tensor([1, 2]), {}, "expected a text"),
        ("glm", "a cat", {"num_inference_steps": 0}, "num_inference_steps 0"),
        ("janus", "a cat", {"colour": 3}, "colour"),
    ],
)
def test_bad_calls_are_one_line_before_any_pass(name, prompt, call, message, pipes, monkeypatch):
    pipe = pipes[name]
    network = pipe.vision_language_encoder if name == "glm" else pipe.transformer
    monkeypatch.setattr(type(network), "forward", None)
    with pytest.raises((InputError, TypeError), match=message) as caught:
        pipe(prompt, seed=0, progress=False, **call)
    assert "\n" not in str(caught.value)


def test_other_pipelines_say_what_they_do_not_take(tiny_pipeline):
    with pytest.raises(InputError, match="height 64: this model takes none"):
        arvision.sample(tiny_pipeline, 1, height=64)
    with pytest.raises(InputError, match="image without mask_image: expected a mask"):
        arvision.sample(tiny_pipeline, 1, image=Image.new("RGB", (8, 8)))


def test_folders_that_do_not_fit(folders, tmp_path):
    folder = tmp_path / "janus"
    shutil.copytree(folders["janus"], folder)
    from safetensors.torch import load_file, save_file

    weights = folder / "model.safetensors"
    whole, data = load_file(weights), weights.read_bytes()
    lm_head = whole.pop("lm_head.weight")
    save_file(whole, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"key 'lm_head.weight' is missing"):
        arvision.load(folder)
    save_file(whole | {"lm_head.weight": lm_head[1:].contiguous()}, weights)
    with pytest.raises(CheckpointError, match=r"janus.*"):
        arvision.load(folder)
    weights.write_bytes(data[:-40])
    with pytest.raises(CheckpointError, match=r"model.safetensors: \d+ bytes, its header tells"):
        arvision.load(folder)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"has no weights, .* may hold code"):
        arvision.load(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "pytorch_model.bin").rename(weights)
    weights.write_bytes(data)
    config["architectures"] = ["LlamaForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="unknown class of an image network 'LlamaForCausalLM'"):
        arvision.load(folder)
    with pytest.raises(InputError, match="wiggle"):
        arvision.load(folders["janus"], wiggle=3)
    with pytest.raises(InputError, match="decoder x: Janus"):
        arvision.load(folders["janus"], decoder="x")
    with pytest.raises(InputError, match=r"expected one of them"):
        arvision.load(folders["janus"], device="cpu", device_map="cpu")
    with pytest.raises(InputError, match=r"decoder: .* takes none"):
        arvision.load("llamagen-fashion", decoder="x")


def test_what_is_missing_is_told_before_any_pass(folders, tmp_path):
    folder = tmp_path / "chameleon"
    shutil.copytree(folders["chameleon"], folder)
    (folder / "vqgan.ckpt").unlink()
    pipe = arvision.load(folder, device="cpu", grids=[(4, 4)])
    with pytest.raises(InputError, match=r"no decoder.*expected decoder= the path"):
        pipe("a cat", seed=0)
    assert pipe("a cat", seed=0, output_type="latent", progress=False).tokens.shape == (1, 16)
    given = arvision.load(
        folder, device="cpu", grids=[(4, 4)], decoder=folders["chameleon"] / "vqgan.ckpt"
    )
    assert given("a cat", seed=0, progress=False).images[0].mode == "RGB"
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / name).unlink(missing_ok=True)
    written = given("a cat", seed=0, output_type="latent", progress=False).tokens
    # A tokenizer alone writes the same, and reads no pictures.
    bare = arvision.load(folder, device="cpu", grids=[(4, 4)])
    assert torch.equal(bare("a cat", seed=0, output_type="latent", progress=False).tokens, written)
    with pytest.raises(InputError, match="this model has no processor but a tokenizer"):
        bare("a cat", seed=0, output_type="latent", image=Image.new("RGB", (32, 32)))
    bare.save_pretrained(folder / "saved")
    again = arvision.load(folder / "saved", device="cpu")
    assert torch.equal(again("a cat", seed=0, output_type="latent", progress=False).tokens, written)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    held = arvision.load(folder, device="cpu", grids=[(4, 4)], processor=bare.processor)
    assert torch.equal(held("a cat", seed=0, output_type="latent", progress=False).tokens, written)
    bare = arvision.load(folder, device="cpu", grids=[(4, 4)])
    with pytest.raises(InputError, match="'a cat': this model has no processor, expected ids"):
        bare("a cat", seed=0, output_type="latent")
    ids = tiny.chameleon_prompts([3])[0]
    drawn = bare(ids, seed=0, output_type="latent", progress=False).tokens
    assert torch.equal(drawn, bare(ids.tolist(), seed=0, output_type="latent").tokens)


def test_lumina_by_its_own_class_name(folders, tmp_path):
    folder = tmp_path / "lumina"
    shutil.copytree(folders["chameleon"], folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "architectures": ["ChameleonXLLMXForConditionalGeneration"],
        "model_type": "chameleon_xllmx",
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / name).unlink(missing_ok=True)
    pipe: Any = arvision.load(folder, device="cpu", height=64, width=64)
    assert (pipe.config["top_k"], pipe.config["top_p"]) == (2000, 1.0)
    with pytest.raises(InputError, match="96x64: more than the 64x64 pixels that this Lumina-mGPT"):
        pipe("a cat", seed=0, height=96)
    ids = tiny.chameleon_prompts([3], sides=(4, 4))[0]
    assert pipe(ids, seed=0, output_type="latent", progress=False).tokens.shape == (1, 16)
    named = folder.rename(tmp_path / "Lumina-mGPT-7B-768")
    model: Any = arvision.load(named, device="cpu").model
    assert (model.layout_name, model.picture_size) == ("lumina", (768, 768))


@pytest.fixture
def hub(folders, monkeypatch):
    served = Hub()
    served.repos = {f"some-one/{name}": folder for name, folder in folders.items()}
    template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", served.url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield served
    served.close()
    shutil.rmtree(os.environ["HF_HUB_CACHE"])  # of this run of the tests, see conftest.py
    os.mkdir(os.environ["HF_HUB_CACHE"])


@pytest.mark.parametrize("name", ["janus", "glm"])
def test_from_the_hub(name, hub, pipes, tmp_path):
    where = {"cache_dir": tmp_path, "device": "cpu", "dtype": "float64"}
    run = {"seed": 7, "progress": False, "output_type": "latent", **PICTURE[name]}
    if name == "glm":
        run["image"] = Image.new("RGB", (64, 64), "red")
    pipe = arvision.load(f"some-one/{name}", **where)
    expected = pipes[name]("a cat", **run).tokens
    assert torch.equal(pipe("a cat", **run).tokens, expected)
    assert set(arvision.list_samplers(f"some-one/{name}")) >= {"ar", "sjd", "gsd"}
    hub.close()
    again = arvision.load(f"some-one/{name}", local_files_only=True, **where)
    assert torch.equal(again("a cat", **run).tokens, expected)


def test_the_command_line_draws_and_tells(hub, folders, tmp_path, cli):
    out = tmp_path / "a.png"
    line = ["sample", "--model", str(folders["emu3"]), "--prompt", "a cat", "--quiet", "--json"]
    done = cli(*line, "--height", "16", "--width", "32", "--negative", "bad", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == 8
    done = cli(*line, "--image", str(tmp_path / "none.png"))
    assert done.returncode == 2
    assert "none.png: expected a picture" in done.stderr
    facts = json.loads(cli("info", str(folders["glm"]), "--json").stdout)
    assert facts["what"] == "a pipeline (GlmImagePipeline)"
    assert "parameters" in facts["parts"]["vision_language_encoder"]
    done = cli("info", "some-one/janus")
    assert 'arvision.load("some-one/janus")' in done.stdout, done.stderr
    assert not sum(hub.sent[name] for name in hub.sent if name.endswith(".safetensors"))
    done = cli("info", "some-one/nothing")
    assert done.returncode == 2
    assert "no such repository" in done.stderr


def test_a_pickle_of_the_hub_is_never_fetched(hub, tmp_path):
    pipe = arvision.load("some-one/chameleon", cache_dir=tmp_path, device="cpu", grids=[(4, 4)])
    assert pipe.decoder is None
    assert not [name for name in hub.asked if name.endswith(".ckpt")]


def test_shards_and_variants(folders, pipes, tmp_path):
    network = pipes["janus"].transformer
    network.float().save_pretrained(tmp_path / "a", max_shard_size="40KB", variant="small")
    network.double()
    pipes["janus"].processor.save_pretrained(tmp_path / "a")
    shards = sorted(path.name for path in (tmp_path / "a").glob("*.safetensors"))
    assert len(shards) > 1
    run = {"seed": 7, "progress": False, "output_type": "latent"}
    pipe = arvision.load(tmp_path / "a", device="cpu", dtype="float64", variant="small")
    assert torch.equal(pipe("a cat", **run).tokens, pipes["janus"]("a cat", **run).tokens)
    with pytest.raises(InputError, match=r"variant 'fp16': .* expected one of small"):
        arvision.load(tmp_path / "a", variant="fp16")
    (tmp_path / "a" / shards[-1]).unlink()
    with pytest.raises(CheckpointError, match=f"file {shards[-1]} is missing, which"):
        arvision.load(tmp_path / "a", variant="small")


def test_device_maps_and_types(folders):
    pipe = arvision.load(folders["janus"], device_map={"": "cpu"}, dtype="bfloat16")
    assert pipe.transformer.dtype is torch.bfloat16
    drawn = pipe("a cat", seed=0, progress=False, output_type="pt")
    assert drawn.images.isfinite().all()


# peft asks transformers for what a later release will call otherwise.
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_networks_wrapped_by_peft(folders, pipes, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    pipe = arvision.load(folders["emu3"], device="cpu", dtype="float64")
    run = {"seed": 7, "progress": False, "output_type": "latent", **PICTURE["emu3"]}
    plain = pipe("a cat", **run).tokens
    config = peft.LoraConfig(
        target_modules=["q_proj", "v_proj", "lm_head"], init_lora_weights=False
    )
    torch.manual_seed(0)
    network = peft.get_peft_model(pipe.transformer, config).double().eval()
    wrapped = ImageModelPipeline.from_model(Emu3(network, pipe.processor))
    changed = wrapped("a cat", **run).tokens
    assert not torch.equal(changed, plain)
    assert torch.equal(arvision.sample(wrapped, "a cat", **run).tokens, changed)
    merged = ImageModelPipeline(network.merge_and_unload(), pipe.processor)
    assert torch.equal(merged("a cat", **run).tokens, changed)


def test_quantised_networks(folders, pipes):
    pytest.importorskip("torchao", reason="torchao is not installed")
    import transformers
    from torchao.quantization import Int8WeightOnlyConfig  # pyright: ignore[reportMissingImports]

    config = transformers.TorchAoConfig(Int8WeightOnlyConfig(version=2))
    pipe = arvision.load(folders["janus"], quantization_config=config)
    weight = pipe.transformer.model.language_model.layers[0].self_attn.q_proj.weight
    assert type(weight) is not torch.nn.Parameter or weight.dtype is torch.int8
    run = {"seed": 7, "progress": False, "output_type": "latent"}
    drawn = pipe("a cat", **run).tokens
    assert torch.equal(arvision.sample(pipe, "a cat", **run).tokens, drawn)
    # Of GLM-Image it is the network that draws the codes, not the diffusion decoder.
    whole: Any = arvision.load(folders["glm"], device="cpu", quantize="int8")
    layer = whole.vision_language_encoder.model.language_model.layers[0]
    decoder = next(whole.transformer.parameters())
    assert type(layer.self_attn.q_proj.weight) is not type(decoder) is torch.nn.Parameter


def test_a_chameleon_encodes_pictures_and_continues_tokens(pipes):
    pipe = pipes["chameleon"]
    source = pipe(
        "a cat", seed=3, progress=False
    )  # this tiny one's pictures are smaller than real ones
    pixels = torch.rand(2, 3, 8, 8, dtype=torch.float64) * 2 - 1
    ids = (
        pipe.transformer.get_image_tokens(pixels)
        if hasattr(pipe.transformer, "get_image_tokens")
        else None
    )
    tokens = pipe.model.tokens_of(pixels)
    assert tokens.shape[0] == 2
    if ids is not None:
        assert torch.equal(pipe.model.columns.ids_of(tokens), ids)
    again = pipe("a cat", seed=3, known_tokens=source.tokens[0, :7], progress=False)
    assert torch.equal(again.tokens, source.tokens)


@pytest.mark.parametrize("name", ["janus", "emu3"])
def test_pictures_are_edited(name, pipes):
    pipe, size = pipes[name], PICTURE[name]
    source = pipe("a cat", seed=3, progress=False, **size)
    picture, sizes = source.images[0], {k: v for k, v in size.items() if k in ("height", "width")}
    model = pipe.model.at_size(sizes.get("height"), sizes.get("width"))
    mask = Image.new("L", picture.size)
    rows, columns = model.grid
    top, half = rows // 2 * picture.height // rows, rows // 2 * columns
    mask.paste(255, (0, top, picture.width, picture.height))
    call = {"image": picture, "mask_image": mask, "seed": 5, "progress": False, **size}
    plain = pipe("a dog", sampler=get_sampler("ar"), **call)
    assert plain.stats.given == [half]
    assert plain.stats.forward_passes == model.num_tokens - half - 1
    from arvision.models.pixels import pixels_of

    assert torch.equal(plain.tokens[:, :half], model.tokens_of(pixels_of(picture))[:, :half])
    fast = pipe("a dog", sampler=get_sampler("sjd", window=5), **call)
    assert torch.equal(fast.tokens, plain.tokens)
    again = pipe("a cat", seed=3, known_tokens=source.tokens[0, :half], progress=False, **size)
    assert torch.equal(again.tokens, source.tokens)


def test_glm_image_keeps_no_tokens_of_a_picture(pipes):
    picture = Image.new("RGB", (64, 64))
    with pytest.raises(InputError, match="keeps no tokens"):
        pipes["glm"]("a cat", image=picture, mask_image=picture.convert("L"), seed=0)


@pytest.mark.parametrize("name", ["janus", "emu3", "chameleon"])
def test_no_prompt_is_the_null_prompt_and_guidance_may_change(name, pipes):
    pipe, size = pipes[name], PICTURE[name]
    call = {"seed": 2, "progress": False, **size}
    free = pipe(None, guidance_scale=1.0, **call).tokens
    assert not torch.equal(free, pipe("a cat", guidance_scale=1.0, **call).tokens)
    ramp = [1.0 + place / 4 for place in range(free.shape[1])]
    plain = pipe("a cat", guidance_scale=ramp, sampler=get_sampler("ar"), **call).tokens
    fast = pipe("a cat", guidance_scale=ramp, sampler=get_sampler("sjd", window=5), **call).tokens
    assert torch.equal(plain, fast)
    assert not torch.equal(
        plain, pipe("a cat", guidance_scale=1.0, sampler=get_sampler("ar"), **call).tokens
    )
    each = pipe(
        ["a cat"] * 2, guidance_scale=[ramp, [1.0] * len(ramp)], sampler=get_sampler("ar"), **call
    )
    assert torch.equal(each.tokens[:1], plain)
