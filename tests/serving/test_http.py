"""The HTTP application: answers, errors, streams, limits."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import socket
import threading
from threading import Event

import pytest
import torch
from image_networks import glm_generate, glm_prompts, tiny_glm
from PIL import Image
from tiny_pipelines import tiny

pytest.importorskip("fastapi")

from starlette.testclient import TestClient

from arvision.errors import InputError
from arvision.hosting import listen
from arvision.image_pipeline import ImageModelPipeline
from arvision.serving import Limits, Studio, make_app

PATH = "/v1/images/generations"


@contextlib.contextmanager
def serving(pipe=None, token=None, **limits):
    studio = Studio(pipe or tiny("llamagen")[0], "tiny", Limits(**limits))
    with TestClient(make_app(studio, token)) as client:
        yield client, studio
    assert not studio.engine.is_alive


@pytest.fixture(scope="module")
def server():
    with serving(images=4, body=4096) as found:
        yield found


def picture(entry):
    return Image.open(io.BytesIO(base64.b64decode(entry["b64_json"])))


def events(text):
    blocks = [block.split("\n") for block in text.strip().split("\n\n")]
    return [(lines[0][7:], json.loads(lines[1][6:])) for lines in blocks]


def test_pictures_are_those_of_the_pipeline(server):
    client, studio = server
    body = {"prompt": "1", "n": 2, "seed": 5, "guidance_scale": 3.0, "temperature": 0.9}
    answer = client.post(PATH, json=body)
    assert answer.status_code == 200
    found = answer.json()
    law = {"guidance_scale": 3.0, "temperature": 0.9}
    expected = studio.pipe(1, num_images_per_prompt=2, seed=5, progress=False, **law)
    for entry, image in zip(found["data"], expected.images, strict=True):
        assert picture(entry).tobytes() == image.tobytes()
    assert found["seed"] == 5
    assert found["size"] == "16x16"
    assert found["usage"]["output_tokens"] == 32


def test_a_seed_that_was_drawn_is_told_and_draws_the_picture_again(server):
    client, _ = server
    first = client.post(PATH, json={"prompt": "1"}).json()
    again = client.post(PATH, json={"prompt": "1", "seed": first["seed"]}).json()
    assert again["data"] == first["data"]


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_pictures_come_in_other_formats(server, format):
    client, _ = server
    found = client.post(PATH, json={"prompt": "1", "seed": 1, "output_format": format}).json()
    assert picture(found["data"][0]).format == format.upper()


def test_a_stream_shows_previews_and_then_the_picture(server):
    client, studio = server
    body = {"prompt": "1", "seed": 5, "stream": True, "partial_images": 2, "sampler": "ar"}
    answer = client.post(PATH, json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    told = events(answer.text)
    names = [name for name, _ in told]
    assert names == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [content["partial_image_index"] for _, content in told[:2]] == [0, 1]
    expected = studio.pipe(1, seed=5, progress=False).images[0]
    assert picture(told[-1][1]).tobytes() == expected.tobytes()
    assert picture(told[0][1]).tobytes() != expected.tobytes()
    assert told[-1][1]["usage"]["output_tokens"] == 16


WRONG = [
    ({"prompt": "zebra"}, 422, "class 'zebra'"),
    ({"prompt": ""}, 422, "prompt: string should have at least 1 character"),
    ({}, 422, "prompt: field required"),
    ({"prompt": "1", "n": 5}, 422, "n 5: expected at most 4"),
    ({"prompt": "1", "n": 0}, 422, "n: input should be greater than or equal to 1"),
    ({"prompt": "1", "nn": 1}, 422, "nn: extra inputs are not permitted"),
    ({"prompt": "1", "seed": -1}, 422, "seed: input should be greater than or equal to 0"),
    ({"prompt": "1", "size": "1x1"}, 422, "size 1x1: this model draws 16x16 only"),
    ({"prompt": "1", "sampler": "sjd:window=0"}, 422, "window 0: expected an integer >= 1"),
    ({"prompt": "1", "stream": True, "n": 2}, 422, "n 2 with stream: expected 1"),
    ({"prompt": "1", "partial_images": 2}, 422, "partial_images 2 without stream"),
    ({"prompt": "1", "response_format": "url"}, 422, 'expected "b64_json"'),
    ({"prompt": "1", "model": "other"}, 404, "model 'other': this server has 'tiny'"),
    ({"prompt": "1", "stream": True, "guidance_scale": 1e9}, 422, "guidance_scale 1000000000.0"),
    ({"prompt": "zebra", "stream": True}, 422, "class 'zebra'"),
]


@pytest.mark.parametrize(("body", "status", "message"), WRONG)
def test_what_is_wrong_is_told_in_one_line_and_in_openais_shape(server, body, status, message):
    answer = server[0].post(PATH, json=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert message in error["message"]
    assert "\n" not in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_other_requests_are_refused_in_the_same_shape(server):
    client, _ = server
    for answer, status in (
        (client.post(PATH, content=b"{", headers={"content-type": "application/json"}), 422),
        (client.post(PATH, content=b"\xff\xfe"), 422),
        (client.post(PATH, json=[1]), 422),
        (client.post(PATH, json={"prompt": "x" * 5000}), 413),
        (client.get("/nothing"), 404),
        (client.delete(PATH), 405),
        (client.post("/generate", json={}), 404),
    ):
        assert answer.status_code == status
        assert isinstance(answer.json()["error"]["message"], str)
    for answer, said in (
        (client.post("/v1/images/generation", json={}), f"did you mean '{PATH}'? expected one of"),
        (client.post("/generate", json={}), "unknown path '/generate': expected one of /health, "),
        (client.delete(PATH), f"DELETE {PATH}: expected POST"),
    ):
        assert said in answer.json()["error"]["message"]


def test_models_health_and_metrics(server):
    client, _ = server
    assert [entry["id"] for entry in client.get("/v1/models").json()["data"]] == ["tiny"]
    assert client.get("/v1/models/tiny").json()["id"] == "tiny"
    assert client.get("/v1/models/other").status_code == 404
    assert client.get("/health").json()["status"] == "ok"
    client.post(PATH, json={"prompt": "1"})
    found = client.get("/metrics").text
    assert 'arvision_requests_total{path="/v1/images/generations",status="200"}' in found
    assert "arvision_pictures_total" in found
    assert "arvision_waiting 0.0" in found


def test_a_token_is_asked_for():
    with serving(token="secret") as (client, _):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            answer = client.post(PATH, json={"prompt": "1"}, headers=headers)
            assert answer.status_code == 401
            assert "expected the header Authorization: Bearer" in answer.json()["error"]["message"]
        assert client.get("/metrics").status_code == 401
        assert client.get("/health").status_code == 200
        answer = client.post(PATH, json={"prompt": "1"}, headers={"Authorization": "Bearer secret"})
        assert answer.status_code == 200


def test_more_than_the_queue_holds_is_told_to_come_again():
    begun, gate = Event(), Event()

    def hold(_):
        begun.set()
        assert gate.wait(60)

    with serving(batch=1, queue=2) as (client, studio):
        studio.engine.submit(studio.order("1", previews=1, on_preview=hold))
        assert begun.wait(60)
        studio.engine.submit(studio.order("2"))
        try:
            answer = client.post(PATH, json={"prompt": "1", "n": 2})
            never = client.post(PATH, json={"prompt": "1", "n": 3})
        finally:
            gate.set()
        # However long somebody waits, three will not fit.
        assert never.status_code == 422
        assert "3 pictures: expected at most 2, as many as may wait" in never.text
        assert "retry-after" not in never.headers
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["type"] == "rate_limit_error"


def test_a_request_that_takes_too_long_ends_and_leaves_nothing_behind():
    with serving(timeout=0.001) as (client, studio):
        answer = client.post(PATH, json={"prompt": "1"})
        assert answer.status_code == 504
        assert "no picture within 0.001 s" in answer.json()["error"]["message"]
        settled(studio)
        assert studio.metrics.registry.get_sample_value("arvision_pictures_total") == 0


def settled(studio):
    for _ in range(600):
        if not studio.engine.num_waiting + studio.engine.num_drawing:
            return
        threading.Event().wait(0.05)
    raise AssertionError("pictures are left")


async def asgi(app, messages, path=PATH):
    """A request by hand, whose client leaves or dawdles as the messages say."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": [(b"content-type", b"application/json")],
        "client": ("test", 1),
        "server": ("test", 1),
    }
    sent = []

    async def receive():
        if not messages:
            await asyncio.sleep(3600)
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    await app(scope, receive, send)
    return sent


