"""How a command explains itself: one sentence, its options, an example."""

from __future__ import annotations

import argparse


def add_command(commands: argparse._SubParsersAction, name: str, text: str, example: str) -> argparse.ArgumentParser:
    """A further command of these, with --json; example: what follows `python -m gmp`."""
    parser = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=f"example:\n  python -m gmp {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the answer as JSON on the last line")
    return parser
