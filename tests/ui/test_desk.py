"""What the page computes: fields read, draws side by side, painted masks, maps, HTML."""

from __future__ import annotations

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageDraw

import arvision
from arvision.acceptance import by_pass, colour, overlay
from arvision.errors import InputError
from arvision.ui import show
from arvision.ui.brush import for_painting, read_painting
from arvision.ui.desk import Bounds, Desk, Wishes, read_seeds
from arvision.ui.race import Race


@pytest.fixture(scope="module")
def desk():
    return Desk(["llamagen-fashion", "var-fashion"], Bounds(images=3, prompt=50))


def wish(**more):
    return Wishes(**{"model": "llamagen-fashion", "prompt": "sneaker", "seeds": "7", **more})


@pytest.fixture(scope="module")
def drawn(desk):
    shots = []
    for sides in desk.draw(wish(images=2)):
        shots.append([len(side.runner.pictures) for side in sides])
    return sides, shots


def test_a_draw_is_that_of_the_pipeline_whoever_runs_beside_it(drawn):
    sides, shots = drawn
    pipe = arvision.load("llamagen-fashion")
    alone = pipe("sneaker", num_images_per_prompt=2, seed=7, progress=False)
    for side in sides:
        assert torch.equal(side.runner.output.tokens, alone.tokens)
    assert shots[0] == [0, 0]
    assert len(shots) > 10
    assert shots[-1] == [2, 2]
    assert show.status_of(sides, 1.0).endswith("2 of 2 pictures are the same, token for token.")


def test_what_a_side_tells(drawn):
    sides, _ = drawn
    ar, sjd = sides
    assert dict(show.figures_of(ar))["passes"] == "63"
    assert float(dict(show.figures_of(sjd))["tokens per pass"]) > 1
    for side in sides:
        # One token comes with the prompt.
        assert [sum(by_pass(row)) for row in show.passes_of(side)] == [63, 63]
    assert set(by_pass(show.passes_of(ar)[0])) == {1}
    most = show.most_accepted(sides)
    assert most == max(max(by_pass(row)) for row in show.passes_of(sjd))
    text = show.side_of(sjd, most)
    assert text.count("<img") == 4
    assert text.count("<rect") == sjd.runner.output.stats["forward_passes"]


def test_pictures_of_other_tokens_are_not_called_the_same(desk):
    *_, sides = desk.draw(wish(samplers=["ar", "sjd:coupling=maximal"], is_shown=False))
    first, second = (side.runner.output.tokens for side in sides)
    same = int(torch.equal(first[0], second[0]))
    assert show.same_pictures(sides).startswith(f"{same} of 1 ")
    assert [side.is_lossless for side in sides] == [True, True]


def test_a_scale_model_shows_bars_without_a_map(desk):
    *_, sides = desk.draw(wish(model="var-fashion", samplers=["ar", ""]))
    assert len(sides) == 1
    text = show.side_of(sides[0], show.most_accepted(sides))
    assert text.count("<img") == 1
    assert by_pass(show.passes_of(sides[0])[0])[-1] == 64


def test_closing_stops_after_a_pass(desk):
    going = desk.draw(wish(samplers=["ar"]))
    sides = next(going)
    for _ in range(3):
        next(going)
    going.close()
    stats = sides[0].runner.output.stats
    assert stats["interrupted"]
    assert stats["forward_passes"] < 40


def test_a_draw_ends_at_its_time_limit():
    hurried = Desk(["llamagen-fashion"], Bounds(timeout=1e-6))
    *_, sides = hurried.draw(wish(samplers=["ar"]))
    assert sides[0].runner.output.stats["interrupted"]
    assert "limit: 1e-06 s" in show.status_of(sides, 1e-6)


def test_whoever_has_used_less_time_makes_the_next_pass():
    order = []

    def draw(number, seconds):
        def run(on_step):
            for step in range(1, 13):
                order.append([number, *(runner.seconds for runner in race.runners)])
                time.sleep(seconds)
                on_step(None, step, step, {"finished": step})
            return SimpleNamespace(images=[])

        return run

    race = Race([draw(0, 0.001), draw(1, 0.012)])
    for _ in race.run(60):
        pass
    both = [entry for entry in order[1:] if entry[0] == 0]
    assert all(first <= second for _, first, second in both if second)
    slow = [k for k, entry in enumerate(order) if entry[0] == 1]
    # The fast one is done while the slow one has made few passes.
    assert slow[-1] - slow[-6] == 5
    assert sum(entry[0] == 0 for entry in order) == 12


def test_what_one_raises_is_its_own():
    def fails(on_step):
        raise RuntimeError("broken")

    race = Race([fails, lambda on_step: SimpleNamespace(images=["drawn"])])
    for _ in race.run(60):
        pass
    assert str(race.runners[0].error) == "broken"
    assert race.runners[1].pictures == ["drawn"]


LEFT = """
import threading, time, types
from arvision.ui.race import Race

def draw(on_step):
    pipe = types.SimpleNamespace(_interrupt=False)
    for step in range(1, 6001):
        time.sleep(0.01)
        on_step(pipe, step, step, {"finished": step, "preview": []})
        if pipe._interrupt:
            break
    print(step < 6000)
    return types.SimpleNamespace(images=[])

going = Race([draw, draw]).run(60)
next(going)
"""


