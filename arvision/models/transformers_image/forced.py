"""What a prefix function forces, found by asking it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from .layout import Layout


@dataclass(frozen=True)
class Forced:
    """Ids forced before the first code, the layout of what follows, and its grid if it has one."""

    head: list[int]
    layout: Layout
    grid: tuple[int, int] | None


def probe(
    allowed: Callable[[int, Tensor], Any],
    prompts: Tensor,
    codes: Sequence[int],
    most: int,
    ends: set[int],
) -> Forced:
    """Ask a prefix function of transformers what may follow, with dummy codes where it is free.

    Args:
        allowed: row and ids [L] so far to the ids that may follow: one id, or all codes.
        prompts: [B, L].
        codes: ids of all codes.
        most: ids that may follow a prompt.
        ends: ids behind which a row ends.

    Raises:
        InputError: an answer that is neither, no code at all, or rows that differ.
    """
    rows = [_answers(allowed, row, prompt, codes, most, ends) for row, prompt in enumerate(prompts)]
    if any(row != rows[0] for row in rows):
        raise InputError("the prefix function forces other ids in other rows: expected one layout")
    head: list[int] = []
    behind: dict[int, list[int]] = {}
    num = 0
    for answer in rows[0]:
        if answer is None:
            num += 1
        elif num == 0:
            head.append(answer)
        else:
            behind.setdefault(num - 1, []).append(answer)
    if num == 0:
        raise InputError("the prefix function leaves no id free: expected one that allows codes")
    tail = behind.pop(num - 1, [])
    columns = min(behind, default=num - 1) + 1
    is_grid = bool(behind) and list(behind) == list(range(columns - 1, num - 1, columns))
    grid = (num // columns, columns) if is_grid and num % columns == 0 else None
    return Forced(head, Layout(num, behind, tail=tail), grid)


def _answers(
    allowed: Callable[[int, Tensor], Any],
    row: int,
    prompt: Tensor,
    codes: Sequence[int],
    most: int,
    ends: set[int],
) -> list[int | None]:
    """Forced ids of one row, None where all codes are free."""
    ids = torch.cat([prompt, prompt.new_zeros(most)])
    every, found = set(codes), []
    free: Any = None
    for place in range(len(prompt), len(ids)):
        answer = allowed(row, ids[:place])
        is_free = answer is free and free is not None
        if not is_free:
            given = [int(one) for one in answer]
            is_free = len(given) > 1 and every <= set(given)
            if is_free:
                free = answer
            elif len(given) != 1:
                raise InputError(
                    f"the prefix function allows {len(given)} ids behind {place - len(prompt)}: "
                    "expected one id, or all image codes"
                )
            elif given[0] in every:
                raise InputError(
                    f"the prefix function forces the image code {given[0]}: expected another id"
                )
            else:
                found.append(given[0])
                ids[place] = given[0]
                if given[0] in ends:
                    return found
                continue
        found.append(None)
        ids[place] = codes[0]
    return found
