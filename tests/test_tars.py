"""Tars as webdataset itself writes and reads them; what is refused, left out, cut and damaged."""

from __future__ import annotations

import builtins
import gzip
import io
import itertools
import json
import os
import sys
import tarfile
from pathlib import Path

import fsspec
import pytest
import webdataset

from gmp.data import tars
from gmp.data.captions import content_key
from gmp.data.tars import Tar, Tars, find_tars, read_samples
from gmp.errors import InputError


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return path


def read(path: Path | str) -> tuple[list, list[tuple[str, str]]]:
    left_out: list[tuple[str, str]] = []
    samples = list(read_samples(find_tars(str(path)).files[0], lambda *entry: left_out.append(entry)))
    return samples, left_out


FOUR = [(f"{n:04}.{suffix}", f"{suffix} {n}".encode()) for n in range(4) for suffix in ("jpg", "txt")]


# ---- which tars -----------------------------------------------------------------------------------------------------


def test_braces_are_expanded_and_order_does_not_matter(tmp_path):
    for n in range(8, 13):
        write_tar(tmp_path / f"{n:03}.tar", FOUR)
    found = find_tars(str(tmp_path / "{008..012}.tar"))
    assert [Path(tar.url).name for tar in found.files] == ["008.tar", "009.tar", "010.tar", "011.tar", "012.tar"]
    assert all(tar.size == Path(tar.url).stat().st_size for tar in found.files)
    turned = find_tars([str(tmp_path / "{011,012}.tar"), str(tmp_path / "0{10..08}.tar")])
    assert turned == found and turned.key == found.key


