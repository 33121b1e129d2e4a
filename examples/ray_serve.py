"""The application of `arvision serve` as a Ray Serve deployment: replicas, autoscaling, restarts.

    pip install "arvision[ray]"
    python examples/ray_serve.py --model llamagen-fashion --replicas 2 --most 4 --port 8000

or, in a folder with this file, `serve run ray_serve:build model=llamagen-fashion`.

Each replica holds the model and batches continuously. When a replica dies, the requests that it was
drawing are answered 500 by Ray, and it is replaced. A picture is a function of its prompt and its seed, so
asking again is safe: `draw` does that.
"""

from __future__ import annotations

import argparse
import base64
import json
import signal
import time
import urllib.error
import urllib.request
from typing import Any

from ray import serve  # pyright: ignore[reportMissingImports]

PATH = "/v1/images/generations"


@serve.deployment(max_ongoing_requests=64, max_queued_requests=256, health_check_period_s=2)
@serve.ingress()
class Pictures:
    """One replica: a model, its engine, and the application around both.

    Args:
        model: embedded name, folder or hub id.
        token: that requests must bear; None for none.
        **limits: see `arvision.serving.Limits`.
    """

    def __init__(self, model: str, token: str | None = None, **limits: Any) -> None:
        import arvision
        from arvision.serving import Limits, Studio

        self._studio = Studio(arvision.load(model), model, Limits(**limits))
        self._token = token

    def __serve_build_asgi_app__(self) -> Any:
        from arvision.serving import make_app

        return make_app(self._studio, self._token)

    def check_health(self) -> None:
        if not self._studio.engine.is_alive:
            raise RuntimeError("the engine has ended")


def build(options: dict[str, Any]) -> serve.Application:
    """The deployment of a model, as `serve run` makes it.

    Args:
        options: `model`; `replicas` at least (1) and `most` (as many) of these; `num_cpus` (1) and
            `num_gpus` (0) of each.
    """
    least = int(options.get("replicas", 1))
    scaling = {
        "min_replicas": least,
        "max_replicas": max(least, int(options.get("most", least))),
        # A replica is well filled with as many requests as its batch has places.
        "target_ongoing_requests": 16,
    }
    needs = {
        "num_cpus": float(options.get("num_cpus", 1)),
        "num_gpus": float(options.get("num_gpus", 0)),
    }
    made: Any = Pictures
    chosen = made.options(autoscaling_config=scaling, ray_actor_options=needs)
    return chosen.bind(options.get("model", "llamagen-fashion"))


def draw(address: str, prompt: str, seed: int, tries: int = 20, **more: Any) -> bytes:
    """A picture (PNG), asked for again where a replica died or the queue was full.

    Raises:
        RuntimeError: a request that is wrong, or no answer after so many tries.
    """
    body = json.dumps({"prompt": prompt, "seed": seed, **more}).encode()
    asked = urllib.request.Request(
        address + PATH, body, {"Content-Type": "application/json"}, method="POST"
    )
    told = "nothing"
    for number in range(tries):
        try:
            with urllib.request.urlopen(asked, timeout=300) as answer:
                return base64.b64decode(json.load(answer)["data"][0]["b64_json"])
        except urllib.error.HTTPError as error:
            told = f"{error.code} {error.read()[:200]!r}"
            if error.code < 500 and error.code != 429:
                break
        except OSError as error:
            told = str(error)
        time.sleep(min(5.0, 0.25 * 2**number))
    raise RuntimeError(f"no picture of {prompt!r}: {told}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="llamagen-fashion")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--most", type=int, default=4)
    parser.add_argument("--port", type=int, default=8000)
    given = vars(parser.parse_args())
    serve.start(http_options={"host": "127.0.0.1", "port": given.pop("port")})
    serve.run(build(given), name="arvision")
    print("serving; SIGTERM or Ctrl+C ends it")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()


if __name__ == "__main__":
    main()
