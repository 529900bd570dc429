"""Every language has all texts of the English one, with the same places for names and numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

LOCALES = Path(__file__).parent.parent / "locales"
LANGUAGES = ("en", "zh", "ja", "de", "fr", "es", "ru")
FILES = sorted(path.name for path in (LOCALES / "en").glob("*.json"))


def texts(language: str, file: str) -> dict[tuple[str, ...], str]:
    """Path of keys -> text."""
    found = {}
    todo = [((), json.loads((LOCALES / language / file).read_text(encoding="utf-8")))]
    while todo:
        path, value = todo.pop()
        if isinstance(value, dict):
            todo += [((*path, key), item) for key, item in value.items()]
        else:
            found[path] = value
    return found


def places(text: str) -> list[str]:
    return sorted(re.findall(r"\{\w+\}", text))


def test_the_languages_are_those_that_are_promised():
    assert {path.name for path in LOCALES.iterdir()} == set(LANGUAGES)
    assert FILES == ["commands.json", "main.json", "nodeDefs.json", "settings.json"]


@pytest.mark.parametrize("language", LANGUAGES[1:])
@pytest.mark.parametrize("file", FILES)
def test_a_language_has_the_english_keys_and_places(language, file):
    english, other = texts("en", file), texts(language, file)
    assert other.keys() == english.keys()
    assert {path: places(text) for path, text in other.items()} == {path: places(t) for path, t in english.items()}
    assert all(isinstance(text, str) and text.strip() for text in other.values())


@pytest.mark.parametrize("language", LANGUAGES[1:])
def test_a_language_is_not_the_english_one(language):
    english, other = texts("en", "nodeDefs.json"), texts(language, "nodeDefs.json")
    tips = [path for path in english if path[-1] in ("tooltip", "description")]
    assert sum(other[path] == english[path] for path in tips) == 0
    names = [path for path in english if path[-1] == "name"]  # graphs and help pages name inputs by them
    assert all(other[path] == english[path] for path in names)
