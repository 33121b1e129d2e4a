"""What does every text-side system give on a real language model? Tokens per pass, and time per token.

pip install -e ".[bench]"; python -m benchmarks.text_systems [--tokens 40] [--per-kind 2] [--runs runs/text-systems]
python -m benchmarks.text_systems --tokens 128 --per-kind 8 --kinds chat --only token_recycling     prints alone
python -m benchmarks.text_systems --only suffix          puts one row into the record, if its sizes are the record's

SmolLM2-135M-Instruct, batch 1, prompts of each kind of `benchmarks.text_prompts`. What needs training
is fitted first by `arvision.training` on the model's own answers to prompts that are not measured
(settings below; small on purpose: minutes on two cores) when it is first asked for, and kept in --runs, so that
a second call only measures. Systems that choose drafts run greedily; those that draw them run at temperature 1. Tokens per
pass are over all prompts of a kind, the pass that reads the prompt left out; CPU time is per token, over all prompts;
memory is the most that lay beside the weights while the first prompt was read and answered with eight tokens.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

from arvision import generate
from arvision.text.drafters import DraftTree, HeadDrafter
from arvision.text.drafters.head_drafter import RANKS
from arvision.text.drafters.heads import KINDS
from arvision.text.fitting.data import Answers
from arvision.text.fitting.judge import MarkedAnswer
from arvision.text.fitting.medusa2 import BACKBONE
from arvision.text.fitting.recipes import fit_draft
from arvision.text.generation import as_draft
from arvision.text.loading import load_text_model

from .common import load, save
from .memory import peak_bytes
from .text import model_file
from .text_drafts import train_other_vocabulary
from .text_facts import marked_lines
from .text_prompts import PROMPTS

SUBJECTS = (
    "rivers", "bread", "the moon", "chess", "bicycles", "volcanoes", "honey", "libraries",
    "coral reefs", "clocks", "windmills", "penguins", "tea", "bridges", "glaciers", "maps",
    "lighthouses", "pianos", "rice", "robots", "deserts", "cheese", "comets", "football", "trains",
    "earthquakes", "butterflies", "museums", "oak trees", "compasses", "sailing boats", "elephants",
    "coffee", "castles", "icebergs", "globes", "harbours", "violins", "potatoes", "satellites",
    "forests", "chocolate", "eclipses", "tennis", "cars", "tornadoes", "ants", "theatres", "mushrooms",
    "calendars", "canals", "whales", "lemons", "towers", "waterfalls", "paintings", "markets", "drums",
    "onions", "computers", "islands", "apples", "planets", "swimming", "aeroplanes", "rainbows",
    "spiders", "schools", "ferns", "telescopes", "dams", "wolves", "pepper", "temples", "caves",
    "letters", "gardens", "flutes", "beans", "batteries",
)  # fmt: skip
ASKED = (
    "Explain {} in two sentences.",
    "List three facts about {}.",
    "Write a short paragraph about {} and then repeat its first sentence.",
    "Write a Python function that counts {} in a list and returns the number.",
    "Summarise in one sentence: People have always cared about {}. They are found in many places, "
    "and much has been written about them.",
    "Copy this sentence and correct its mistakes: i likes {} becuase they is intresting.",
)
FITS: dict[str, dict[str, Any]] = {
    "medusa": {"steps": 250, "batch_size": 128},
    "medusa2": {"steps": 60, "batch_size": 2},
    "hydra": {"steps": 250, "batch_size": 128},
    "hydra++": {"steps": 250},
    "clover": {"steps": 250},
    "chimera": {"steps": 250},
    "eagle3": {"steps": 250},
    "mtp": {"steps": 60, "num_heads": 2},
    "ppd": {"steps": 60, "num_ensemble": 2},
    "hidden_transfer": {"steps": 60},
    "lud": {"steps": 40},
    "nested": {"steps": 60, "batch_size": 2},
    "model": {"steps": 48},
    # Pilots take a quarter of the steps each: as many steps in all as "model".
    "distillspec": {"kind": "model", "steps": 24, "divergence": "auto", "on_policy": 0.5},
    "fresh": {"kind": "model", "steps": 60, "start": "fresh"},
    "fastdraft": {"kind": "model", "steps": 60, "pretrain": True, "pretrain_steps": 50},
    "acceptance": {},
    "judge": {},
}
PROFILED = 8
"""Tokens of the draw whose memory is counted: a profile of many takes gigabytes itself."""


class Fits:
    """Drafts in a folder, each fitted when it is first asked for; the target answers once for all.

    Attributes:
        asked: seconds of each fit that was asked for since this was last emptied, by kind.
    """

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self.asked: dict[str, float] = {}

    def __call__(self, kind: str) -> Path:
        """The folder of a draft of some kind."""
        out = self.runs / kind
        figures = out / "fitted.json"
        if not figures.exists():
            figures.write_text(json.dumps(self._fit(kind, out)))
            print("fitted", kind, figures.read_text(), flush=True)
        self.asked[kind] = json.loads(figures.read_text())["seconds"]
        return out

    def _fit(self, kind: str, out: Path) -> dict[str, Any]:
        out.mkdir(parents=True, exist_ok=True)
        prompts, marked = self.runs / "prompts.txt", self.runs / "marked.jsonl"
        if kind == "judge":
            marked.write_text("\n".join(marked_lines(self._own_answers())))
        asked = [template.format(subject) for template in ASKED for subject in SUBJECTS]
        prompts.write_text("\n".join(asked))
        answers = self.runs / "answers.json"
        if kind != "judge" and answers.exists():
            shutil.copy(answers, out / "answers.json")
        if kind == "other vocabulary":
            kept = json.loads(answers.read_text())
            target = load_text_model(model_file())[1]
            return train_other_vocabulary(Answers(kept["texts"], kept["starts"]), target, out)
        settings: dict[str, Any] = {"kind": kind} | FITS[kind]
        if kind == "acceptance":
            settings["draft"] = str(self("model"))
        if settings.pop("pretrain", False):
            settings["pretrain"] = self.runs / "texts.txt"
            settings["pretrain"].write_text("\n\n".join(topics[name] for name in sorted(topics)))
        figures = fit_draft(
            str(model_file()),
            marked if kind == "judge" else prompts,
            out,
            answer_tokens=None if kind == "judge" else 64,
            dtype=torch.bfloat16,
            progress=False,
            **settings,
        )
        if (out / "answers.json").exists():
            shutil.copy(out / "answers.json", answers)
        return figures

    def _own_answers(self, most: int = 100) -> list[MarkedAnswer]:
        """Questions and answers of the target, which the judge learns from as right ones."""
        self("model")  # whoever is fitted first lets it answer
        kept = json.loads((self.runs / "answers.json").read_text())
        tokenizer = load_text_model(model_file())[1]
        found = []
        for text, start in list(zip(kept["texts"], kept["starts"], strict=True))[:most]:
            question = tokenizer.decode(text[:start]).rsplit("user\n", 1)[1]
            answer = tokenizer.decode(text[start:], skip_special_tokens=True).strip()
            found.append(MarkedAnswer(question.split("<|im_end|>", 1)[0], answer))
        return found


def systems(fits: Fits, tokens: int, per_kind: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """Name to the arguments of `generate`, made anew for each prompt."""

    @cache
    def draft(folder: Path) -> Any:
        return as_draft(str(folder), tokens, "cpu", torch.float32)

    def tree(expansion: str, kind: str = "model", **options: Any) -> DraftTree:
        return DraftTree(draft(fits(kind)), expansion=expansion, **options)

    chain = {"branching": (1, 1, 1, 1)}
    greedy = {
        name: lambda name=name: {"drafter": name}
        for name in (
            "prompt_lookup",
            "suffix",
            "input_copy",
            "trigram",
            "token_recycling",
            "prompt_lookup+token_recycling",
            "jacobi",
            "superposed",
            "layer_skip",
            "nested_exit",
        )
    }

    def pseudo(kind: str, **options: Any) -> dict[str, Any]:
        return {"drafter": "pseudo", "drafter_options": {"module": str(fits(kind)), **options}}

    @cache
    def tuned() -> Any:
        """The target that was tuned for lexical units."""
        return load_text_model(fits("lud"), device="cpu", dtype=torch.float32)[0]

    def units(**options: Any) -> dict[str, Any]:
        return pseudo("lud") | {"model": tuned()} | options

    def heads(kind: str, **options: Any) -> dict[str, Any]:
        folder = str(fits(kind))
        return {"drafter": "heads", "drafter_options": {"heads": folder, **options}}

    @cache
    def backbone() -> Any:
        """The target that was trained with its heads."""
        folder = fits("medusa2") / BACKBONE
        return load_text_model(folder, device="cpu", dtype=torch.float32)[0]

    @cache
    def served(kind: str) -> Any:
        """A drafter that has learned from answers to the prompts that are not measured."""
        drafter: Any = (
            tree("chain", online=1e-4, every=16)
            if kind == "model"
            else HeadDrafter(fits(kind), online=3e-4, every=16)
        )
        others = [message for kind in PROMPTS for message in PROMPTS[kind][per_kind:]]
        for message in others:
            options = {"chat": True, "device": "cpu", "dtype": torch.float32}
            generate(str(model_file()), message, drafter=drafter, max_new_tokens=tokens, **options)
        replay = drafter.learner.replay if kind == "model" else drafter.replay
        print(kind, "served", len(others), "with", replay.num_updates, "updates", flush=True)
        return drafter

    def drawn(rule: str, expansion: str, **options: Any) -> dict[str, Any]:
        return {"drafter": tree(expansion, **options), "rule": rule, "temperature": 1.0}

    return {
        "plain": dict,
        **greedy,
        "layer_skip, whole": lambda: {"drafter": "layer_skip", "drafter_options": {"whole": True}},
        **{kind: lambda kind=kind: heads(kind) for kind in KINDS},
        "medusa2": lambda: heads("medusa2") | {"model": backbone()},
        "medusa, constant tree": lambda: heads("medusa", ranks=RANKS),
        **{kind: lambda kind=kind: pseudo(kind) for kind in ("ppd", "hidden_transfer")},
        **{
            f"{kind}, chain": lambda kind=kind: pseudo(kind, shape="chain")
            for kind in ("ppd", "hidden_transfer")
        },
        "eagle3": lambda: {
            "drafter": "eagle3",
            "drafter_options": {"head": str(fits("eagle3"))},
        },
        "mtp": lambda: {"drafter": "mtp", "drafter_options": {"folder": fits("mtp")}},
        "draft of another vocabulary": lambda: {
            "drafter": "draft_model",
            "drafter_options": {"draft": fits("other vocabulary"), "expansion": "chain"},
        },
        "lud": lambda: units(),
        "lud, unverified": lambda: units(rule="unverified"),
        "nested": lambda: {
            "drafter": "nested_exit",
            "drafter_options": {"draft": draft(fits("nested"))},
        },
        "units (LUD)": lambda: heads("hydra", shape="unit"),
        "online (OSD)": lambda: {"drafter": served("hydra")},
        "draft chain": lambda: {"drafter": tree("chain")},
        "draft chain, online": lambda: {"drafter": served("model")},
        "distillspec": lambda: {"drafter": tree("chain", "distillspec")},
        "fresh draft": lambda: {"drafter": tree("chain", "fresh")},
        "fastdraft": lambda: {"drafter": tree("chain", "fastdraft")},
        "draft chain of 8": lambda: {"drafter": tree("chain", num_draft=8, max_depth=8)},
        "specdec++": lambda: {
            "drafter": tree("chain", num_draft=8, max_depth=8, acceptance=fits("acceptance"))
        },
        "draft chain, auto length": lambda: {"drafter": tree("chain"), "num_draft": "auto"},
        "dyspec": lambda: {"drafter": tree("dyspec")},
        "sequoia": lambda: {"drafter": tree("sequoia")},
        "typical": lambda: {"drafter": tree("dyspec"), "rule": "typical", "temperature": 1.0},
        "judge": lambda: {
            "drafter": tree("chain"),
            "rule": "judge",
            "rule_options": {"head": fits("judge")},
        },
        "dyspec, temperature 1": lambda: {"drafter": tree("dyspec"), "temperature": 1.0},
        "dyspec drawn, temperature 1": lambda: drawn("without_replacement", "dyspec_drawn"),
        "trigram, likeliest way": lambda: {
            "drafter": "trigram",
            "drafter_options": {"exploration": 0.0, "rate": 0.0},
        },
        "chain rule": lambda: drawn("independent", "independent", **chain),
        "block": lambda: drawn("block", "independent", **chain),
        "multi_round (SpecInfer)": lambda: drawn("multi_round", "independent"),
        "k_sequential (SpecTr)": lambda: drawn("k_sequential", "independent"),
        "without_replacement (RSD-C)": lambda: drawn("without_replacement", "distinct"),
        "without_replacement (RSD-S)": lambda: drawn("without_replacement", "beam"),
    }


def measure(
    runs: Path, tokens: int, per_kind: int, kinds: list[str], only: list[str]
) -> dict[str, dict[str, Any]]:
    """Rows by system (all, unless `only` names some): tokens per pass by kind of prompt,
    "milliseconds" of CPU time per token, "bytes" at the peak of the first prompt beside the weights
    and the drafter's own, "fits" (seconds by kind of draft)."""
    network, tokenizer = load_text_model(model_file(), device="cpu", dtype=torch.float32)
    rows: dict[str, dict[str, Any]] = {}
    fits = Fits(runs)
    for name, arguments in systems(fits, tokens, per_kind).items():
        if only and name not in only:
            continue
        fits.asked = {}

        def answer(message: str, arguments: Any = arguments, **options: Any) -> Any:
            given = {"model": network} | arguments()
            return generate(prompts=message, tokenizer=tokenizer, chat=True, **options, **given)

        arguments()  # what is not fitted yet is fitted before anything is counted
        most, _ = peak_bytes(lambda: answer(PROMPTS[kinds[0]][0], max_new_tokens=PROFILED))
        row, seconds, total = {}, 0.0, 0
        for kind in kinds:
            made = passes = 0
            for message in PROMPTS[kind][:per_kind]:
                started = time.process_time()
                out = answer(message, max_new_tokens=tokens)
                seconds += time.process_time() - started
                total += out.stats.tokens
                made, passes = made + out.stats.tokens - 1, passes + out.stats.forward_passes
            row[kind] = made / max(1, passes)
        rows[name] = row | {
            "milliseconds": 1e3 * seconds / max(1, total),
            "bytes": most,
            "fits": fits.asked,
        }
        print(name, rows[name], flush=True)
    return rows


def main() -> None:
    """Fit, measure and write `results/text_systems.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--per-kind", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("runs/text-systems"))
    parser.add_argument("--kinds", nargs="*", choices=list(PROMPTS), default=list(PROMPTS))
    parser.add_argument("--only", nargs="*", default=[])
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = {"tokens": options.tokens, "per_kind": options.per_kind}
    rows = measure(options.runs, **sizes, kinds=options.kinds, only=options.only)
    record = load("text_systems")
    if options.kinds == list(PROMPTS) and (not options.only or sizes.items() <= record.items()):
        kept = record.get("environments", {}), record["systems"] if options.only else {}
        found = sizes | {"environments": kept[0], "systems": kept[1] | rows}
        save("text_systems", found, parts=rows)


if __name__ == "__main__":
    main()
