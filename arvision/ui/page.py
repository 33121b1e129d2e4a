"""The page: fields and buttons of Gradio around a `Desk`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from ..errors import ArvisionError, optional

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nobody is told who draws what

with optional("ui", "the page"):
    import gradio as gr  # pyright: ignore[reportMissingImports]

from fastapi import FastAPI

from . import show
from .brush import for_painting
from .desk import Desk, Facts, Wishes, in_words

KEEP = 3600
"""Seconds after which Gradio's copies of files that people opened are deleted."""

MOST_UPLOAD = 20 << 20
"""Bytes of a picture that is opened."""

RED = "#ff3b30"

STOPPED = "Stopped; what was not drawn is missing."


def handlers(desk: Desk) -> Any:
    """What happens when a button is pressed: (draw, redraw, take, choose)."""

    def run(wishes: Wishes) -> Iterator[tuple[Any, ...]]:
        sides: list[Any] = []
        try:
            for sides in desk.draw(wishes):
                failed = next((s.runner.error for s in sides if s.runner.error is not None), None)
                if failed is not None:
                    raise failed
                most = show.most_accepted(sides)
                columns = [show.side_of(side, most) for side in sides]
                status = show.told(show.status_of(sides, desk.bounds.timeout))
                kept = [list(side.runner.pictures) for side in sides]
                yield status, columns[0], columns[1] if len(columns) > 1 else "", kept
        except Exception as error:
            yield show.told(in_words(error), is_error=True), gr.skip(), gr.skip(), gr.skip()

    def read(
        model: str,
        prompt: Any,
        seeds: str,
        images: float,
        first: str,
        second: str,
        guidance: str,
        temperature: str,
        negative: str,
        is_shown: bool,
        **edit: Any,
    ) -> Wishes:
        return Wishes(
            model=model,
            prompt=str(prompt or ""),
            seeds=seeds or "",
            images=int(images or 0),
            samplers=[text or "" for text in (first, second)],
            guidance=guidance or "",
            temperature=temperature or "",
            negative=negative or "",
            is_shown=is_shown,
            **edit,
        )

    def draw(*values: Any) -> Iterator[tuple[Any, ...]]:
        yield from run(read(*values))

    def redraw(*values: Any) -> Iterator[tuple[Any, ...]]:
        *plain, painting, known_scales, blend = values
        edit = {
            "painting": painting or {},
            "known_scales": int(known_scales or 0),
            "blend": bool(blend),
        }
        yield from run(read(*plain, **edit))

    def take(kept: Any, side: str, number: float) -> tuple[Any, str]:
        try:
            column = (kept or [])[0 if side == "left" else 1]
            picture = column[int(number or 1) - 1] if number and number >= 1 else None
            if picture is None:
                raise IndexError
        except IndexError:
            line = f"no picture {number or ''} on the {side}: expected one that is drawn"
            return gr.skip(), show.told(line, is_error=True)
        large = for_painting(picture)
        value = {"background": large, "layers": [], "composite": large}
        return value, show.told("Paint over what is to be redrawn, then press Redraw.")

    def choose(name: str) -> tuple[Any, ...]:
        try:
            facts = desk.facts(name)
        except ArvisionError as error:
            return *[gr.skip()] * 5, show.told(str(error), is_error=True)
        first, second = chosen_samplers(facts)
        return (
            gr.update(choices=facts.classes, value=first_prompt(facts)),
            gr.update(choices=facts.samplers, value=first),
            gr.update(choices=["", *facts.samplers], value=second),
            gr.update(visible=facts.takes_text, value=""),
            gr.update(visible=facts.num_scales > 0, maximum=max(1, facts.num_scales - 1), value=0),
            show.told(f"{name}: a {facts.kind} model."),
        )

    return draw, redraw, take, choose


def chosen_samplers(facts: Facts) -> tuple[str, str]:
    """What stands in the two fields when a model is chosen."""
    plain = [name for name in facts.samplers if ":" not in name]
    first = "ar" if "ar" in plain else plain[0]
    others = [name for name in ("sjd", "csjd") if name in plain]
    return first, others[0] if others else ""


def first_prompt(facts: Facts) -> str:
    """What stands in the prompt's field when a model is chosen."""
    return facts.classes[0] if facts.classes else "a dark ankle boot"