def test_relative_paths_are_the_same_tars_from_every_folder(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", FOUR)
    monkeypatch.chdir(tmp_path)
    assert find_tars("a.tar") == find_tars(str(tmp_path / "a.tar"))


def test_a_tar_that_is_written_anew_is_another_one(tmp_path):
    write_tar(tmp_path / "a.tar", FOUR)
    before = find_tars(str(tmp_path / "a.tar"))
    os.utime(tmp_path / "a.tar", ns=(10**18, 10**18))
    after = find_tars(str(tmp_path / "a.tar"))
    assert before.files[0].key != after.files[0].key and before.key != after.key
    assert len({Tar("a", 1, "x").key, Tar("b", 1, "x").key, Tar("a", 2, "x").key, Tar("a", 1, "y").key}) == 4


def test_the_version_is_the_stores_etag_where_it_has_one():
    class Store:
        def invalidate_cache(self):
            pass

        def info(self, path):
            return {"size": 7, "ETag": '"abc"', "mtime": 1.0, "type": "file"}

    assert tars._look(lambda url: (Store(), url), "s3://b/a.tar") == Tar("s3://b/a.tar", 7, '"abc"')


def test_all_tars_that_are_not_there_are_named_at_once(tmp_path):
    write_tar(tmp_path / "1.tar", FOUR)
    (tmp_path / "3.tar").mkdir()
    with pytest.raises(InputError) as caught:
        find_tars(str(tmp_path / "{0..3}.tar"))
    message = str(caught.value)
    assert "3 of 4 tars" in message
    assert "0.tar: not there" in message and "2.tar: not there" in message and "3.tar: a folder" in message
    assert "1.tar" not in message


@pytest.mark.parametrize(
    "url",
    [
        "pipe:touch {made}",
        "{{pipe,s3}}:touch {made}",
        "PIPE:touch {made}",
        "ais://bucket/a.tar",
        "scp://host/a.tar",
        "htgs://bucket/a.tar",
        "ftps://host/a.tar",
        "zip://a.tar::s3://bucket/b.zip",
        "file://x::pipe:touch {made}",
        "github://owner:name@/a.tar",
        "s3:pipe",
        "-",
    ],
)
def test_what_would_run_a_command_or_open_another_url_is_refused(url, tmp_path):
    made = tmp_path / "made"
    with pytest.raises(InputError, match="no command is run|is not opened"):
        find_tars(url.format(made=made))
    assert not made.exists()


def test_every_scheme_that_webdataset_gives_to_a_program_is_refused_or_opened_by_fsspec():
    programs = set(webdataset.gopen_schemes) - {"__default__"}
    assert "pipe" in programs
    opened = programs & set(tars.SCHEMES)
    assert opened <= set(fsspec.available_protocols())
    for scheme in programs - opened:
        with pytest.raises(InputError):
            tars._place(f"{scheme}://x/a.tar")


def test_no_process_is_started_to_read_a_tar(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", FOUR)
    monkeypatch.setenv("GOPEN_REWRITE", f"{tmp_path}=pipe:touch {tmp_path}/made; cat {tmp_path}")
    monkeypatch.setattr("subprocess.Popen", None)
    assert len(read(tmp_path / "a.tar")[0]) == 4
    assert not (tmp_path / "made").exists()


def test_a_store_without_its_library_is_named_with_what_it_needs():
    pytest.importorskip("fsspec")
    if "s3fs" in sys.modules or any((Path(folder) / "s3fs").is_dir() for folder in sys.path if folder):
        pytest.skip("s3fs is installed here")
    with pytest.raises(InputError, match="s3://bucket/a.tar: Install s3fs"):
        find_tars("s3://bucket/a.tar")


def test_a_tar_named_twice_and_braces_without_their_pair(tmp_path):
    write_tar(tmp_path / "a.tar", FOUR)
    with pytest.raises(InputError, match="named more than once: .*a.tar"):
        find_tars([str(tmp_path / "{a,b}.tar"), str(tmp_path / "a.tar")])
    with pytest.raises(InputError, match="brace without its pair"):
        find_tars("shards/{0..9.tar")
    with pytest.raises(InputError, match="more than 1,000,000 tars"):
        find_tars("shards/{0..9999999999}.tar")
    with pytest.raises(InputError, match="no tars were named"):
        find_tars([])


@pytest.mark.parametrize("missing", ["webdataset", "fsspec", "braceexpand"])
def test_without_the_libraries_the_message_says_how_to_install_them(missing, tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", FOUR)
    real = builtins.__import__

    def without(name, *rest):
        if name.partition(".")[0] == missing:
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match="pip install webdataset fsspec"):
        find_tars(str(tmp_path / "a.tar"))


# ---- what is in one -------------------------------------------------------------------------------------------------


def test_samples_are_those_that_webdataset_reads(tmp_path):
    path = tmp_path / "a.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for n in range(5):
            writer.write({"__key__": f"part/{n:05}", "jpg": bytes([n] * 100), "txt": f"caption {n}", "json": {"n": n}})
    samples, left_out = read(path)
    theirs = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert left_out == [] and len(samples) == len(theirs) == 5
    for mine, other in zip(samples, theirs, strict=True):
        assert mine.name == f"{other['__key__']}.jpg"
        assert mine.picture == other["jpg"] and mine.captions == (other["txt"].decode(),)


def test_a_pictures_key_is_that_of_its_file(tmp_path):
    (tmp_path / "0.jpg").write_bytes(b"jpg 0")
    write_tar(tmp_path / "a.tar", FOUR)
    assert read(tmp_path / "a.tar")[0][0].key == content_key(tmp_path / "0.jpg")


def test_captions_of_text_and_json_are_joined_stripped_and_taken_once(tmp_path):
    members = [
        *[("a.png", b"1"), ("a.txt", "\ufeff one \n\ntwo\none".encode())],
        *[("b.webp", b"2"), ("b.json", json.dumps({"caption": ["three", " four "], "width": 3}).encode())],
        *[("c.JPEG", b"3"), ("c.txt", b"five"), ("c.json", b'{"caption": "five", "n": ' + b"9" * 6000 + b"}")],
    ]
    samples, left_out = read(write_tar(tmp_path / "a.tar", members))
    assert left_out == []
    assert [(s.name, s.captions) for s in samples] == [
        ("a.png", ("one", "two")),
        ("b.webp", ("three", "four")),
        ("c.jpeg", ("five",)),
    ]


def test_what_cannot_be_used_is_told_with_its_reason_and_the_rest_is_read(tmp_path):
    members = [
        *[("bare.jpg", b"1")],
        *[("blank.jpg", b"1"), ("blank.txt", b" \n ")],
        *[("words.txt", b"no picture")],
        *[("latin.jpg", b"1"), ("latin.txt", b"\xe9")],
        *[("list.jpg", b"1"), ("list.json", b"[1]")],
        *[("number.jpg", b"1"), ("number.json", b'{"caption": 3}')],
        *[("torn.jpg", b"1"), ("torn.json", b'{"caption": ')],
        *[("deep.jpg", b"1"), ("deep.json", b"[" * 100_000)],
        *[("twice.jpg", b"1"), ("twice.txt", b"kept"), ("twice.jpg", b"2")],
        *[("other.cls", b"1"), ("._hidden.jpg", b"1"), (".jpg", b"1")],
        *[("good.jpg", b"1"), ("good.txt", b"good")],
    ]
    samples, left_out = read(write_tar(tmp_path / "a.tar", members))
    assert [(s.name, s.picture, s.captions) for s in samples] == [
        ("twice.jpg", b"1", ("kept",)),
        ("good.jpg", b"1", ("good",)),
    ]
    reasons = dict(left_out)
    assert reasons["bare.jpg"] == reasons["blank.jpg"] == "no caption"
    assert reasons["words"] == "no picture beside its text"
    assert "UTF-8" in reasons["latin.jpg"] and "without the key caption" in reasons["list.jpg"]
    assert "neither a string nor" in reasons["number.jpg"] and "cannot be read" in reasons["torn.jpg"]
    assert "nested too deeply" in reasons["deep.jpg"]
    assert any("twice.jpg: duplicate file name" in reason for reason in reasons.values())
    assert len(left_out) == 9


def test_a_member_that_promises_too_many_bytes_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "LARGEST", 50)
    members = [("big.jpg", b"1" * 51), ("big.txt", b"big"), ("fits.jpg", b"1" * 50), ("fits.txt", b"fits")]
    samples, left_out = read(write_tar(tmp_path / "a.tar", members))
    assert [s.name for s in samples] == ["fits.jpg"]
    assert ("big.jpg", "51 bytes, more than 50") in left_out


@pytest.mark.parametrize(("suffix", "mode"), [(".tar.gz", "w:gz"), (".tgz", "w:gz"), (".tar.bz2", "w:bz2")])
def test_compressed_tars_are_read(suffix, mode, tmp_path):
    path = write_tar(tmp_path / f"a{suffix}", FOUR, mode)
    assert [s.captions for s in read(path)[0]] == [(f"txt {n}",) for n in range(4)]


def test_a_tar_in_another_store_is_streamed(tmp_path):
    content = write_tar(tmp_path / "a.tar", FOUR).read_bytes()
    with fsspec.open("memory://bucket/a.tar", "wb") as file:
        file.write(content)
    found = find_tars("memory://bucket/a.tar")
    assert found.files[0].size == len(content) and found.files[0].version
    assert read("memory://bucket/a.tar")[0] == read(tmp_path / "a.tar")[0]


WHOLE = 4 * 2 * 1024  # bytes of four samples before the zeros at the end: each member is a header and a block


@pytest.mark.parametrize("length", [0, 1, 511, 512, 700, 1024, 2048, 2048 + 100, WHOLE - 1, WHOLE, WHOLE + 100])
def test_a_tar_that_is_cut_anywhere_is_told(length, tmp_path):
    path = write_tar(tmp_path / "a.tar", FOUR)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match="a.tar is damaged or cut"):
        read(path)


