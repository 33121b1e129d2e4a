"""Marked answers for a judge: people mark what a model said, known facts are exchanged, answers derailed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...prompt_files import read_prompts
from ...schema import check_fields
from ..generation import generate
from .judge import MarkedAnswer

SKIPPED = "-"
"""What a person says who cannot tell."""


@dataclass(frozen=True)
class KnownAnswer:
    """A right answer, and the part of it that makes it right.

    Attributes:
        prompt: what was asked.
        answer: what is true.
        key: the part of the answer that says it.
        topic: keys are exchanged within a topic: a town for a town.
    """

    prompt: str
    answer: str
    key: str
    topic: str = ""

    def __post_init__(self) -> None:
        if not self.key or self.answer.count(self.key) != 1:
            raise InputError(f"key {self.key!r}: expected a part of {self.answer!r}, once in it")


def read_known(path: Path) -> list[KnownAnswer]:
    """Known answers of a file of prompts whose records have "answer" and "key" ("topic" is optional).

    Raises:
        InputError: an unreadable file, or a record that is something else.
    """
    found = []
    for number, record in enumerate(read_prompts(path), 1):
        name = f"{path}, record {number}"
        fields = {k: v for k, v in record.items() if k in KnownAnswer.__dataclass_fields__}
        try:
            found.append(KnownAnswer(**check_fields(fields, KnownAnswer, name)))
        except (ValueError, TypeError) as error:
            raise InputError(
                f'{name}: expected {{"prompt": ..., "answer": ..., "key": ...}}: {error}'
            ) from error
    return found


def exchanged(
    known: Sequence[KnownAnswer], num_wrong: int = 2, seed: int = 0
) -> list[MarkedAnswer]:
    """Each known answer as it is, and with other answers' keys of its topic, marked as wrong.

    Args:
        known: right answers.
        num_wrong: wrong ones of each, or as many as there are other keys.
        seed: of the choice.

    Raises:
        InputError: a topic with one key only.
    """
    chance, out = random.Random(seed), []
    for record in known:
        keys = {other.key for other in known if other.topic == record.topic} - {record.key}
        if not keys:
            raise InputError(f"topic {record.topic!r}: expected two keys or more, to exchange them")
        out.append(MarkedAnswer(record.prompt, record.answer))
        for key in chance.sample(sorted(keys), min(num_wrong, len(keys))):
            wrong = record.answer.replace(record.key, key)
            out.append(MarkedAnswer(record.prompt, wrong, key))
    return out


def derailed(marked: Sequence[MarkedAnswer], num: int = 1, seed: int = 0) -> list[MarkedAnswer]:
    """Right answers that go astray: broken off, and gone on with words that do not belong there.

    What follows is one word again and again, or words of other answers by turns. A judge that knows
    exchanged facts alone lets babble pass, which weak drafts are full of.

    Args:
        marked: answers; wrong ones are left out.
        num: of each right one.
        seed: of the choice.

    Raises:
        InputError: no two different words in the right answers, or a number below 1.
    """
    if num < 1:
        raise InputError(f"num {num}: expected broken answers of each, >= 1")
    chance, out = random.Random(seed), []
    right = [record for record in marked if record.wrong is None]
    words = sorted({word for record in right for word in record.answer.split()})
    if len(words) < 2:
        raise InputError("answers to derail: expected right ones of two words or more")
    for number, record in enumerate(right * num):
        own = record.answer.split()
        kept = " ".join(own[: chance.randint(1, len(own))])
        tail = chance.sample(words, min(5, len(words)))
        if number % 2:
            tail = [next(word for word in tail if word != kept.split()[-1])] * 5
        wrong = " " + " ".join(tail)
        if wrong not in kept:
            out.append(MarkedAnswer(record.prompt, kept + wrong, wrong))
    return out


def asked(
    model: Any,
    prompts: Sequence[str],
    ask: Callable[[str, str], str | None],
    *,
    num_answers: int = 1,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    **options: Any,
) -> Iterator[MarkedAnswer]:
    """Answers of a model, each marked by who is asked.

    Args:
        model: as `arvision.generate` takes it: the draft, whose errors the judge shall know, or the
            target.
        prompts: questions.
        ask: told a prompt and an answer; says which part is wrong, "" where all is fine, "-" where
            it cannot tell, None to end. A part that is not in the answer is asked for again.
        num_answers: to each question, of different seeds.
        max_new_tokens: of an answer.
        temperature: of the draws.
        **options: of `arvision.generate`.
    """
    for prompt in prompts:
        out = generate(
            model,
            [prompt] * num_answers,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            **options,
        )
        for answer in dict.fromkeys(out.texts or []):
            wrong = ask(prompt, answer)
            while wrong not in (None, "", SKIPPED) and wrong not in answer:
                wrong = ask(prompt, answer)
            if wrong is None:
                return
            if wrong != SKIPPED:
                yield MarkedAnswer(prompt, answer, wrong or None)


def as_line(marked: MarkedAnswer) -> str:
    """A line of the file that `read_marked` reads."""
    return json.dumps({k: v for k, v in asdict(marked).items() if v is not None})
