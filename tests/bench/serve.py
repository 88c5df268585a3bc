"""What `mm serve` does under many, slow, large and malformed requests: `python tests/bench/serve.py RUN [--connections 500]`.

Starts `mm serve RUN` on a free port and sends, one kind after another: nothing else than one short chat (the time to compare
with); a chat on each of 500 connections at once; 500 connections that send half a request and then wait, with a chat beside
them; 20 bodies of 50 MB; clients that leave in the middle of an answer; nested, badly encoded and foreign requests. Prints the
status codes, how long the chats beside them took, and the resident memory of the server after each.
"""

import argparse
import asyncio
import contextlib
import json
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 16, "temperature": 0}


def request(body: bytes, length: int | None = None, host: str = "127.0.0.1") -> bytes:
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    )
    return f"{head}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


async def send(port: int, data: bytes, *, leave_after: int = 0) -> int:
    """The status of the answer to a request; 0 if the connection ended without one. leave_after: bytes of the answer after
    which the client leaves."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return 0
    sending = asyncio.ensure_future(_send_all(writer, data))
    answer = b""
    try:
        answer = await reader.read(leave_after or 12)
        if not leave_after:
            await reader.read()
    except OSError:  # the server closes the connection before it has read all of a body that it refuses
        pass
    finally:
        sending.cancel()
        writer.close()
    return int(answer.split()[1]) if answer else 0


async def _send_all(writer: asyncio.StreamWriter, data: bytes) -> None:
    with contextlib.suppress(OSError):
        writer.write(data)
        await writer.drain()


async def timed_chat(port: int) -> float:
    start = time.monotonic()
    assert await send(port, request(json.dumps(CHAT).encode())) == 200
    return time.monotonic() - start


async def attack(port: int, pid: int, number: int) -> None:
    def say(kind: str, statuses: Counter[int], beside: float) -> None:
        memory = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 1e6
        handles = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
        print(
            f"{kind:34} {dict(statuses)!s:34} a chat beside or after it {beside:5.2f} s, {memory:5.0f} MB, {handles} files"
        )

    chat = request(json.dumps(CHAT).encode())
    await timed_chat(port)
    say("one chat", Counter([200]), await timed_chat(port))
    start = time.monotonic()
    statuses = Counter(await asyncio.gather(*(send(port, chat) for _ in range(number))))
    print(f"{number} chats at once took {time.monotonic() - start:.1f} s")
    say(f"{number} chats at once", statuses, await timed_chat(port))
    slow = [asyncio.create_task(send(port, request(b'{"mess', length=1000))) for _ in range(number)]
    await asyncio.sleep(1)
    beside = await timed_chat(port)
    say(f"{number} half requests, the rest never", Counter(await asyncio.gather(*slow)), beside)
    large = request(json.dumps({**CHAT, "user": "x" * 50_000_000}).encode())
    bodies = [asyncio.create_task(send(port, large)) for _ in range(20)]
    beside = await timed_chat(port)
    say("20 bodies of 50 MB", Counter(await asyncio.gather(*bodies)), beside)
    long = request(json.dumps({**CHAT, "max_tokens": 400, "stream": True}).encode())
    left = [asyncio.create_task(send(port, long, leave_after=40)) for _ in range(100)]
    say("100 clients that leave", Counter(await asyncio.gather(*left)), await timed_chat(port))
    text = json.dumps(CHAT).encode()
    odd = {
        "nested 100,000 deep": request(b"[" * 100_000),
        "no UTF-8": request(text.replace(b"hello", b"\xff\xfe")),
        "a lone surrogate": request(text.replace(b"hello", b"\\ud800")),
        "another Host": request(text, host="evil.example"),
        "as a foreign page may send it": request(text).replace(b"application/json", b"text/plain"),
        "no JSON": request(b"hello"),
        "a negative length": request(text, length=-1),
    }
    for kind, data in odd.items():
        say(kind, Counter([await send(port, data)]), await timed_chat(port))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--connections", type=int, default=500)
    options = parser.parse_args()
    command = [sys.executable, "-m", "cli", "serve", str(options.run.resolve()), "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            assert server.stdout
            found = next(filter(None, (re.search(r"http://127.0.0.1:(\d+)", line) for line in server.stdout)))
            asyncio.run(attack(int(found[1]), server.pid, options.connections))
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