def test_a_tar_with_a_damaged_header_in_its_middle_is_told(tmp_path):
    path = write_tar(tmp_path / "a.tar", FOUR)
    content = bytearray(path.read_bytes())
    content[4096 + 10] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="no whole header at byte 4,096"):
        read(path)


def test_a_compressed_tar_that_is_cut_is_told(tmp_path):
    content = gzip.compress(write_tar(tmp_path / "a.tar", FOUR).read_bytes())
    (tmp_path / "a.tar.gz").write_bytes(content[:-20])
    with pytest.raises(InputError, match="damaged or cut"):
        read(tmp_path / "a.tar.gz")


def test_something_else_than_a_tar_is_told(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"<!doctype html>" * 100)
    with pytest.raises(InputError, match="damaged or cut"):
        read(tmp_path / "a.tar")


def test_a_tar_that_vanished_meanwhile_is_told(tmp_path):
    found = find_tars(str(write_tar(tmp_path / "a.tar", FOUR)))
    (tmp_path / "a.tar").unlink()
    with pytest.raises(InputError, match="not there any more"):
        next(read_samples(found.files[0], print))


def test_an_empty_tar_holds_nothing(tmp_path):
    assert read(write_tar(tmp_path / "a.tar", [])) == ([], [])


def test_a_tar_is_streamed_and_not_read_ahead(tmp_path):
    """The memory that reading takes does not grow with the tar: nothing is kept of what was handed out."""
    path = write_tar(tmp_path / "a.tar", [(f"{n}.{s}", b"1") for n in range(3000) for s in ("jpg", "txt")])
    opened = []
    real = tarfile.open
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tarfile, "open", lambda *args, **given: opened.append(real(*args, **given)) or opened[-1])
        samples = read_samples(find_tars(str(path)).files[0], print)
        for _ in itertools.islice(samples, 2000):
            assert len(opened[0].members) <= 1
        samples.close()


def test_the_identity_of_no_tars_and_of_some_differ():
    assert Tars(()).key != Tars((Tar("a", 1, ""),)).key and len(Tars((Tar("a", 1, ""),))) == 1
