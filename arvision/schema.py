"""What was read from a file, checked: strict JSON, and values that hold to type hints.

One mechanism for everything that somebody else may have written: a class states its fields as it
states them anyway, by annotations, and `Between` narrows a number or a length:

    num_layers: Annotated[int, Between(1, 1000)]

Nothing here runs what a file says, and every refusal is one line.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from .errors import InputError, as_integer
from .files import regular_file

LARGEST_JSON = 1 << 26
"""Bytes of a JSON file; tables of tokens that tokenizers keep are a few million."""

DEEPEST_JSON = 100
"""Brackets within brackets."""


@dataclass(frozen=True)
class Between:
    """Least and greatest value of a number, or length of a text or a sequence; both belong to it."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    """A number must be greater than this."""

    def holds(self, value: Any) -> bool:
        """Whether a value lies there."""
        size = len(value) if isinstance(value, (str, Sequence, Mapping)) else value
        return self.least <= size <= self.most and size > self.above

    def __str__(self) -> str:
        words = []
        if self.above > -math.inf:
            words.append(f"> {self.above}")
        if self.least > -math.inf and self.most < math.inf:
            words.append(f"in {self.least}..{self.most}")
        elif self.least > -math.inf:
            words.append(f">= {self.least}")
        elif self.most < math.inf:
            words.append(f"<= {self.most}")
        return " and ".join(words)


class Modules:
    """Marks a number of modules, each of which holds a tensor at least."""


Layers = Annotated[int, Between(1, 1 << 20), Modules]
"""A number of layers or blocks."""

Levels = Annotated[Sequence[Annotated[int, Between(1, 1 << 10)]], Between(1, 16)]
"""Factors of the width of an autoencoder's levels."""

Size = Annotated[int, Between(1, 1 << 24)]
"""A width, a number of codes, classes or tokens."""

Count = Annotated[int, Between(0, 1 << 24)]
"""The same, or none."""

Side = Annotated[int, Between(1, 1 << 12)]
"""Rows or columns of tokens."""

Scales = Annotated[Sequence[Side], Between(1, 64)]
"""Sides of square token maps."""

Maps = Annotated[Sequence[tuple[Side, Side]], Between(1, 64)]
"""Rows and columns of token maps."""

Positive = Annotated[float, Between(above=0)]
"""A finite number above 0."""

NotNegative = Annotated[float, Between(0)]
"""A finite number from 0 on."""

Name = Annotated[str, Between(1, 255)]
"""A short text."""


def read_json(path: str | Path, most: int = LARGEST_JSON) -> Any:
    """The content of a JSON file, see `parse_json`.

    Args:
        path: of a regular file.
        most: bytes.

    Raises:
        InputError: no regular file, a larger one, or no strict JSON.
        OSError: it cannot be read; `FileNotFoundError` where there is none.
    """
    return parse_json(read_text(path, most), str(path))


def read_text(path: str | Path, most: int = LARGEST_JSON) -> str:
    """The text of a regular file in UTF-8, with or without a byte order mark.

    Raises:
        InputError: no regular file, a larger one, or another encoding.
        OSError: it cannot be read.
    """
    with regular_file(path, most) as file:
        data = file.read(most + 1)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{path}: is UTF-16 text, expected UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is no UTF-8 text, expected UTF-8") from error


def parse_json(text: str, name: str) -> Any:
    """JSON as its standard has it: finite numbers, each name once, not nested without end.

    Args:
        text: to read.
        name: where it comes from, for messages.

    Raises:
        InputError: anything else.
    """
    try:
        content = json.loads(
            text,
            object_pairs_hook=_each_once,
            parse_constant=_not_finite,
            parse_float=_finite,
        )
        _check_depth(content)
    except RecursionError:
        raise InputError(f"{name}: nested too deep, expected JSON") from None
    except ValueError as error:
        raise InputError(f"{name}: expected JSON ({error})") from error
    return content


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{short(twice)} stands twice")
    return found


