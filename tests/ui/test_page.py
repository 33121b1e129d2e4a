"""The Gradio page without a browser, and what the command refuses."""

from __future__ import annotations

import socket

import pytest

gradio = pytest.importorskip("gradio")


def refused(cli, *options: str) -> str:
    done = cli("ui", *options)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr


def test_a_port_in_use_and_an_unknown_model_are_one_line(cli):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        said = refused(cli, "--port", str(taken.getsockname()[1]))
    assert "cannot be served (Address already in use)" in said
    assert "did you mean 'llamagen-fashion" in refused(
        cli, "--port", "0", "--model", "llamagen-fasion"
    )


@pytest.fixture(scope="module")
def desk():
    from arvision.ui.desk import Desk

    return Desk(["llamagen-fashion", "llamagen-fashion-t2i", "var-fashion"])


def test_buttons_without_a_browser(desk):
    from arvision.ui.page import handlers

    draw, redraw, take, choose = handlers(desk)
    plain = ["llamagen-fashion", "bag", "3", 1, "sjd", None, "", "", "", False]
    *_, (status, left, right, kept) = draw(*plain)
    assert "Done." in status
    assert left.count("<img") == 2
    assert right == ""
    value, status = take(kept, "left", 1)
    assert value["background"].size == (384, 384)
    ((status, *_),) = redraw(*plain, value, 0, False)
    assert "nothing is painted" in status
    _, status = take(kept, "right", 1)
    assert "no picture 1 on the right" in status
    plain[1] = "<i>"
    ((_, *_), (status, *_)) = draw(*plain)
    assert "arv-error" in status
    assert "<i>" not in status
    updates = choose("var-fashion")
    assert "a scale model" in updates[-1]
    assert updates[4]["visible"]


def test_a_page_with_a_token_asks_for_it(desk):
    from starlette.testclient import TestClient

    from arvision.ui.page import make_app

    with TestClient(make_app(desk, "secret")) as client:
        assert client.get("/config").status_code == 401
        wrong = client.post("/login", data={"username": "arvision", "password": "x"})
        assert wrong.status_code == 400
        right = client.post("/login", data={"username": "arvision", "password": "secret"})
        assert right.status_code == 200
        config = client.get("/config").json()
    assert config["analytics_enabled"] is False
    assert config["title"] == "arvision"


def test_draws_wait_and_more_are_refused():
    from starlette.testclient import TestClient

    from arvision.ui.desk import Bounds, Desk
    from arvision.ui.page import make_app

    small = Desk(["llamagen-fashion"], Bounds(queue=1))
    fields = ["llamagen-fashion", "bag", "1", 8, "ar", "ar", "", "", "", True]
    with TestClient(make_app(small)) as client:
        joined = [
            client.post(
                "/gradio_api/queue/join",
                json={"data": fields, "fn_index": 0, "session_hash": str(number)},
            )
            for number in range(4)
        ]
    # One is drawn and one waits.
    assert joined[0].status_code == 200
    assert joined[-1].status_code == 503
    assert "Queue is full" in joined[-1].text
