"""The engine draws what is ordered, as if each picture were alone."""

from __future__ import annotations

import gc
import time

import numpy as np
import pytest
import torch
from tiny_pipelines import tiny

pytest.importorskip("fastapi")

from arvision.decoding.loop import TokenLoop
from arvision.errors import InputError
from arvision.samplers import get_sampler
from arvision.serving import BusyError, ClosedError, Limits, Studio
from arvision.serving.lanes import Lane

REQUESTS = [
    {"prompt": "1", "seed": 3},
    {"prompt": "0", "seed": 4, "guidance_scale": 4.0, "temperature": 0.8},
    {"prompt": "2", "seed": 5, "guidance_scale": 1.5, "top_k": 9, "sampler": "sjd:window=4"},
    {"prompt": "1", "seed": 6, "guidance_scale": 2.0, "top_p": 0.8},
    {"prompt": "0", "seed": 7, "guidance_scale": 3.0, "sampler": "sjd:coupling=maximal:window=4"},
    {"prompt": "2", "seed": 8, "guidance_scale": 0.0, "temperature": 1.2},
    {"prompt": "2", "seed": 9, "temperature": 0.0},
    {"prompt": "2", "seed": 10, "guidance_scale": 2.0, "sampler": "sjd:window=8:tree=drift"},
]


@pytest.fixture
def studio():
    made = []

    def make(name="llamagen", **limits):
        made.append(Studio(tiny(name)[0], name, Limits(**limits)))
        return made[-1]

    yield make
    for one in made:
        one.close(30)


def alone(pipe, request):
    call = dict(request)
    spec = call.pop("sampler", "ar")
    prompt = call.pop("prompt")
    return pipe(prompt, sampler=get_sampler(spec), output_type="pil", progress=False, **call)


def test_pictures_that_come_at_any_time_are_those_of_the_pipeline_alone(studio):
    own = studio(batch=3)
    orders = []
    for number, request in enumerate(REQUESTS * 2):
        found = own.order(**request, n=1 + number % 2)
        own.engine.submit(found)
        orders += [(request, found)]
        time.sleep(0.01 * (number % 3))
    for request, found in orders:
        expected = alone(own.pipe, request | {"num_images_per_prompt": len(found)})
        for order, tokens, image in zip(found, expected.tokens, expected.images, strict=True):
            drawn = order.answer.result(60)
            assert drawn.tokens.tolist() == tokens.tolist(), request
            assert drawn.image.tobytes() == image.tobytes()
            assert drawn.passes >= 1


def test_pictures_share_passes(studio):
    own = studio(batch=4)
    orders = [order for seed in range(8) for order in own.order("1", seed=seed, sampler="ar")]
    own.engine.submit(orders)
    passes = sum(order.answer.result(60).passes for order in orders)
    made = own.metrics.registry.get_sample_value("arvision_passes_total")
    assert made is not None
    assert passes > 2.5 * made


def test_models_that_cannot_take_pictures_in_are_drawn_in_batches_by_arrival(studio):
    for name in ("var", "mar"):
        own = studio(name)
        orders = [order for seed in (3, 4) for order in own.order("1", seed=seed, n=2)]
        own.engine.submit(orders)
        expected = own.pipe(1, num_images_per_prompt=2, seed=4, progress=False)
        found = orders[3].answer.result(60)
        assert torch.allclose(found.tokens, expected.tokens[1], rtol=1e-4), name


def test_what_cannot_enter_a_running_batch_is_refused_where_that_is_wanted(studio):
    own = studio("var", batching="continuous")
    with pytest.raises(InputError, match="a scale model cannot take pictures into a running batch"):
        own.engine.submit(own.order("1"))
    own = studio(batching="continuous")
    with pytest.raises(InputError, match="sampler 'zipar' with these options cannot take"):
        own.engine.submit(own.order("1", sampler="zipar"))


def test_a_full_queue_refuses_all_of_a_request(studio):
    own = studio(batch=1, queue=3)
    first, three, four = (own.order("1", n=num) for num in (1, 3, 4))
    with own.engine._wake:  # nothing is begun in between
        own.engine.submit(first)
        with pytest.raises(BusyError, match="1 pictures wait and 3 more would: expected at most 3"):
            own.engine.submit(three)
        assert own.engine.num_waiting == 1
    with pytest.raises(InputError, match="4 pictures: expected at most 3, as many as may wait"):
        own.engine.submit(four)
    first[0].answer.result(60)


def test_a_prompt_that_the_model_refuses_takes_no_other_along(studio):
    own = studio()
    orders = [own.order(prompt, seed=1)[0] for prompt in ("1", "unknown", "2", "99")]
    own.engine.submit(orders)
    for place in (1, 3):
        with pytest.raises(InputError, match="class"):
            orders[place].answer.result(60)
    for place in (0, 2):
        expected = own.pipe((place and 2) or 1, seed=1, progress=False).tokens[0]
        assert orders[place].answer.result(60).tokens.tolist() == expected.tolist()


