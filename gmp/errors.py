"""The one exception for mistakes that a person can mend."""

from __future__ import annotations


class InputError(ValueError):
    """An input that can't be used. The message says what was found, what was expected and what to do."""
