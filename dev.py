"""Everything a developer does: `python dev.py demo | test | lint | bench | fuzz`. Standard library only.

Makes `.venv` beside this file on the first call and installs what `requirements-dev.txt` lists; later calls reuse it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
ATHERIS = "atheris==3.0.0"
STAMP = VENV / "installed.sha256"
REQUIREMENTS = ("requirements.txt", "requirements-dev.txt")
PEERS = "requirements-peers.txt"  # libraries to test against; their own requirements would move torch
OLDEST = (3, 10)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(*command: str | Path) -> int:
    say("$ " + " ".join(map(str, command)))
    # threads that wait leave their core to others: on a busy machine torch is half as slow with it
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ
    return subprocess.run([str(part) for part in command], cwd=ROOT, env=environment).returncode


def has_pip() -> bool:
    return PYTHON.exists() and not subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True).returncode


def set_up() -> None:
    """Makes the environment, or leaves it as it is when the requirements have not changed."""
    wanted = hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in (*REQUIREMENTS, PEERS))).hexdigest()
    if PYTHON.exists() and STAMP.exists() and STAMP.read_text() == wanted:
        return
    say(f"Setting up {VENV}: once, and a few minutes with a download of PyTorch")
    if not has_pip():  # none yet, or the making of it was interrupted
        try:
            venv.create(VENV, with_pip=True, clear=True, symlinks=os.name != "nt")
        except subprocess.CalledProcessError:
            sys.exit("this Python cannot make environments with pip; on Debian and Ubuntu: apt install python3-venv")
    for what in (("-r", REQUIREMENTS[-1]), ("--no-deps", "-r", PEERS)):
        if run(PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what):
            sys.exit(f"could not install {what[-1]}; see above. Delete {VENV} to start over")
    STAMP.write_text(wanted)


def lint() -> int:
    return run(PYTHON, "-m", "ruff", "check", ".") or run(PYTHON, "-m", "ruff", "format", "--check", ".")


def check_javascript() -> int:
    """Syntax of every script of the panel, and its tests; says so where node is missing."""
    scripts = sorted((ROOT / "web").rglob("*.js"))
    tests = sorted((ROOT / "tests" / "js").glob("*.test.js"))
    node = shutil.which("node")
    if not node:
        say("node is not installed: JavaScript is not checked")
        return 0
    codes = [run(node, "--check", script) for script in scripts]
    if tests:
        codes.append(run(node, "--test", *tests))
    return max(codes, default=0)


def test(arguments: list[str]) -> int:
    """Engine tests in two processes; `-n 0` as a further argument makes it one."""
    return lint() or check_javascript() or run(PYTHON, "-m", "pytest", "-n", "2", "--dist", "loadgroup", *arguments)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in {
        "demo": "repair the shipped ruined text encoder and print before and after; --json for figures",
        "test": "ruff, engine tests, and JavaScript checks if node is there; more arguments go to pytest",
        "lint": "ruff alone",
        "bench": "benchmarks, by name: cost, dataset, diagnose, files, history, pictures, quality, retrieval, speed, "
        "telemetry",
        "fuzz": "damaged and hostile model files, guided by coverage; --seconds N (600)",
    }.items():
        commands.add_parser(name, help=text, add_help=False)
    options, rest = parser.parse_known_args()
    if sys.version_info < OLDEST:
        sys.exit(f"Python {OLDEST[0]}.{OLDEST[1]} or later is needed; this is {sys.version.split()[0]}")
    set_up()
    if options.command == "demo":
        return run(PYTHON, "-m", "gmp", "demo", *rest)
    if options.command == "lint":
        return lint()
    if options.command == "test":
        return test(rest)
    return fuzz(rest) if options.command == "fuzz" else bench(rest)


def fuzz(arguments: list[str]) -> int:
    """Installs atheris on its first call: it is there for Linux and macOS only, and nothing else needs it."""
    if subprocess.run([PYTHON, "-c", "import atheris"], capture_output=True).returncode:
        if run(PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", ATHERIS):
            sys.exit(f"could not install {ATHERIS}; see above")
    return run(PYTHON, ROOT / "tests" / "fuzz" / "fuzz_files.py", *arguments)


def bench(arguments: list[str]) -> int:
    names = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
    if not arguments or arguments[0] not in names:
        say(f"which benchmark? {', '.join(names)}")
        return 2
    return run(PYTHON, ROOT / "benchmarks" / f"{arguments[0]}.py", *arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