def test_pictures_that_nobody_waits_for_leave(studio):
    own = studio(batch=2)
    orders = [order for seed in range(6) for order in own.order("1", seed=seed)]
    own.engine.submit(orders)
    own.engine.drop(orders[1:5])
    for place in (0, 5):
        expected = own.pipe(1, seed=place, progress=False).tokens[0]
        assert orders[place].answer.result(60).tokens.tolist() == expected.tolist()
    assert all(order.answer.cancelled() for order in orders[1:5])
    assert own.engine.num_waiting == own.engine.num_drawing == 0


def test_pictures_of_a_batch_that_fails_are_drawn_again_alone(studio):
    own = studio(batch=4)
    model = own.model_at(None, lambda: own.pipe.model)
    network, fails = model.transformer, [True]
    forward = network.forward

    def failing(*arguments, **options):
        if fails and own.engine.num_drawing > 2:
            fails.clear()
            raise RuntimeError("an accelerator fell over")
        return forward(*arguments, **options)

    network.forward = failing
    orders = [order for seed in range(4) for order in own.order("1", seed=seed)]
    own.engine.submit(orders)
    found = [order.answer.result(60).tokens.tolist() for order in orders]
    assert not fails
    del network.forward
    for seed, tokens in enumerate(found):
        assert tokens == own.pipe(1, seed=seed, progress=False).tokens[0].tolist()


def test_what_was_ordered_is_drawn_before_the_end(studio):
    own = studio(batch=2)
    orders = [order for seed in range(5) for order in own.order("1", seed=seed)]
    own.engine.submit(orders)
    assert own.close(60)
    assert all(order.answer.done() and not order.answer.exception() for order in orders)
    with pytest.raises(ClosedError, match="the server is stopping"):
        own.engine.submit(own.order("1"))


def test_previews_show_what_is_final_and_change_no_token(studio):
    own = studio()
    shown = []
    (order,) = own.order("1", seed=2, previews=3, on_preview=shown.append, sampler="ar")
    own.engine.submit([order])
    drawn = order.answer.result(60)
    assert drawn.tokens.tolist() == own.pipe(1, seed=2, progress=False).tokens[0].tolist()
    assert len(shown) == 3
    grey = shown[0].getpixel((15, 15))
    assert [picture.getpixel((15, 15)) for picture in shown] == [grey] * 3
    greys = [int((np.asarray(picture) == grey).all(-1).sum()) for picture in shown]
    assert greys == sorted(greys, reverse=True)
    assert greys[0] > greys[2]


def test_batches_by_arrival_show_previews_too(studio):
    own = studio("var")
    shown = []
    (order,) = own.order("1", seed=2, previews=2, on_preview=shown.append)
    own.engine.submit([order])
    drawn = order.answer.result(60)
    assert len(shown) == 2
    assert all(picture.size == drawn.image.size for picture in shown)
    assert shown[0].tobytes() != drawn.image.tobytes()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prompt": "1", "n": 11}, "n 11: expected at most 10"),
        ({"prompt": "x" * 5000}, "prompt of 5,000 characters: expected at most 4,000"),
        ({"prompt": "1", "size": "64x64"}, "size 64x64: this model draws 16x16 only"),
        ({"prompt": "1", "size": "9000x16"}, "expected at most 4096 pixels a side"),
        ({"prompt": "1", "size": "large"}, 'expected "auto" or WIDTHxHEIGHT'),
        ({"prompt": "1", "temperature": 1e-30}, "temperature 1e-30: expected 0 or a number from"),
        ({"prompt": "1", "guidance_scale": 1e30}, "guidance_scale 1e\\+30: expected a number from"),
        ({"prompt": "1", "top_p": 3.0}, "top_p 3.0: expected 0 < top_p <= 1"),
        ({"prompt": "1", "sampler": "nothing"}, "unknown sampler 'nothing'"),
        ({"prompt": "1", "sampler": "draft:draft=/etc"}, "draft is for the server to say"),
        ({"prompt": "1", "sampler": "dd"}, "sampler 'dd' drives student models"),
    ],
)
def test_a_request_that_is_wrong_is_told_so_in_one_line(studio, request_, message):
    with pytest.raises(InputError, match=message):
        studio().order(**request_)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"batch": 0}, "batch 0: expected an integer >= 1"),
        ({"queue": 1.5}, "queue 1.5: expected an integer >= 1"),
        ({"timeout": 0}, "timeout 0: expected seconds > 0"),
        ({"timeout": float("nan")}, "timeout nan: expected seconds > 0"),
        ({"batching": "never"}, "batching 'never': expected one of auto, continuous, arrival"),
    ],
)
def test_bounds_that_are_none_are_refused(bounds, message):
    with pytest.raises(InputError, match=message):
        Limits(**bounds)


def test_a_lane_that_is_done_leaves_nothing_to_the_collector(studio):
    own = studio(batch=3)
    gc.collect()
    gc.disable()
    try:
        for request in (
            {"prompt": "1", "seed": 3},
            {"prompt": "0", "sampler": REQUESTS[4]["sampler"]},
        ):
            found = own.order(**request, n=2)
            own.engine.submit(found)
            for order in found:
                order.answer.result(60)
        until = time.monotonic() + 60
        while own.engine._lanes and time.monotonic() < until:
            time.sleep(0.01)
        left = {type(one).__name__ for one in gc.get_objects() if type(one) in (Lane, TokenLoop)}
    finally:
        gc.enable()
    assert left == set()