def make_page(desk: Desk) -> gr.Blocks:
    """All fields, buttons and what they do; loads the first model.

    Args:
        desk: draws.
    """
    draw, redraw, take, choose = handlers(desk)
    name = desk.models[0]
    facts = desk.facts(name)
    first, second = chosen_samplers(facts)
    most = desk.bounds.images
    with gr.Blocks(
        title="arvision", analytics_enabled=False, delete_cache=(KEEP, KEEP), fill_width=True
    ) as page:
        kept = gr.State([], time_to_live=KEEP)
        with gr.Row():
            model = gr.Dropdown(desk.models, value=name, label="Model")
            prompt = gr.Dropdown(
                facts.classes,
                value=first_prompt(facts),
                allow_custom_value=True,
                label="Class or caption",
                elem_id="arv-prompt",
            )
            seeds = gr.Textbox("0", label="Seeds", info="7, or 7, 8, or 7:3", max_lines=1)
            images = gr.Slider(1, most, 1, step=1, label="Pictures of each seed")
        with gr.Row():
            left = gr.Dropdown(
                facts.samplers, value=first, allow_custom_value=True, label="Sampler, left"
            )
            right = gr.Dropdown(
                ["", *facts.samplers], value=second, allow_custom_value=True, label="Sampler, right"
            )
            guidance = gr.Textbox("", label="Guidance scale", placeholder="the model's own")
            temperature = gr.Textbox("", label="Temperature", placeholder="the model's own")
            negative = gr.Textbox("", label="Negative prompt", visible=facts.takes_text)
            is_shown = gr.Checkbox(True, label="Show while drawing")
        with gr.Row():
            go = gr.Button("Draw", variant="primary", elem_id="arv-draw")
            stop = gr.Button("Stop", elem_id="arv-stop")
        status = gr.HTML(show.told(f"{name}: a {facts.kind} model."))
        with gr.Row():
            columns = [gr.HTML(elem_id=f"arv-{side}") for side in ("left", "right")]
        with gr.Accordion("Edit with a brush", open=False):
            gr.Markdown(
                "Take a drawn picture or open a file, paint over what is to be redrawn (red), choose a "
                "class or caption above, and press Redraw. A file is cut to the model's size."
            )
            with gr.Row():
                side = gr.Radio(["left", "right"], value="left", label="Of the")
                number = gr.Number(1, precision=0, minimum=1, label="Picture")
                known = gr.Slider(
                    0,
                    max(1, facts.num_scales - 1),
                    0,
                    step=1,
                    label="Coarse scales kept",
                    visible=facts.num_scales > 0,
                )
                blend = gr.Checkbox(False, label="Paste into the source")
            with gr.Row():
                taking = gr.Button("Take", elem_id="arv-take")
                again = gr.Button("Redraw", variant="primary", elem_id="arv-redraw")
            painting = gr.ImageEditor(
                type="pil",
                format="png",
                sources=("upload", "clipboard"),
                brush=gr.Brush(default_size=40, colors=[RED], color_mode="fixed"),
                layers=False,
                transforms=(),
                label="Paint here",
                elem_id="arv-painting",
            )
        fields = [model, prompt, seeds, images, left, right, guidance, temperature, negative]
        fields += [is_shown]
        outputs = [status, *columns, kept]
        one = {"concurrency_limit": 1, "concurrency_id": "draw", "api_visibility": "private"}
        quick: dict[str, Any] = {"queue": False, "api_visibility": "private"}
        begun = [
            go.click(draw, fields, outputs, show_progress="hidden", **one),
            again.click(
                redraw,
                [*fields, painting, known, blend],
                outputs,
                show_progress="hidden",
                **one,
            ),
        ]
        stop.click(lambda: show.told(STOPPED), None, status, cancels=begun, **quick)
        taking.click(take, [kept, side, number], [painting, status], **quick)
        model.change(choose, model, [prompt, left, right, negative, known, status], **one)
    page.queue(max_size=desk.bounds.queue, default_concurrency_limit=1)
    return page


def make_app(desk: Desk, token: str | None = None) -> FastAPI:
    """The page as an ASGI application.

    Args:
        desk: draws.
        token: password of the user "arvision"; None for a page that asks for none.
    """
    theme = gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    return gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        make_page(desk),
        path="/",
        auth=None if token is None else ("arvision", token),
        footer_links=[],
        max_file_size=MOST_UPLOAD,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        theme=theme,
        css=show.STYLE,
    )