def test_the_end_of_the_program_ends_draws_after_their_passes():
    done = subprocess.run(
        [sys.executable, "-c", LEFT], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\nTrue\n", "")


@pytest.mark.parametrize(
    ("text", "images", "expected"),
    [
        ("7", 2, [(7, 0), (7, 1)]),
        ("7, 8", 1, [(7, 0), (8, 0)]),
        (" 7:3 2 ", 1, [(7, 3), (2, 0)]),
    ],
)
def test_seeds(text, images, expected):
    assert read_seeds(text, images, 3) == expected


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seeds": "x"}, "seed 'x': expected"),
        ({"seeds": ""}, "seed ''"),
        ({"seeds": "1:2:3"}, "seed '1:2:3'"),
        ({"seeds": "9" * 19}, "seed '999"),
        ({"seeds": "1 2 3 4"}, "more than 3 pictures"),
        ({"images": 4}, "images 4: expected at most 3"),
        ({"images": 0}, "images 0"),
        ({"prompt": " "}, "empty prompt"),
        ({"prompt": "x" * 51}, "prompt of 51 characters"),
        ({"samplers": ["", " "]}, "no sampler"),
        ({"samplers": ["nothing"]}, "unknown sampler 'nothing'"),
        ({"samplers": ["dd"]}, "drives student"),
        ({"samplers": ["draft:draft=/etc"]}, "draft is for the server to say"),
        ({"samplers": ["dd@mar-fashion"]}, "unknown model of this page 'mar-fashion'"),
        ({"model": "mar-fashion"}, "unknown model of this page"),
        ({"guidance": "much"}, "guidance 'much'"),
        ({"painting": {}}, "no picture to edit"),
    ],
)
def test_wrong_fields_are_one_line_before_anything_is_drawn(desk, wrong, message):
    with pytest.raises(InputError, match=message.replace("(", "\\(")) as raised:
        desk.start(wish(**wrong))
    assert "\n" not in str(raised.value)


def test_what_only_the_model_knows_is_told_by_the_runner(desk):
    *_, sides = desk.draw(wish(prompt="hat", samplers=["ar"]))
    assert "unknown class 'hat'" in str(sides[0].runner.error)


def test_unknown_models_and_bounds_are_refused():
    with pytest.raises(InputError, match="did you mean 'llamagen-fashion"):
        Desk(["llamagen-fasion"])
    with pytest.raises(InputError, match="queue 0"):
        Bounds(queue=0)
    with pytest.raises(InputError, match="timeout -1"):
        Bounds(timeout=-1)
    offered = Desk().models
    assert "llamagen-fashion" in offered
    assert not [name for name in offered if name.endswith(("-draft", "classifier"))]


def painted(picture, box):
    layer = Image.new("RGBA", picture.size, (0, 0, 0, 0))
    ImageDraw.Draw(layer).rectangle(box, fill=(255, 0, 0, 255))
    return {"background": picture, "layers": [layer], "composite": None}


def test_a_painting_is_a_picture_and_a_mask(drawn):
    small = drawn[0][0].runner.pictures[0]
    large = for_painting(small)
    assert large.size == (384, 384)
    picture, mask = read_painting(painted(large, (0, 192, 383, 383)), (32, 32))
    assert picture.tobytes() == small.convert("RGB").tobytes()
    half = [0] * 16 * 32 + [255] * 16 * 32
    assert list(mask.tobytes()) == half
    # One touched pixel of twelve times twelve is white, and a file of another shape is cut.
    _, mask = read_painting(painted(large, (0, 0, 2, 2)), (32, 32))
    assert mask.getbbox() == (0, 0, 1, 1)
    wide = Image.new("RGB", (300, 100), "white")
    picture, mask = read_painting(painted(wide, (100, 0, 149, 99)), (32, 32))
    assert picture.size == (32, 32)
    assert mask.getbbox() == (0, 0, 16, 32)
    with pytest.raises(InputError, match="nothing is painted"):
        read_painting({"background": large, "layers": []}, (32, 32))


def test_redrawing_keeps_what_is_not_painted(desk, drawn):
    source = for_painting(drawn[0][0].runner.pictures[0])
    edit = painted(source, (0, 192, 383, 383))
    *_, sides = desk.draw(wish(prompt="bag", painting=edit, is_shown=False))
    assert [side.runner.output.stats["given"] for side in sides] == [[32], [32]]
    assert show.same_pictures(sides).startswith("1 of 1")
    row = show.passes_of(sides[0])[0]
    assert row[:32] == [0] * 32
    shown = overlay(source, row, (8, 8), 4)
    assert shown.crop((0, 0, 384, 192)).tobytes() == source.crop((0, 0, 384, 192)).tobytes()
    assert shown.tobytes() != source.tobytes()


def test_the_map_has_a_colour_for_each_count():
    assert by_pass([0, 1, 1, 3]) == [2, 0, 1]
    assert colour(1, 9) == (68, 1, 84)
    assert colour(9, 9) == colour(12, 9) == (253, 231, 37)
    black = Image.new("RGB", (4, 2))
    shown = overlay(black, [0, 1, 2, 2], (2, 2), 2)
    first, second, third = (shown.getpixel(place) for place in ((0, 0), (2, 0), (0, 1)))
    assert first == (0, 0, 0)
    assert second == tuple(int(0.6 * part) for part in colour(1, 2))
    assert third == shown.getpixel((3, 1)) == tuple(int(0.6 * part) for part in colour(2, 2))


def test_what_people_write_is_no_html(desk):
    assert "<b>" not in show.told("<b>", is_error=True)
    side = SimpleNamespace(
        sampler='<script>"', is_lossless=True, num_tokens=1, grid=None, identities=[(1, 2)]
    )
    side.runner = SimpleNamespace(
        pictures=[Image.new("RGB", (2, 2))], finished=0, passes=0, seconds=0.0, output=None
    )
    side.runner.error = None
    text = show.side_of(side, 2)  # type: ignore[arg-type]
    assert "<script>" not in text
    assert 'seed 1:2"' in text
