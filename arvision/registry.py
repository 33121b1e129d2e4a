"""One registry class, used for samplers, model families and everything else that has a name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from .errors import unknown_name

T = TypeVar("T")


@dataclass(frozen=True)
class Entry(Generic[T]):
    """A registered object and the facts recorded beside it."""

    name: str
    value: T
    facts: dict[str, Any] = field(default_factory=dict)


class Registry(Generic[T]):
    """Names to objects; a duplicate raises, an unknown name lists the known ones.

    Args:
        kind: what the names stand for, used in messages.
        entry_point_group: packages outside may add entries under this group; each entry point
            is imported on first look-up and registers itself.
    """

    def __init__(self, kind: str, entry_point_group: str | None = None) -> None:
        self.kind = kind
        self._entries: dict[str, Entry[T]] = {}
        self._group = entry_point_group

    def register(self, name: str, **facts: Any) -> Callable[[T], T]:
        """Decorator that files an object under `name` with any `facts` about it."""

        def file(value: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is already registered")
            self._entries[name] = Entry(name, value, facts)
            return value

        return file

    def _load_plugins(self) -> None:
        if self._group is not None:
            group, self._group = self._group, None
            for point in entry_points(group=group):
                point.load()

    def entry(self, name: str) -> Entry[T]:
        """The entry filed under `name`.

        Raises:
            InputError: no such name.
        """
        self._load_plugins()
        if not isinstance(name, str) or name not in self._entries:
            raise unknown_name(self.kind, name, self._entries)
        return self._entries[name]

    def __getitem__(self, name: str) -> T:
        return self.entry(name).value

    def __contains__(self, name: object) -> bool:
        self._load_plugins()
        return isinstance(name, str) and name in self._entries

    def __iter__(self) -> Iterator[Entry[T]]:
        self._load_plugins()
        return iter(list(self._entries.values()))
