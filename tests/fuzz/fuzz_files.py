"""Feeds mutated files to the reading of headers: `python tests/fuzz/fuzz_files.py --seconds 60`.

Coverage leads atheris (libFuzzer for Python) from small valid files of every container to strange ones. Allowed are a
header whose tensors lie within the file, and InputError. The last line says how many files were tried and how many
crashed; the code is 1 if any did. Slow files (10 seconds) and hungry ones (2 GiB) count as crashes.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FORMS = ("safetensors", "safetensors header", "zip", "pickle in a zip", "pickle")


def form(data: bytes) -> tuple[str, bytes]:
    """The first byte says what the rest is: a whole file, or a part that gets a faultless frame."""
    return FORMS[data[0] % len(FORMS)], data[1:]


def file_of(data: bytes) -> bytes:
    from tests.fuzz.seeds import zipped

    kind, rest = form(data)
    if kind == "safetensors header":
        return struct.pack("<Q", len(rest)) + rest + bytes(96)
    if kind == "pickle in a zip":
        return zipped(rest, {str(number): bytes(96) for number in range(3)})
    return rest


def corpus(folder: Path) -> None:
    """Valid files, each in the forms it has."""
    from tests.fuzz.seeds import pickles, seeds

    whole = seeds()
    inputs = [bytes([FORMS.index(kind)]) + content for kind, contents in whole.items() for content in contents]
    headers = [content[8 : 8 + int.from_bytes(content[:8], "little")] for content in whole["safetensors"]]
    inputs += [bytes([FORMS.index("safetensors header")]) + header for header in headers]
    inputs += [bytes([FORMS.index("pickle in a zip")]) + content for content in pickles()]
    folder.mkdir()
    for number, content in enumerate(inputs):
        (folder / f"{number:03}").write_bytes(content)


def fuzz(work: Path, options: list[str]) -> None:
    """Runs until libFuzzer ends the process. Exceptions are written down, one of each kind, and not fatal."""
    import atheris

    with atheris.instrument_imports(include=["gmp", "pickletools", "zipfile"]):
        import pickletools  # noqa: F401
        import zipfile  # noqa: F401

        from tests.fuzz.seeds import header_or_sentence
    found: set[str] = set()

    def one(data: bytes) -> None:
        if not data:
            return
        try:
            header_or_sentence(work / "input.pt", file_of(data))
        except Exception as error:
            where = f"{type(error).__name__} at {traceback.extract_tb(error.__traceback__)[-1]}"
            if where not in found:
                found.add(where)
                (work / f"crash-{len(found)}").write_bytes(data)
                (work / f"crash-{len(found)}.txt").write_text(traceback.format_exc())

    atheris.Setup([sys.argv[0], *options], one)
    atheris.Fuzz()


def run(seconds: int, seed: int, work: Path) -> tuple[int, int]:
    """How many files were tried and how many crashed. A process that dies is replaced until the time is over."""
    corpus(work / "corpus")
    tried = deaths = 0
    end = time.monotonic() + seconds
    while (left := int(end - time.monotonic())) > 0:
        options = [
            f"-max_total_time={left}", f"-seed={seed + deaths}", f"-artifact_prefix={work}/crash-process-",
            "-timeout=10", "-rss_limit_mb=2048", "-max_len=20000", "-print_final_stats=1", "-verbosity=1",
        ]  # fmt: skip
        command = [sys.executable, __file__, "--work", str(work), *options, str(work / "corpus")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace")
        counts = re.findall(r"number_of_executed_units: (\d+)", done.stderr) or re.findall(r"#(\d+)\t", done.stderr)
        tried += int(counts[-1]) if counts else 0
        if done.returncode:
            deaths += 1
            (work / f"crash-process-{deaths}.txt").write_text(done.stderr[-20_000:])
            if not counts:  # it cannot even begin
                break
    return tried, len(list(work.glob("crash-*.txt")))


def main() -> int:
    sys.path.insert(0, str(ROOT))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="the last line as JSON")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args()
    try:
        import atheris  # noqa: F401
    except ImportError:
        print("atheris is not installed; it has wheels for Linux: pip install atheris", file=sys.stderr)
        return 2
    if options.work:
        fuzz(options.work, rest)
        return 0
    work = Path(tempfile.mkdtemp(prefix="fuzz-files-"))
    tried, crashes = run(options.seconds, options.seed, work)
    if crashes:
        for path in sorted(work.glob("crash-*.txt")):
            print(f"{path}\n{path.read_text()[-2000:]}")
    else:
        shutil.rmtree(work)
    figures = {"seconds": options.seconds, "executions": tried, "crashes": crashes}
    print(json.dumps(figures) if options.json else f"{tried:,} files in {options.seconds} s, {crashes} crashes")
    return bool(crashes) or not tried


if __name__ == "__main__":
    sys.exit(main())
