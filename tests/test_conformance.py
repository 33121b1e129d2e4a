"""What every sampler promises, on a real (random, tiny) network."""

from __future__ import annotations

import pytest
import torch

import arvision
from arvision import InputError, get_sampler
from arvision.decoding.noise import Noise
from arvision.testing import tiny_llamagen

TOKEN_SAMPLERS = [str(name) for name in arvision.list_samplers() if name.drives == "token"]
OPTIONS = {"draft": {"draft": "itself"}}


def make(name, model):
    sampler = get_sampler(name)
    return sampler.bind(draft=model) if "draft" in sampler.needs else sampler


@pytest.fixture(scope="module")
def model():
    return tiny_llamagen(grid=(4, 4)).to(torch.float64)


@pytest.mark.parametrize("name", TOKEN_SAMPLERS)
def test_a_seed_names_a_picture(model, name):
    seeds, classes = [(5, k) for k in range(5)], [0, 1, 2, 0, 1]
    batch = make(name, model)(model, classes, seeds=seeds, guidance_scale=2.0)
    assert batch.tokens.shape == (5, 16)
    assert batch.tokens.dtype == torch.int64
    assert 0 <= int(batch.tokens.min()) <= int(batch.tokens.max()) < 64
    for row in (0, 3):
        alone = make(name, model)(
            model, classes[row : row + 1], seeds=seeds[row : row + 1], guidance_scale=2.0
        )
        assert torch.equal(alone.tokens[0], batch.tokens[row])
    other = make(name, model)(model, classes, seeds=[(6, k) for k in range(5)], guidance_scale=2.0)
    assert not torch.equal(other.tokens, batch.tokens)


@pytest.mark.parametrize("name", TOKEN_SAMPLERS)
def test_statistics(model, name):
    calls = []
    out = make(name, model)(
        model,
        [0, 1],
        seeds=[0, 1],
        guidance_scale=1.0,
        on_step=lambda step, figures: calls.append((step, figures)),
    )
    stats = out.stats
    assert stats.tokens == 16
    assert 1 <= stats.forward_passes <= 16
    assert len(calls) == stats.forward_passes
    assert calls[-1][1]["finished"] == calls[-1][1]["total"] == 32
    mean_passes = sum(stats.passes_per_image) / 2
    assert stats.tokens_per_pass == pytest.approx(16 / mean_passes)
    assert max(max(row) for row in stats.commit_pass) == stats.forward_passes
    with pytest.raises(AttributeError, match="forward_passes"):
        _ = stats.no_such_thing


@pytest.mark.parametrize("name", TOKEN_SAMPLERS)
def test_configuration_round_trip(tmp_path, name):
    sampler = get_sampler(name, temperature=0.7, top_k=9)
    sampler.save_pretrained(tmp_path)
    again = type(sampler).from_pretrained(tmp_path)
    assert not isinstance(again, tuple)
    for option, value in sampler.config.items():
        assert option.startswith("_") or again.config[option] == value
    changed = again.with_options(top_k=3)
    assert changed.config["top_k"] == 3
    assert changed.config["temperature"] == 0.7


@pytest.mark.parametrize("name", TOKEN_SAMPLERS)
def test_bad_input(model, name):
    with pytest.raises(InputError, match="did you mean 'temperature'"):
        get_sampler(name, temperatur=1.0)
    with pytest.raises(InputError, match="top_p 0"):
        get_sampler(name, top_p=0)
    sampler = make(name, model)
    with pytest.raises(InputError, match="guidance_scale -1"):
        sampler(model, [0], seeds=[0], guidance_scale=-1)
    with pytest.raises(InputError, match="2 seeds for 1 condition"):
        sampler(model, [0], seeds=[0, 1])


def test_unknown_sampler_lists_the_known_ones():
    with pytest.raises(InputError, match=r"unknown sampler 'sdj': did you mean 'sjd'.*ar"):
        get_sampler("sdj")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window 0: expected an integer >= 1"),
        ({"window": 2.5}, "window 2.5"),
        ({"window": True}, "window True"),
        ({"coupling": "maximum"}, "unknown coupling 'maximum': did you mean 'maximal'"),
        ({"init": "zeros"}, "unknown init 'zeros'"),
    ],
)
def test_bad_sjd_options(options, message):
    with pytest.raises(InputError, match=message):
        get_sampler("sjd", **options)


def test_an_init_that_needs_a_grid_on_a_model_without_one():
    from arvision.testing import TableModel

    with pytest.raises(InputError, match="this model has none"):
        get_sampler("sjd", init="repeat_above")(TableModel(), [None], seeds=[0])


def test_stopping_from_the_callback(model):
    out = get_sampler("ar")(model, [0], seeds=[0], on_step=lambda step, figures: step == 4)
    assert out.stats.forward_passes == 4
    assert out.tokens[0, 5:].eq(0).all()


@pytest.mark.parametrize(
    "name",
    [*TOKEN_SAMPLERS, "sjd:tree=drift", "sjd:tree=static:coupling=maximal", "sjd:init=above"],
)
def test_every_number_of_a_run_is_that_of_its_position(model, name, monkeypatch):
    """What a run keeps of its noise is forgotten on the way: nothing may ask for it later."""
    asked = []
    kept = Noise.gumbel

    def checked(self, positions, num, dtype=torch.float64):
        found = kept(self, positions, num, dtype)
        alone = kept(Noise(self._words[:, [0, 2]].tolist()), positions, num, dtype)
        asked.append(torch.equal(found, alone))
        return found

    monkeypatch.setattr(Noise, "gumbel", checked)
    for window in (3, 16):
        sampler = make(name, model)
        if isinstance(sampler.config.get("window"), int):
            sampler = sampler.with_options(window=window)
        sampler(model, [0, 1, 2, 0], seeds=[(9, k) for k in range(4)], guidance_scale=3.0)
    assert all(asked)
    assert asked or name in ("gsd", "lantern", "sjd:tree=static:coupling=maximal")
