"""Prints the events of a running ComfyUI as JSON lines. Runs with ComfyUI's Python: listen.py PORT CLIENT"""

import asyncio
import json
import sys
import time

import aiohttp


async def main(port: str, client: str) -> None:
    async with aiohttp.ClientSession() as session:
        async with session.ws_connect(f"ws://127.0.0.1:{port}/ws?clientId={client}") as socket:
            async for message in socket:
                if message.type == aiohttp.WSMsgType.TEXT:
                    print(json.dumps(json.loads(message.data) | {"at": time.time()}), flush=True)
                elif message.type == aiohttp.WSMsgType.BINARY and message.data[:4] == b"\0\0\0\3":
                    size = int.from_bytes(message.data[4:8], "big")
                    node, text = message.data[8 : 8 + size].decode(), message.data[8 + size :].decode()
                    print(json.dumps({"type": "node_text", "node": node, "text": text}), flush=True)


asyncio.run(main(*sys.argv[1:]))
