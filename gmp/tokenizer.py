"""CLIP's byte-level BPE on the `tokenizers` library.

Same ids as `transformers.CLIPTokenizer` (the one that ComfyUI encodes prompts with): NFC, whitespace, lower
case; no ftfy, no HTML unescaping. The merges are openai/CLIP's (assets/LICENSE-openai-clip.txt); the
vocabulary follows from them: 256 bytes, 256 bytes that end a word, 48894 merges, start-of-text, end-of-text.
"""

from __future__ import annotations

import functools
import gzip
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .clip import end_of_text
from .errors import InputError

if TYPE_CHECKING:
    import tokenizers

START = "<|startoftext|>"
END = "<|endoftext|>"
START_ID = 49406
END_ID = 49407
VOCABULARY_SIZE = 49408

_MERGES = Path(__file__).parent / "assets" / "bpe_simple_vocab_16e6.txt.gz"
# Any letter case: some tokenizers lower the caption before they look for special tokens.
_SPECIAL = re.compile(r"<\|(?:startoftext|endoftext)\|>", re.IGNORECASE | re.ASCII)
_SURROGATE = re.compile("[\ud800-\udfff]")
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_CHUNK = 8192  # captions encoded at once; bounds the memory that Python lists of ids take


@dataclass(frozen=True)
class Tokens:
    """Encoded captions."""

    ids: torch.Tensor  # (N, context_length) int64
    truncated: int  # captions that were longer than the context; cut, end-of-text kept as the last id
    specials: int  # captions from which a literal special token was taken out


Tokenize = Callable[[Sequence[str]], Tokens]


class Tokenizer:
    """Captions -> `Tokens`. CLIP-L pads with end-of-text (49407), OpenCLIP's models with 0."""

    def __init__(self, context_length: int = 77, pad_id: int = END_ID):
        if context_length < 2:
            raise InputError(
                f"The context length is {context_length}; start-of-text and end-of-text alone take 2 tokens."
            )
        if not 0 <= pad_id < VOCABULARY_SIZE:
            raise InputError(f"The padding id is {pad_id}; it must lie in 0..{VOCABULARY_SIZE - 1}.")
        self.context_length = context_length
        self.pad_id = pad_id

    def __call__(self, captions: Sequence[str]) -> Tokens:
        """Encode; the empty caption is start-of-text, end-of-text.

        Raises InputError for anything but a list of str.
        """
        if isinstance(captions, str):
            raise InputError("The tokenizer takes a list of captions and got one string; put it into a list.")
        strangers = [f"{i} ({type(c).__name__})" for i, c in enumerate(captions) if not isinstance(c, str)]
        if strangers:
            raise InputError(
                f"{len(strangers)} of {len(captions)} captions are not strings: {', '.join(strangers[:5])}."
            )
        room = self.context_length - 2
        ids = torch.full((len(captions), self.context_length), self.pad_id, dtype=torch.int64)
        truncated = specials = 0
        for start in range(0, len(captions), _CHUNK):
            chunk = captions[start : start + _CHUNK]
            specials += sum(map(has_special, chunk))
            rows = []
            for encoding in _bpe().encode_batch([plain(c) for c in chunk], add_special_tokens=False):
                words = encoding.ids
                truncated += len(words) > room
                row = [START_ID, *words[:room], END_ID]
                rows.append(row + [self.pad_id] * (self.context_length - len(row)))
            ids[start : start + len(rows)] = torch.tensor(rows, dtype=torch.int64)
        return Tokens(ids, truncated, specials)


def plain(caption: str) -> str:
    """The caption without anything that a tokenizer would take for a command.

    A literal special token becomes a space: as a token it would end the text early and move the pooled row.
    Half a surrogate pair, which can't be encoded as UTF-8, becomes U+FFFD. Everything else is left alone.
    """
    if _SURROGATE.search(caption):
        caption = caption.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return _SPECIAL.sub(" ", caption)


def has_special(caption: str) -> bool:
    """Whether `plain` takes a literal special token out of the caption."""
    return _SPECIAL.search(caption) is not None


def lengths(ids: torch.Tensor) -> torch.Tensor:
    """Tokens up to and including the first end-of-text, whatever the padding: (N, L) -> (N,)"""
    return end_of_text(ids) + 1


def vocabulary() -> dict[str, int]:
    """Token -> id, in openai/CLIP's order; words end with `</w>`."""
    return dict(zip(_symbols(merges()), range(VOCABULARY_SIZE), strict=True))


@functools.lru_cache(maxsize=1)
def merges() -> tuple[tuple[str, str], ...]:
    """The pairs that CLIP's BPE joins, most frequent first.

    The file holds more; CLIP uses the first 48894.
    """
    lines = gzip.decompress(_MERGES.read_bytes()).decode("utf-8").split("\n")
    count = VOCABULARY_SIZE - 2 * 256 - 2
    return tuple((left, right) for left, right in (line.split() for line in lines[1 : 1 + count]))


def _symbols(pairs: Sequence[tuple[str, str]]) -> list[str]:
    alphabet = _byte_symbols()
    return [*alphabet, *(s + "</w>" for s in alphabet), *(a + b for a, b in pairs), START, END]


def _byte_symbols() -> list[str]:
    """A printable character for each of the 256 bytes, in openai/CLIP's order: printable ones first."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]


@functools.lru_cache(maxsize=1)
def _bpe() -> tokenizers.Tokenizer:
    """The encoder, built once (0.2 s). Never changed after that, so threads may share it."""
    import tokenizers
    from tokenizers import Regex, models, normalizers, pre_tokenizers

    bpe = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary(), merges=list(merges()), end_of_word_suffix="</w>", fuse_unk=False)
    )
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return bpe


def tokenizer_for(context_length: int, member: str | None) -> Tokenizer:
    """The tokenizer with the padding that diffusion models use: end-of-text for clip_l, 0 for clip_g and clip_h.

    Padding moves nothing up to end-of-text, but SDXL reads the rows behind it too.
    """
    return Tokenizer(context_length, 0 if member in ("clip_g", "clip_h") else END_ID)
