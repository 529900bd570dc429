"""Ten panels without a page: clients.py PORT SECONDS DEAF. Prints what they saw as JSON.

Every client holds a websocket, watches, and pulls histories; the first DEAF of them never read their socket. Runs with
ComfyUI's Python.
"""

import asyncio
import json
import sys
import time

import aiohttp

CLIENTS = 10


async def client(number: int, port: str, seconds: float, deaf: bool) -> dict:
    base, name = f"http://127.0.0.1:{port}", f"soak{number}"
    seen = {"deaf": deaf, "events": 0, "largest": 0, "steps": 0, "slowest": 0.0, "errors": 0}
    end = time.monotonic() + seconds
    async with aiohttp.ClientSession() as session:
        async with session.ws_connect(f"{base}/ws?clientId={name}", autoping=not deaf) as socket:

            async def listen() -> None:
                async for message in socket:
                    if message.type == aiohttp.WSMsgType.TEXT and '"gmp.runs"' in message.data:
                        seen["events"] += 1
                        seen["largest"] = max(seen["largest"], len(message.data))

            async def pull(method: str, path: str, **body: object) -> dict:
                start = time.monotonic()
                async with session.request(method, base + path, **body) as answer:
                    text = await answer.text()
                    seen["errors"] += answer.status >= 400
                seen["slowest"] = max(seen["slowest"], time.monotonic() - start)
                return json.loads(text)

            listening = None if deaf else asyncio.create_task(listen())
            since: dict[str, int] = {}
            while time.monotonic() < end:
                runs = (await pull("POST", "/gmp/watch", json={"client": name}))["runs"]
                shown = [run["run"] for run in runs if run["state"] in ("running", "paused")] or [runs[0]["run"]]
                for _ in range(10):
                    run = shown[0]
                    history = await pull("GET", f"/gmp/runs/{run}/history?since={since.get(run, 0)}")
                    since[run] = history["step"]
                    seen["steps"] = max(seen["steps"], history["step"])
                    await asyncio.sleep(1)
            if listening:
                listening.cancel()
    return seen


async def main(port: str, seconds: str, deaf: str) -> None:
    found = await asyncio.gather(*(client(n, port, float(seconds), n < int(deaf)) for n in range(CLIENTS)))
    print(json.dumps(found))


asyncio.run(main(*sys.argv[1:]))
