"""A score server under attack: 600 connections that send slowly, floods of pixels, and an honest client.

    .venv/bin/python benchmarks/serve_flood.py --seconds 60

`diffexpo rewards serve --type jpeg_compressibility` runs as a process of its own. Its memory and threads are
read every 0.2 s, and every answer to the honest client is compared with what the scorer itself gives. The
result is written to benchmarks/results/serve_flood.json.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import torch
from PIL import Image

from diffexpo.config.rewards import ServiceConfig
from diffexpo.rewards.jpeg import JpegCompressibility
from diffexpo.rewards.remote import RemoteReward

RESULT = Path(__file__).parent / "results" / "serve_flood.json"
HEAD = b"POST /score HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 60000000\r\n\r\n"


def send_slowly(port: int, count: int, stop: threading.Event) -> None:
    """Hold `count` connections, each with a request that never ends; those that were closed are replaced."""
    held: list[socket.socket] = []
    while not stop.is_set():
        while len(held) < count and not stop.is_set():
            with suppress(OSError):
                one = socket.create_connection(("127.0.0.1", port), 1)
                one.settimeout(0.01)
                one.sendall(HEAD[: 20 + 80 * (len(held) % 2)])
                held.append(one)
        for one in list(held):
            try:
                one.sendall(b"x" * 4096)
            except OSError:
                held.remove(one)
                one.close()
        stop.wait(0.1)
    for one in held:
        one.close()


def flood(port: int, stop: threading.Event) -> None:
    """Requests of a few kilobytes whose images have 16 megapixels each."""
    picture = io.BytesIO()
    Image.new("1", (4096, 4096)).save(picture, "PNG")
    image = base64.b64encode(picture.getvalue()).decode()
    items = [{"id": str(number), "prompt": "a", "image": image} for number in range(3)]
    body = json.dumps({"protocol": 1, "items": items}).encode()
    while not stop.is_set():
        with suppress(OSError, http.client.HTTPException):
            client = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            client.request("POST", "/score", body, {"Content-Type": "application/json"})
            client.getresponse().read()
            client.close()


def usage(process: int) -> tuple[float, int]:
    """Memory of a process, MiB, and its threads."""
    text = Path(f"/proc/{process}/status").read_text()
    found = {name: int(value) for name, value in re.findall(r"^(VmRSS|Threads):\s+(\d+)", text, re.MULTILINE)}
    return found["VmRSS"] / 1024, found["Threads"]


def measure(port: int, process: int, seconds: float) -> dict[str, float]:
    """What the server takes and whom it serves meanwhile."""
    images = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = JpegCompressibility("size").score(images, ["a"] * 8)
    idle, stop = usage(process), threading.Event()
    attackers = [threading.Thread(target=send_slowly, args=(port, 600, stop), daemon=True)]
    attackers += [threading.Thread(target=flood, args=(port, stop), daemon=True) for _ in range(4)]
    seen: list[tuple[float, int]] = []
    waits: list[float] = []

    def serve_honestly() -> None:
        far = RemoteReward("far", f"http://127.0.0.1:{port}", ServiceConfig(timeout_s=60.0, retry_s=120.0))
        while not stop.is_set():
            began = time.monotonic()
            assert torch.equal(far.score(images, ["a"] * 8), expected)
            waits.append(time.monotonic() - began)

    for attacker in attackers:
        attacker.start()
    time.sleep(2)
    honest = threading.Thread(target=serve_honestly, daemon=True)
    honest.start()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        seen.append(usage(process))
        time.sleep(0.2)
    stop.set()
    honest.join(180)
    return {
        "seconds": seconds,
        "idle_mib": round(idle[0]),
        "most_mib_of_each_quarter": [
            round(max(mib for mib, _ in seen[len(seen) * part // 4 : len(seen) * (part + 1) // 4]))
            for part in range(4)
        ],
        "idle_threads": idle[1],
        "most_threads": max(count for _, count in seen),
        "honest_requests": len(waits),
        "longest_wait_s": round(max(waits), 2),
        "mean_wait_s": round(sum(waits) / len(waits), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    seconds = parser.parse_args().seconds
    command = [
        sys.executable,
        "-m",
        "diffexpo",
        "rewards",
        "serve",
        "--type",
        "jpeg_compressibility",
        "--port",
        "0",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            port = int(re.search(r":(\d+)$", server.stdout.readline().strip())[1])  # type: ignore[index]
            result = measure(port, server.pid, seconds)
        finally:
            server.terminate()
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
