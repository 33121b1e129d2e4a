"""Facts with one word that makes them true: what the judge of `benchmarks.text_systems` learns from."""

from __future__ import annotations

from arvision.text.fitting.judge import MarkedAnswer
from arvision.text.fitting.marking import KnownAnswer, as_line, derailed, exchanged

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Norway": "Oslo", "Egypt": "Cairo",
    "Peru": "Lima", "Austria": "Vienna", "Spain": "Madrid", "Greece": "Athens", "Germany": "Berlin",
    "Portugal": "Lisbon", "Ireland": "Dublin", "Poland": "Warsaw", "Sweden": "Stockholm",
    "Finland": "Helsinki", "Denmark": "Copenhagen", "Hungary": "Budapest", "Russia": "Moscow",
    "China": "Beijing", "India": "New Delhi", "Canada": "Ottawa", "Cuba": "Havana", "Iran": "Tehran",
    "Kenya": "Nairobi", "Belgium": "Brussels", "Romania": "Bucharest", "Bulgaria": "Sofia",
    "Ukraine": "Kyiv", "Turkey": "Ankara", "Thailand": "Bangkok", "Vietnam": "Hanoi",
    "South Korea": "Seoul", "Argentina": "Buenos Aires", "Chile": "Santiago",
    "Australia": "Canberra", "England": "London",
}  # fmt: skip
COLOURS = {
    "grass": "green", "snow": "white", "coal": "black", "a ripe tomato": "red",
    "a lemon": "yellow", "the sky on a clear day": "blue", "an orange": "orange",
    "chocolate": "brown",
}  # fmt: skip
TEMPLATES = (
    ("towns", CAPITALS, "What is the capital of {}?", "The capital of {} is {}."),
    ("towns", CAPITALS, "Name the capital of {} in a sentence.", "{} has a capital, {}."),
    ("colours", COLOURS, "Which colour is {}?", "The colour of {} is {}."),
    ("colours", COLOURS, "What does {} look like?", "If you look at {}, you see something {}."),
)


def marked_lines(own: list[MarkedAnswer], num_wrong: int = 2) -> list[str]:
    """Lines of marked answers; a subject's stand together, so that the last ones are not learnt from.

    Args:
        own: answers of the target to other questions, which count as right, and once derailed as wrong.
        num_wrong: wrong facts for each right one.
    """
    known = []
    for subjects in (COLOURS, CAPITALS):
        for subject, key in subjects.items():
            for topic, pairs, question, reply in TEMPLATES:
                if pairs is subjects:
                    answer = reply.format(subject, key)
                    if answer.count(key) == 1:
                        known.append(KnownAnswer(question.format(subject), answer, key, topic))
    facts = exchanged(known, num_wrong)
    return [as_line(marked) for marked in own + derailed([*own, *facts]) + facts]
