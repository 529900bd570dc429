"""A real ComfyUI, started with its own Python in a folder of its own, with this pack linked into it.

COMFYUI_DIR tells where ComfyUI lies (default ~/ComfyUI); without it these tests are skipped.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMFYUI = Path(os.environ.get("COMFYUI_DIR", Path.home() / "ComfyUI"))
PYTHON = next((COMFYUI / p for p in (".venv/bin/python", "venv/bin/python") if (COMFYUI / p).exists()), Path("python"))
PACK = "text-encoder-repair"


class Host:
    """One ComfyUI and a folder for its models, inputs and outputs, which outlives a restart."""

    def __init__(self, base: Path):
        self.base = base
        self.log = base / "server.log"
        self.process: subprocess.Popen | None = None
        for folder in ("custom_nodes", "input", "output", "user", "models/text_encoders", "models/clip_vision"):
            (base / folder).mkdir(parents=True, exist_ok=True)
        (base / "custom_nodes" / PACK).symlink_to(ROOT, target_is_directory=True)
        (base / "custom_nodes" / "gmp-test-nodes").symlink_to(Path(__file__).parent / "pack", target_is_directory=True)

    def start(self, port: int | None = None, frontend: Path | None = None) -> None:
        """port: where it was before a restart; any free one without. frontend: the page, instead of the pinned one."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = port or free.getsockname()[1]
        command = [PYTHON, "main.py", "--cpu", "--port", str(self.port), "--listen", "127.0.0.1"]
        command += ["--base-directory", self.base, "--database-url", "sqlite:///:memory:"]
        command += ["--front-end-root", frontend] if frontend else []
        (self.base / "temporary").mkdir(exist_ok=True)  # runs of other programs are not waited for
        environment = os.environ | {"TMPDIR": str(self.base / "temporary")}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, cwd=COMFYUI, env=environment, stdout=log, stderr=subprocess.STDOUT)
        for _ in range(600):
            if self.process.poll() is not None:
                break
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(0.2)
        raise AssertionError(f"ComfyUI did not start:\n{self.log.read_text()[-3000:]}")

    def kill(self, how: int = signal.SIGTERM) -> None:
        if self.process and self.process.poll() is None:
            self.process.send_signal(how)
            self.process.wait(30)

    def get(self, path: str) -> object:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return json.load(answer)

    def text(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return answer.read().decode()

    def status(self, path: str) -> int:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    def post(self, path: str, body: object, kind: str = "application/json") -> tuple[int, object]:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode())
        request.add_header("content-type", kind)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read().decode()
                return answer.status, json.loads(text) if text.strip() else None
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def queue(self, prompt: dict, client: str = "tests") -> str:
        status, answer = self.post("/prompt", {"prompt": prompt, "client_id": client})
        assert status == 200, answer
        return answer["prompt_id"]

    def result(self, prompt_id: str, seconds: float = 120) -> Result:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            history = self.get(f"/history/{prompt_id}")
            if history:
                return Result(history[prompt_id])
            time.sleep(0.1)
        raise AssertionError(f"no result after {seconds} s:\n{self.log.read_text()[-3000:]}")

    def run(self, prompt: dict, seconds: float = 120) -> Result:
        return self.result(self.queue(prompt), seconds)

    def until(self, condition: Callable[[], object], seconds: float = 60) -> object:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := condition():
                return value
            time.sleep(0.05)
        raise AssertionError(f"not within {seconds} s:\n{self.log.read_text()[-3000:]}")

    def runs(self) -> dict[str, dict]:
        return {run["run"]: run for run in self.get("/gmp/runs")["runs"]}

    def ask(self, run: str, command: str, **options: object) -> tuple[int, object]:
        return self.post(f"/gmp/runs/{run}/command", {"command": command} | options)

    @property
    def output(self) -> Path:
        return self.base / "output"


class Result:
    """What the history says of one prompt."""

    def __init__(self, entry: dict):
        self.outputs = {key: value.get("text") for key, value in entry["outputs"].items()}
        self.status = entry["status"]["status_str"]
        messages = dict(entry["status"]["messages"])
        self.cached = set(messages.get("execution_cached", {}).get("nodes", []))
        error = messages.get("execution_error", {})
        self.failed, self.error = error.get("node_id"), error.get("exception_message", "").strip()
        self.interrupted = "execution_interrupted" in messages


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    if not (COMFYUI / "main.py").exists():
        pytest.skip(f"no ComfyUI in {COMFYUI}; set COMFYUI_DIR")
    host = Host(tmp_path_factory.mktemp("comfyui"))
    host.start()
    yield host
    host.kill()


@pytest.fixture(scope="session")
def nodes(host: Host) -> dict:
    return host.get("/object_info")
