"""The one exception for mistakes that a person can mend, and how its message lists names."""

from __future__ import annotations

from collections.abc import Iterable


class InputError(ValueError):
    """An input that can't be used. The message says what was found, what was expected and what to do."""


class ChangedError(InputError):
    """A file that was replaced or written to while it was read; read from its header on, it may be whole."""


def some(names: Iterable[str], shown: int = 6, *, sort: bool = True) -> str:
    """The first names, and how many there are if that is not all; fit for a sentence whatever a file calls them."""
    names = sorted(names) if sort else list(names)
    safe = [name if name.isprintable() else ascii(name) for name in names[:shown]]
    text = ", ".join(name if len(name) <= 200 else f"{name[:200]} …" for name in safe)
    return text + (f" … ({len(names)} in all)" if len(names) > shown else "")