def test_a_client_that_leaves_takes_its_pictures_along():
    studio = Studio(tiny("llamagen")[0], "tiny", Limits(batch=1))
    blocker = studio.order("1", n=8, sampler="ar")
    studio.engine.submit(blocker)
    body = json.dumps({"prompt": "1", "n": 3}).encode()
    messages = [{"type": "http.request", "body": body}, {"type": "http.disconnect"}]
    sent = asyncio.run(asgi(make_app(studio), messages))
    assert sent[0]["status"] == 499
    assert studio.engine.num_waiting <= 7
    studio.close(60)
    assert studio.metrics.registry.get_sample_value("arvision_pictures_total") == 8


def test_a_body_that_does_not_come_is_not_waited_for():
    studio = Studio(tiny("llamagen")[0], "tiny", Limits(upload=0.05))
    messages = [{"type": "http.request", "body": b'{"prompt"', "more_body": True}]
    sent = asyncio.run(asgi(make_app(studio), messages))
    assert sent[0]["status"] == 408
    studio.close(10)


def test_glm_image_answers_sglang_with_the_tokens_of_its_own_class():
    network = tiny_glm()
    prompts, large, small = glm_prompts([4, 2, 5]), (3, 4), (2, 2)
    expected = glm_generate(network, prompts, [small, large])
    thw = [[1, *large], [1, *small]]
    how = {"temperature": 0.0, "max_new_tokens": 17, "ignore_eos": True, "sampling_seed": 1}
    with serving(ImageModelPipeline(network)) as (client, _):
        for prompt, tokens in zip(prompts, expected, strict=True):
            body = {
                "input_ids": prompt.tolist(),
                "image_data": [{"image_grid_thw": thw}],
                "sampling_params": how,
            }
            found = client.post("/generate", json=body).json()
            assert found["output_ids"][:16] == tokens.tolist()
            assert len(found["output_ids"]) == 17
            assert found["meta_info"]["prompt_tokens"] == len(prompt)
            assert found["meta_info"]["completion_tokens"] == 17
        batch = {
            "input_ids": [prompt.tolist() for prompt in prompts],
            "image_data": [[{"image_grid_thw": thw}]] * 3,
            "sampling_params": [how] * 3,
        }
        listed = client.post("/generate", json=batch).json()
        assert [one["output_ids"][:16] for one in listed] == expected.tolist()
        drawn = batch | {"sampling_params": [how | {"temperature": 1.0}] * 3}
        first, again = (client.post("/generate", json=drawn).json() for _ in range(2))
        assert [one["output_ids"] for one in first] == [one["output_ids"] for one in again]
        assert [one["output_ids"] for one in first] != [one["output_ids"] for one in listed]
        assert client.get("/health").status_code == 200