def _not_finite(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is too large a number")
    return number


def _check_depth(content: Any) -> None:
    level = [content]
    for _ in range(DEEPEST_JSON):
        inner = [list(v.values()) if isinstance(v, dict) else v for v in level]
        level = [w for v in inner if isinstance(v, list) for w in v if isinstance(w, (dict, list))]
        if not level:
            return
    raise ValueError(f"nested deeper than {DEEPEST_JSON}")


@cache
def hints_of(owner: Any) -> Mapping[str, Any]:
    """Names and type hints of what a class or a function takes, or a `TypedDict` holds."""
    if hasattr(owner, "__required_keys__"):
        return get_type_hints(owner, include_extras=True)  # of a `TypedDict`
    call = owner.__init__ if isinstance(owner, type) else owner
    try:
        known = get_type_hints(call, include_extras=True)
    except NameError:  # a plug-in whose names its module imports for type checkers only
        known = {}
    kinds = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    named = [p.name for p in signature(call).parameters.values() if p.kind in kinds]
    return {name: known.get(name, Any) for name in named if name != "self"}


def check_fields(content: Any, owner: Any, name: str, *, only: bool = False) -> dict[str, Any]:
    """An object whose values are what a class, function or `TypedDict` says of them.

    Args:
        content: as it was read.
        owner: see `hints_of`; a `TypedDict` also says which names must be there.
        name: of the file, for messages.
        only: refuse names that the owner does not know; they are let through otherwise.

    Raises:
        InputError: the first name whose value is missing or something else.
    """
    if not isinstance(content, Mapping):
        raise InputError(f"{name}: {short(content)}, expected an object")
    hints = hints_of(owner)
    for field in sorted(getattr(owner, "__required_keys__", ())):
        if field not in content:
            raise InputError(f"{name}: {field!r} is missing")
    for field, value in content.items():
        if field in hints:
            check_value(value, hints[field], f"{name}: {field}")
        elif only:
            known = ", ".join(sorted(hints))
            raise InputError(f"{name}: unknown name {short(field)}, expected one of {known}")
    return dict(content)


def check_value(value: Any, hint: Any, name: str) -> None:
    """Refuse a value that a type hint does not allow; lists stand for tuples, integers for floats.

    Raises:
        InputError: see above; names the innermost value at fault.
    """
    if hasattr(hint, "__required_keys__"):
        check_fields(value, hint, name)
        return
    if not _fits(value, hint, lambda inner, at: check_value(value[at], inner, f"{name}[{at!r}]")):
        raise InputError(f"{name} {short(value)}: expected {_words(hint)}")


def _fits(value: Any, hint: Any, descend: Callable[[Any, Any], None]) -> bool:
    """Whether a value is of a kind; `descend` looks at the values within it."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Annotated:
        kind, *limits = inner
        if not _fits(value, kind, descend):
            return False
        return all(limit.holds(value) for limit in limits if isinstance(limit, Between))
    if origin in (Union, types.UnionType):
        kinds = [each for each in inner if each is not type(None)]
        if value is None or len(kinds) > 1:
            return any(_is(value, each) for each in inner)
        return _fits(value, kinds[0], descend)
    if origin is Literal:
        return any(value == each and type(value) is type(each) for each in inner)
    if hint in (None, type(None)):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return not isinstance(value, float) and as_integer(value) is not None
    if hint is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and _is_finite(value)
    if hint is str:
        return isinstance(value, str)
    if origin is None:
        origin = hint
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            return False
        for key in value:
            descend(inner[1] if inner else Any, key)
        return True
    if isinstance(origin, type) and issubclass(origin, Sequence):
        if not isinstance(value, (list, tuple)):
            return False
        kinds = _kinds(origin, inner, len(value))
        for at, kind in enumerate(kinds[: len(value)]):
            descend(kind, at)
        return len(kinds) == len(value)
    return isinstance(value, origin)


def _kinds(origin: Any, inner: tuple[Any, ...], length: int) -> list[Any]:
    """Hint of each entry of a sequence of that length; a pair has two whatever the length."""
    if origin is tuple and inner and inner[-1] is not Ellipsis:
        return list(inner)
    return [inner[0] if inner else Any] * length


def _is(value: Any, hint: Any) -> bool:
    try:
        check_value(value, hint, "")
    except InputError:
        return False
    return True


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def short(value: Any) -> str:
    """A value in a message, on one line, however long it is."""
    if isinstance(value, Mapping):
        return f"an object of {len(value)}"
    if isinstance(value, (list, tuple)) and (len(value) > 4 or any(map(_is_nest, value))):
        return f"a list of {len(value)}"
    if isinstance(value, int) and abs(value) > 10**20:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_nest(value: Any) -> bool:
    return isinstance(value, (list, tuple, Mapping))


_WORDS = {
    int: "an integer",
    float: "a finite number",
    str: "a text",
    bool: "true or false",
    type(None): "null",
    None: "null",
}


def _words(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if hint in _WORDS:
        return _WORDS[hint]
    if origin is Annotated:
        limits = " ".join(str(limit) for limit in inner[1:] if isinstance(limit, Between))
        is_sized = get_origin(inner[0]) is not None or inner[0] is str
        return f"{_words(inner[0])} {'of length ' if is_sized and limits else ''}{limits}".strip()
    if origin in (Union, types.UnionType):
        return " or ".join(_words(each) for each in inner)
    if origin is Literal:
        return " or ".join(map(repr, inner))
    base = origin or hint
    if isinstance(base, type) and issubclass(base, Mapping):
        return "an object"
    if isinstance(base, type) and issubclass(base, Sequence):
        if base is tuple and inner and inner[-1] is not Ellipsis:
            return f"a list of {len(inner)}"
        return f"a list of {_words(inner[0])}" if inner and inner[0] is not Any else "a list"
    return getattr(hint, "__name__", str(hint))
