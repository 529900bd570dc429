"""The tokenizer against transformers' CLIPTokenizer, built from the same merges."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gmp import tokenizer as module
from gmp.errors import InputError
from gmp.tokenizer import Tokenizer, has_special, lengths, plain, vocabulary

ROOT = Path(__file__).parents[1]

NASTY = [
    "a photo of a cat",
    "",
    " ",
    "\t\n\r\u000b\u000c",
    "a\u00a0b\u2003c\u3000d\u2028e\u0085f",
    "zero\u200bwidth\u200djoiner\ufeffbom",
    "caf\u00e9 and cafe\u0301, \u00c5ngstr\u00f6m \u212b, n\u0303",
    "\u1e9b\u0323 Stra\u00dfe \u0130stanbul \u01c5 \u03a3\u03af\u03c3\u03c5\u03c6\u03bf\u03a3",
    "family \U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
    "flag \U0001f1e9\U0001f1ea thumb \U0001f44d\U0001f3fd \u2764\ufe0f",
    "&amp; &lt;b&gt; &quot;quoted&quot; &amp;amp; &#39;",
    "<b>bold</b> <|pad|> <start_of_text> <end_of_text> <| endoftext |>",
    "\u4e00\u53ea\u732b\u5750\u5728\u57ab\u5b50\u4e0a\u3002",
    "\u732b\u304c\u5ea7\u3063\u3066\u3044\u308b \uace0\uc591\uc774",
    "\u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947 ",
    "\u05e9\u05dc\u05d5\u05dd \u0e41\u0e21\u0e27",
    "1234567890 3.14159 1,000,000 1st 2nd 16:9 4k \u00bd \u00b2 \u2167 \u0663",
    "it's John's; they'll we've I'm you'd don't they're 'tis 'S 'LL o'clock ''s rock'n'roll",
    "it\u2019s \u201ccurly\u201d \u2018quotes\u2019 \u2014 dash\u2026",
    "UPPER CaSe WORDS, MiXeD",
    "!!! ??? ... ,,, --- ___ *** ### $$$ %%% ^^^ &&& ((())) [[]] {{}} \\\\ // ||| ~~~ ``` +=+ <<>> @@",
    "wow!!!really???yes...no",
    "\ufb01sh \ufb02ower o\ufb03ce \ufb06 \u0132 \u00e6",
    "\uff26\uff35\uff2c\uff2c\uff0d\uff37\uff29\uff24\uff34\uff28 \uff11\uff12\uff13 \uff01\uff1c\uff5c",
    "snake_case camelCase kebab-case path/to/file.jpg https://example.com/?q=1&r=2 a@b.c",
    "(masterpiece:1.2), best quality, [bad], <lora:name:0.8>, embedding:thing",
    "control \x00\x01\x07\x1b\x7f characters",
    "private \ue000 and noncharacter \ufffe \U0010ffff",
    "word " * 75,
    "word " * 76,
    "word " * 200,
    "antidisestablishmentarianism" * 30,
    "\U0001f600" * 100,
    "a" * 2000,
]
SPECIAL = [
    "before <|endoftext|> after",
    "<|startoftext|>",
    "<|endoftext|><|endoftext|>",
    "x<|EndOfText|>y",
    "<|endof<|endoftext|>text|>",
]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """transformers' tokenizer from files written as openai/CLIP's code derives them."""
    transformers = pytest.importorskip("transformers")
    lines = gzip.open(ROOT / "gmp/assets/bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8").read().split("\n")
    pairs = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    bs = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    cs, n = bs[:], 0
    for b in range(256):
        if b not in bs:
            bs.append(b)
            cs.append(256 + n)
            n += 1
    symbols = [chr(c) for c in cs]
    symbols += [s + "</w>" for s in symbols] + ["".join(p) for p in pairs] + ["<|startoftext|>", "<|endoftext|>"]
    folder = tmp_path_factory.mktemp("clip")
    (folder / "vocab.json").write_text(json.dumps({s: i for i, s in enumerate(symbols)}))
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(p) for p in pairs) + "\n", encoding="utf-8"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    return transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def encode(reference, captions: list[str]) -> torch.Tensor:
    batch = reference(captions, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    return batch["input_ids"]


def test_known_ids():
    ids = Tokenizer()(["a photo of a cat"]).ids[0]
    assert ids[:7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert set(ids[7:].tolist()) == {49407}


def test_vocabulary_is_complete_and_matches_the_reference(reference):
    ours = vocabulary()
    assert len(ours) == 49408 and sorted(ours.values()) == list(range(49408))
    assert ours == reference.get_vocab()


@pytest.mark.parametrize("caption", NASTY, ids=range(len(NASTY)))
def test_same_ids_as_transformers(reference, caption):
    tokens = Tokenizer()([caption])
    assert tokens.ids.tolist() == encode(reference, [caption]).tolist()
    assert tokens.specials == 0


def test_same_ids_as_transformers_on_random_text(reference):
    g = torch.Generator().manual_seed(0)
    ranges = [(32, 127), (0, 0x300), (0x300, 0x370), (0x370, 0x3000), (0x3000, 0xD800), (0xE000, 0x1FFFF)]
    captions = []
    for i in range(1000):
        low, high = ranges[i % len(ranges)]
        captions.append("".join(map(chr, torch.randint(low, high, (40,), generator=g).tolist())))
    assert torch.equal(Tokenizer()(captions).ids, encode(reference, captions))


def test_batch_equals_one_by_one_and_spans_chunks(monkeypatch):
    whole = Tokenizer()(NASTY)
    monkeypatch.setattr(module, "_CHUNK", 7)
    chunked = Tokenizer()(NASTY)
    assert torch.equal(whole.ids, chunked.ids)
    assert (whole.truncated, whole.specials) == (chunked.truncated, chunked.specials)
    assert whole.ids.dtype == torch.int64


def test_truncation_keeps_end_of_text_and_is_counted():
    tokens = Tokenizer()(["word " * 75, "word " * 76, "word " * 300])
    assert tokens.truncated == 2
    assert tokens.ids[:, -1].tolist() == [49407] * 3
    assert torch.equal(tokens.ids[0], tokens.ids[1])


def test_padding_and_context_length_are_choices():
    tokens = Tokenizer(context_length=8, pad_id=0)(["a photo of a cat", "cat"])
    assert tokens.ids.tolist() == [
        [49406, 320, 1125, 539, 320, 2368, 49407, 0],
        [49406, 2368, 49407, 0, 0, 0, 0, 0],
    ]
    assert lengths(tokens.ids).tolist() == [7, 3]


def test_no_captions():
    tokens = Tokenizer()([])
    assert tokens.ids.shape == (0, 77) and tokens.truncated == tokens.specials == 0


@pytest.mark.parametrize("pad", [0, 49407])
def test_lengths_match_a_plain_search(pad):
    ids = Tokenizer(pad_id=pad)(NASTY).ids
    assert lengths(ids).tolist() == [row.index(49407) + 1 for row in ids.tolist()]


@pytest.mark.parametrize("caption", SPECIAL)
def test_literal_special_tokens_are_taken_out(reference, caption):
    tokens = Tokenizer()([caption, "cat"])
    assert tokens.specials == 1
    row = tokens.ids[0].tolist()
    inside = row[1 : lengths(tokens.ids)[0] - 1]
    assert not set(inside) & {49406, 49407}
    assert set(row[lengths(tokens.ids)[0] :]) <= {49407}
    assert has_special(caption) and not has_special(plain(caption))
    # the host's tokenizer, given the cleaned caption, agrees
    assert encode(reference, [plain(caption)]).tolist() == [row]


def test_special_token_does_not_cut_the_caption():
    ours = Tokenizer()(["before <|endoftext|> after", "before after"]).ids
    assert torch.equal(ours[0], ours[1])


def test_plain_leaves_ordinary_captions_alone():
    assert [plain(c) for c in NASTY] == NASTY


def test_half_surrogates_are_replaced():
    assert plain("cat \ud83d sat") == "cat \ufffd sat"
    assert plain("\ud83d\ude00") == "\U0001f600"
    assert Tokenizer()(["cat \ud83d"]).ids.shape == (1, 77)


@pytest.mark.parametrize("bad", ["one string", ["a", None, 3]])
def test_wrong_input(bad):
    with pytest.raises(InputError):
        Tokenizer()(bad)


@pytest.mark.parametrize("kwargs", [{"context_length": 1}, {"pad_id": -1}, {"pad_id": 49408}])
def test_wrong_settings(kwargs):
    with pytest.raises(InputError):
        Tokenizer(**kwargs)


def test_import_reads_no_vocabulary():
    code = "import gmp.tokenizer, sys; assert not {'tokenizers', 'transformers'} & set(sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=60)


def test_forty_thousand_captions():
    captions = [f"a photo of a cat number {i} sitting on a wooden bench beside the sea" for i in range(40_000)]
    ids = Tokenizer()(captions).ids
    assert ids.shape == (40_000, 77) and ids.unique(dim=0).shape == ids.shape