def test_glm_image_refuses_what_is_no_request():
    prompt = glm_prompts([4])[0].tolist()
    good = {
        "input_ids": prompt,
        "image_data": [{"image_grid_thw": [[1, 3, 4], [1, 2, 2]]}],
        "sampling_params": {"max_new_tokens": 17},
    }
    with serving(ImageModelPipeline(tiny_glm())) as (client, _):
        for change, message in (
            (
                {"sampling_params": {"max_new_tokens": 5}},
                "the grids hold 16 tokens, expected 16 or 17",
            ),
            ({"image_data": [{"image_grid_thw": [[2, 3, 4]]}]}, "expected [1, rows, columns]"),
            ({"image_data": []}, "source images are not taken"),
            ({"input_ids": [1, 2]}, "expected the image start"),
            ({"input_ids": [-1, *prompt]}, "the prompt holds the id -1"),
            ({"input_ids": []}, "input_ids"),
            ({"sampling_params": []}, "0 sampling_params for 1 prompts"),
        ):
            answer = client.post("/generate", json=good | change)
            assert answer.status_code == 422, change
            assert message in answer.json()["error"]["message"]


def test_a_port_in_use_is_told():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"127.0.0.1:{port} cannot be served .*in use"):
            listen("127.0.0.1", port)
    with pytest.raises(InputError, match=r"port 70000: expected 0..65535"):
        listen("127.0.0.1", 70000)


def test_janus_takes_prompts_of_other_lengths_into_a_running_batch():
    from image_networks import janus_processor, tiny_janus

    from arvision.models import Janus

    model = Janus(tiny_janus(side=4), janus_processor())
    pipe = ImageModelPipeline.from_model(model)
    texts = ["a cat", "a much longer caption of a dog", "x"]
    with serving(pipe, batch=2) as (client, studio):
        orders = [studio.order(text, seed=3)[0] for text in texts]
        studio.engine.submit(orders)
        for text, order in zip(texts, orders, strict=True):
            expected = pipe(text, seed=3, progress=False).tokens[0]
            assert torch.equal(order.answer.result(60).tokens, expected)
        answer = client.post(PATH, json={"prompt": "a cat", "seed": 3}).json()
        assert picture(answer["data"][0]).size == studio.size
