"""One self-contained HTML page about a run: what it has changed, how it went, and all that it takes to redo it.

No scripts and no links; pictures are in the page. A run that has not finished, or has no evidence, gets a page with
what is there, which says what is missing and why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from ..files import write_bytes
from .contents import Contents, read
from .markup import text
from .sections import SECTIONS
from .style import STYLE

REPORT = "report.html"

__all__ = ("REPORT", "Contents", "read", "report", "write_report")


def report(
    folder: Path,
    history: Mapping[str, object],
    state: str | None = None,
    plain: Callable[[str], str] = lambda text: text,
) -> str:
    """The page as text.

    history: the whole one, as `History.whole` gives it. state: of a run that has not finished, in words. plain: takes
    out of a text what must not be shown; folders of this machine are taken out in any case.
    """
    return page(read(folder, history, state, plain))


def write_report(
    folder: Path, history: Mapping[str, object], state: str | None = None, path: Path | None = None
) -> Path:
    """Writes the page, atomically; `report.html` in the run's folder where no path is given."""
    path = path or folder / REPORT
    write_bytes(report(folder, history, state).encode(), path)
    return path


def page(run: Contents) -> str:
    title = f"Run {text(run.name)}"
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{title}</title><style>{STYLE}</style></head>'
    )
    return f"{head}<body><main>{''.join(_section(run, *one) for one in SECTIONS)}</main></body></html>\n"


def _section(run: Contents, title: str, make: Callable[[Contents], str]) -> str:
    """A section, left out where there is nothing to say. Files of a run may be damaged, or of another version."""
    try:
        body = make(run)
    except (AttributeError, ArithmeticError, KeyError, LookupError, TypeError, ValueError) as error:
        body = f"<p>Cannot be shown: what the run's folder holds of it is damaged ({text(type(error).__name__)}).</p>"
    if not body:
        return ""
    return f"<section><h2>{text(title)}</h2>{body}</section>" if title else f"<header>{body}</header>"
