"""Previews: pictures of what is final so far, which change no token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import tiny

from arvision import InputError, get_sampler

SAMPLERS = {
    "llamagen": ["ar", "sjd:window=4", "zipar"],
    "var": ["ar"],
    "infinity": ["ar"],
    "mar": ["ar", "csjd:window=2"],
    "nextstep": ["ar"],
}


@pytest.mark.parametrize("family", SAMPLERS)
def test_previews_show_what_is_final_and_change_no_token(family):
    pipe, prompt = tiny(family)
    for name in SAMPLERS[family]:
        sampler: Any = get_sampler(name)
        plain = pipe(prompt, seed=1, sampler=sampler, num_images_per_prompt=2)
        found: list[tuple[int, list[Any]]] = []

        def keep(
            _: Any, step: int, timestep: int, given: dict[str, Any], found: Any = found
        ) -> None:
            assert set(given) >= {"finished", "total", "accepted"}
            if "preview" in given:
                found.append((step, given["preview"]))

        call: dict[str, Any] = {"callback_on_step_end": keep, "preview_every": 2}
        out = pipe(prompt, seed=1, sampler=sampler, num_images_per_prompt=2, **call)
        assert torch.equal(out.tokens, plain.tokens)
        passes = out.stats.forward_passes
        assert [step for step, _ in found] == list(range(2, passes + 1, 2))
        assert all(len(pictures) == 2 for _, pictures in found)
        sizes = {picture.size for _, pictures in found for picture in pictures}
        assert sizes == {out.images[0].size}
        if passes % 2 == 0:  # the last preview is the picture
            for last, image in zip(found[-1][1], out.images, strict=True):
                np.testing.assert_allclose(np.array(last, int), np.array(image, int), atol=1)


def test_rows_that_are_not_drawn_are_grey():
    pipe, prompt = tiny("llamagen")
    found: list[Any] = []

    def keep(pipe: Any, step: int, timestep: int, given: dict[str, Any]) -> None:
        found.append(np.array(given["preview"][0]))

    out = pipe(prompt, seed=1, callback_on_step_end=keep, preview_every=1)
    assert len(found) == 15
    for number, picture in enumerate(found):
        is_drawn = np.arange(16) < number + 2
        cells = np.kron(is_drawn.reshape(4, 4), np.ones((4, 4), bool))
        assert (picture[~cells] == 128).all()
    assert np.array_equal(found[-1], np.array(out.images[0]))


def test_bad_previews_are_one_line(tiny_pipeline):
    for call, message in (
        ({"preview_every": 2}, "preview_every without callback_on_step_end"),
        ({"preview_every": 0, "callback_on_step_end": print}, "expected an integer >= 1"),
    ):
        with pytest.raises(InputError, match=message):
            tiny_pipeline("cat", seed=0, **call)


def test_the_command_writes_previews(tmp_path, cli):
    base = (
        "sample",
        "--model",
        "llamagen-fashion",
        "--prompt",
        "bag",
        "--sampler",
        "sjd",
        "--quiet",
    )
    preview = tmp_path / "now.png"
    done = cli(*base, "--preview", str(preview), "--preview-every", "4")
    assert done.returncode == 0, done.stderr
    with Image.open(preview) as picture:
        assert picture.size == (96, 96)
        assert (np.array(picture)[-3:, -3:] == 128).all()
    done = cli(*base, "--preview-every", "4")
    assert done.returncode == 2
    assert "--preview-every without --preview" in done.stderr
