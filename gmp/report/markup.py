"""The few pieces of HTML that a page is made of. What is not named `body` or `cell` is text, and is escaped."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable


def text(value: object) -> str:
    return html.escape(str(value))


def paragraph(words: str, kind: str = "") -> str:
    return f'<p class="{kind}">{text(words)}</p>' if kind else f"<p>{text(words)}</p>"


def listed(lines: Iterable[str]) -> str:
    """An unordered list; nothing where there are no lines."""
    items = "".join(f"<li>{text(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def rows(pairs: Iterable[tuple[str, object]]) -> str:
    """A table of names and values."""
    found = [f'<tr><th scope="row">{text(n)}</th><td><code>{text(plain_value(v))}</code></td></tr>' for n, v in pairs]
    return f'<table class="facts">{"".join(found)}</table>' if found else ""


def plain_value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def picture(content: bytes, alt: str, kind: str = "png") -> str:
    return f'<img alt="{text(alt)}" src="data:image/{kind};base64,{base64.b64encode(content).decode()}">'


def figure(body: str, caption: str) -> str:
    return f"<figure>{body}<figcaption>{text(caption)}</figcaption></figure>"


def number(value: object, digits: int = 3) -> str:
    """A dash where there is none, so many digits behind the point."""
    return "–" if isinstance(value, bool) or not isinstance(value, (int, float)) else f"{value:.{digits}f}"


def percent(value: object, digits: int = 1) -> str:
    return "–" if not isinstance(value, (int, float)) else f"{100 * value:.{digits}f} %"
