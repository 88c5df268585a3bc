"""A hub on loopback: repositories with history, a CDN on another origin, ModelScope's API, and everything that can go wrong.

In-process, a thread a connection. `hub.fail(...)` arms a fault for the next requests at one of four places: "api" (listings),
"resolve" (the hub's front door), "cdn" (signed addresses on the other origin), "modelscope". `hub.requests` is the log.
"""

import gzip
import hashlib
import http.server
import json
import os
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from urllib.parse import parse_qs, unquote, urlsplit

CHUNK_BYTES = 128 * 1024


class Bytes:
    """A file's content; `OnDisk` and `Filler` are ones that need no memory."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)
        self.sha256 = hashlib.sha256(data).hexdigest()

    def read(self, offset: int, count: int) -> bytes:
        return self.data[offset : offset + count]


class OnDisk(Bytes):
    """The bytes of a file on disk."""

    def __init__(self, path: Path, sha256: str) -> None:
        self.path, self.size, self.sha256 = path, path.stat().st_size, sha256
        self.file = open(path, "rb")  # noqa: SIM115

    def send(self, connection: socket.socket, offset: int, count: int) -> int:
        """Straight from the page cache, so that a benchmark's server costs little."""
        return os.sendfile(connection.fileno(), self.file.fileno(), offset, count)

    def read(self, offset: int, count: int) -> bytes:
        return os.pread(self.file.fileno(), min(count, self.size - offset), offset)


class Filler(Bytes):
    """`size` bytes: a beginning, then one byte repeated. Its sha256 is given or computed piecewise."""

    def __init__(self, size: int, start: bytes = b"", fill: bytes = b"x", sha256: str = "") -> None:
        self.size, self.start, self.fill = size, start, fill
        self.sha256 = sha256 or self._hash()

    def _hash(self) -> str:
        sha = hashlib.sha256()
        for offset in range(0, self.size, 1 << 20):
            sha.update(self.read(offset, 1 << 20))
        return sha.hexdigest()

    def read(self, offset: int, count: int) -> bytes:
        count = min(count, self.size - offset)
        head = self.start[offset : offset + count]
        return head + self.fill * (count - len(head))


def lines(count: int, *, seed: str = "", width: int = 100) -> bytes:
    """A small jsonl of documents, every line different and `width` bytes long."""
    rows = (json.dumps({"text": f"{seed} {number:07d} "}) for number in range(count))
    return b"".join((row[:-2].ljust(width - 3, "x") + '"}\n').encode() for row in rows)


@dataclass
class Repo:
    """A repository: commits in order, each with all its files."""

    commits: dict[str, dict[str, Bytes]] = field(default_factory=dict)
    is_gated: bool = False
    is_private: bool = False
    has_xet: bool = False

    @property
    def head(self) -> str:
        return next(reversed(self.commits))

    def find(self, revision: str) -> str | None:
        if revision in ("main", "master"):
            return self.head
        return revision if revision in self.commits else None


@dataclass
class Fault:
    """One way to go wrong, for `times` requests (-1: all) at a place, after `skip` that go well."""

    place: str
    kind: str
    times: int = 1
    skip: int = 0
    name: str = ""  # only requests whose path holds this
    status: int = 503
    headers: dict[str, str] = field(default_factory=dict)
    after: int = 0  # bytes of the body that pass first; for `flip`, the offset in the file
    by: int = 1
    seconds: float = 60.0


@dataclass
class Request:
    """A line of the log."""

    place: str
    path: str
    range: str | None
    token: str | None
    status: int = 0
    sent: int = 0


class FakeHub:
    """The hub. Use as a context; `put` commits files, `fail` arms faults."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.tokens = {"good"}
        self.bytes_per_s: int | None = None  # of each connection
        self.hold_after: int | None = None  # bytes after which a connection waits until this is None
        self.page = 200
        self.closing = threading.Event()
        self.guard = threading.Lock()
        self.server, self.cdn_server = self._serve("hub"), self._serve("cdn")

    def _serve(self, role: str) -> http.server.ThreadingHTTPServer:
        handler = type("Handler", (_Handler,), {"hub": self, "role": role})
        server = _Server(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return server

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    @property
    def cdn_url(self) -> str:
        return f"http://127.0.0.1:{self.cdn_server.server_address[1]}"

    def put(
        self,
        repo: str,
        files: dict[str, bytes | Bytes],
        *,
        commit: str = "",
        remove: tuple[str, ...] = (),
        kind: str = "datasets",
    ) -> str:
        """Commit files on top of what is there; gives the commit's id."""
        there = self.repos.setdefault(f"{kind}/{repo}", Repo())
        tree = dict(there.commits[there.head]) if there.commits else {}
        tree.update({path: data if isinstance(data, Bytes) else Bytes(data) for path, data in files.items()})
        for path in remove:
            del tree[path]
        commit = commit or hashlib.sha1(f"{repo} {len(there.commits)}".encode()).hexdigest()
        there.commits[commit] = tree
        return commit

    def fail(self, place: str, kind: str, **values: object) -> Fault:
        """Arm a fault."""
        fault = Fault(place, kind, **values)  # type: ignore[arg-type]
        self.faults.append(fault)
        return fault

    def take(self, place: str, path: str, *kinds: str) -> Fault | None:
        """The armed fault of one of these kinds that hits this request, if any."""
        with self.guard:
            for fault in self.faults:
                if fault.place == place and fault.kind in kinds and fault.times and fault.name in path:
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def sent(self, place: str = "cdn") -> int:
        """Body bytes sent from a place."""
        return sum(request.sent for request in self.requests if request.place == place)

    def count(self, place: str) -> int:
        """Requests at a place."""
        return sum(request.place == place for request in self.requests)

    def forget(self) -> None:
        """Empty the log and disarm every fault."""
        with self.guard:
            self.requests.clear()
            self.faults.clear()

    def close(self) -> None:
        self.closing.set()
        for server in (self.server, self.cdn_server):
            server.shutdown()
            server.server_close()
        for repo in self.repos.values():
            for tree in repo.commits.values():
                for data in tree.values():
                    if isinstance(data, OnDisk):
                        data.file.close()

    def __enter__(self) -> "FakeHub":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is part of the game."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body go out as two writes
    hub: FakeHub
    role: str

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""

    def do_HEAD(self) -> None:
        """What `hf download`, the rival in the benchmark, asks first."""
        self.do_GET()

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        self.at, self.query = unquote(parts.path), parse_qs(parts.query)
        place = self._place()
        self.entry = Request(place, self.path, self.headers.get("Range"), self.headers.get("Authorization"))
        with self.hub.guard:
            self.hub.requests.append(self.entry)
        try:
            if not self._fault(place):
                self._route(place)
        except OSError:
            self.close_connection = True

    def _place(self) -> str:
        if self.role == "cdn":
            return "cdn"
        if self.at.startswith("/api/v1/"):
            return "modelscope"
        return "api" if self.at.startswith("/api/") else "resolve"

    def _fault(self, place: str) -> bool:
        """Faults that replace the whole answer."""
        fault = self.hub.take(place, self.path, "status", "hang", "page", "loop")
        if fault is None:
            return False
        if fault.kind == "hang":
            self.hub.closing.wait(fault.seconds)
            self.close_connection = True
        elif fault.kind == "page":
            self._answer(
                200, b"<!doctype html><title>Please log in</title>", {"Content-Type": "text/html; charset=utf-8"}
            )
        elif fault.kind == "loop":
            self._answer(302, b"", {"Location": self.path})
        else:
            self._answer(fault.status, b"{}", fault.headers)
        return True

    def _route(self, place: str) -> None:
        parts = self.at.strip("/").split("/")
        if place == "cdn":
            self._cdn(parts[-1])
        elif place == "modelscope":
            self._modelscope(parts)
        elif place == "api":
            self._api(parts)
        elif parts[0] == "plain":
            self._plain("/".join(parts[1:]))
        else:
            self._resolve(parts if parts[0] == "datasets" else ["models", *parts])

    # --- answers

    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.entry.status = status
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
            self.entry.sent += len(body)

    def _json(self, value: object, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _error(self, status: int, code: str, message: str) -> None:
        self._json({"error": message}, {"X-Error-Code": code, "X-Error-Message": message}, status)

    # --- the Hub

    def _repo(self, key: str) -> Repo | None:
        """The repository, unless the token does not open it; the error has then been answered."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        repo = self.hub.repos.get(key)
        if token and token not in self.hub.tokens and token != "weak":
            self._error(401, "", "Invalid credentials in Authorization header")
        elif repo is None or (repo.is_private and token not in self.hub.tokens):
            self._error(404 if token else 401, "RepoNotFound", "Repository not found")
        else:
            return repo
        return None

    def _api(self, parts: list[str]) -> None:
        key = "/".join(parts[1:4])
        repo = self._repo(key)
        if repo is None:
            return None
        if parts[4:5] == ["commits"]:
            ids = list(reversed(repo.commits))
            start = int(self.query.get("p", ["0"])[0]) * 50
            more = (
                {"Link": f'<{self.hub.url}{self.at}?p={start // 50 + 1}>; rel="next"'} if start + 50 < len(ids) else {}
            )
            return self._json([{"id": commit, "title": "x"} for commit in ids[start : start + 50]], more)
        commit = repo.find(parts[5] if len(parts) > 5 else "main")
        if commit is None:
            return self._error(404, "RevisionNotFound", "Invalid rev id")
        siblings = [self._sibling(path, data) for path, data in repo.commits[commit].items()]
        return self._json(
            {
                "_id": "0",
                "id": "/".join(parts[2:4]),
                "sha": commit,
                "private": False,
                "tags": [],
                "siblings": siblings,
                "downloads": 0,
                "likes": 0,
            }
        )

    @staticmethod
    def _sibling(path: str, data: Bytes) -> dict:
        entry: dict = {"rfilename": path, "size": data.size}
        if is_lfs(path, data):
            return entry | {"blobId": "0" * 40, "lfs": {"sha256": data.sha256, "size": data.size, "pointerSize": 130}}
        return entry | {"blobId": git_oid(data)}

    def _resolve(self, parts: list[str]) -> None:
        key, revision, path = "/".join(parts[:3]), parts[4], "/".join(parts[5:])
        repo = self._repo(key)
        if repo is None:
            return None
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if repo.is_gated and token not in self.hub.tokens:
            return self._error(403 if token else 401, "GatedRepo", "Access to this dataset is restricted")
        commit = repo.find(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound", "Invalid rev id")
        data = repo.commits[commit].get(path)
        if data is None:
            return self._error(404, "EntryNotFound", "Entry not found")
        if not is_lfs(path, data):
            return self._body("resolve", data, {"X-Repo-Commit": commit})
        xet = {"X-Xet-Hash": data.sha256, "Link": '<http://127.0.0.1:9/xet>; rel="xet-auth"'} if repo.has_xet else {}
        strip = self.hub.take("resolve", self.path, "strip")
        named = (
            {}
            if strip
            else {"X-Repo-Commit": commit, "X-Linked-Size": str(data.size), "X-Linked-ETag": f'"{data.sha256}"'}
        )
        where = f"{self.hub.cdn_url}/{data.sha256}?Signature=secret-signature&Expires={int(time.time()) + 60}"
        return self._answer(302, b"", {"Location": where, **named, **xet})

    def _cdn(self, sha256: str) -> None:
        trees = [tree for repo in self.hub.repos.values() for tree in repo.commits.values()]
        data = next((data for tree in trees for data in tree.values() if data.sha256 == sha256), None)
        if data is None:
            return self._answer(404)
        return self._body("cdn", data, {"ETag": f'"{sha256}"'})

    def _plain(self, path: str) -> None:
        """A plain web folder: every file of every repository's newest commit."""
        for repo in self.hub.repos.values():
            if path in repo.commits[repo.head]:
                data = repo.commits[repo.head][path]
                return self._body("resolve", data, {"ETag": f'"{data.sha256[:16]}"'})
        return self._answer(404)

    # --- ModelScope

    def _modelscope(self, parts: list[str]) -> None:
        repo = self.hub.repos.get("/".join(parts[2:5]))
        commit = repo.find(self.query.get("Revision", ["master"])[0]) if repo else None
        if repo is None or commit is None:
            return self._json({"Code": 10010205001, "Success": False, "Data": None}, status=404)
        tree = repo.commits[commit]
        if parts[5:] in (["repo", "tree"], ["repo", "files"]):
            number = int(self.query.get("PageNumber", ["1"])[0])
            names = sorted(tree)[(number - 1) * self.hub.page : number * self.hub.page]
            files = [
                {"Path": name, "Type": "blob", "Size": tree[name].size, "Sha256": tree[name].sha256} for name in names
            ]
            return self._json({"Code": 200, "Success": True, "Data": {"Files": files}})
        data = tree.get(self.query["FilePath"][0])
        if data is None:
            return self._json({"Code": 10010101, "Success": False}, status=404)
        return self._answer(302, b"", {"Location": f"{self.hub.cdn_url}/{data.sha256}?auth_key=secret-signature"})

    # --- bodies

    def _body(self, place: str, data: Bytes, headers: dict[str, str]) -> None:
        def take(*kinds: str) -> Fault | None:
            return self.hub.take(place, self.path, *kinds)

        begin, end, status = self._range(data, take)
        if begin < 0:
            return self._answer(416, b"", {"Content-Range": f"bytes */{data.size}"})
        size = take("short", "long")
        length = end - begin + ((size.by if size.kind == "long" else -size.by) if size else 0)
        if status == 206:
            headers = {**headers, "Content-Range": f"bytes {begin}-{end - 1}/{data.size}"}
        if take("gzip"):
            packed = gzip.compress(data.read(begin, end - begin))
            return self._answer(status, packed, {**headers, "Content-Encoding": "gzip"})
        self.entry.status = status
        self.send_response(status)
        for key, value in {"Content-Length": str(length), "Accept-Ranges": "bytes", **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return None
        return self._send(data, begin, min(end, begin + length), take("drop", "reset", "stall", "drip", "flip"))

    def _range(self, data: Bytes, take) -> tuple[int, int, int]:
        asked = self.headers.get("Range")
        if asked is None or take("whole"):
            return 0, data.size, 200
        first, _, last = asked.removeprefix("bytes=").partition("-")
        begin, end = int(first), int(last) + 1 if last else data.size
        if begin >= data.size or take("unsatisfiable"):
            return -1, -1, 416
        shift = take("early", "late")
        begin += 0 if shift is None else shift.by if shift.kind == "late" else -shift.by
        return max(begin, 0), end, 206

    def _send(self, data: Bytes, begin: int, end: int, fault: Fault | None) -> None:
        kind = fault.kind if fault else ""
        stop = begin + fault.after if fault and kind in ("drop", "reset", "stall") else end
        start, sent = time.monotonic(), 0
        while begin < min(end, stop):
            count = 16 if kind == "drip" else min(CHUNK_BYTES, min(end, stop) - begin)
            if fault is None and isinstance(data, OnDisk):
                self.entry.sent += count  # counted first: who has received the last byte may ask at once
                moved = data.send(self.connection, begin, count)
                self.entry.sent, begin, sent = self.entry.sent + moved - count, begin + moved, sent + moved
                self._pace(start, sent)
                continue
            piece = data.read(begin, count)
            if fault and kind == "flip" and begin <= fault.after < begin + len(piece):
                at = fault.after - begin
                piece = piece[:at] + bytes([piece[at] ^ 1]) + piece[at + 1 :]
            self.entry.sent += len(piece)
            try:
                self.wfile.write(piece)
            except OSError:
                self.entry.sent -= len(piece)
                raise
            begin, sent = begin + len(piece), sent + len(piece)
            if kind == "drip":
                self.hub.closing.wait(0.02)
            self._pace(start, sent)
            if self.hub.closing.is_set():
                break
        if begin < end:
            self._break(fault)

    def _pace(self, start: float, sent: int) -> None:
        while self.hub.hold_after is not None and sent >= self.hub.hold_after and not self.hub.closing.wait(0.01):
            pass
        if self.hub.bytes_per_s:
            self.hub.closing.wait(max(0.0, start + sent / self.hub.bytes_per_s - time.monotonic()))

    def _break(self, fault: Fault | None) -> None:
        """Leave the body unfinished: in silence, with a goodbye, or with a reset."""
        self.close_connection = True
        if fault and fault.kind == "stall":
            self.hub.closing.wait(fault.seconds)
        if fault and fault.kind == "reset":
            time.sleep(0.05)  # a reset overtakes bytes that the other side has not read yet
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()
            self.connection.close()


def is_lfs(path: str, data: Bytes) -> bool:
    """Whether a file lies in large storage, with a sha256 in the listing; the others lie in git."""
    return path.endswith((".jsonl", ".bin")) and data.size > 0


def git_oid(data: Bytes) -> str:
    """Git's name for a blob."""
    return hashlib.sha1(b"blob %d\0" % data.size + data.read(0, data.size)).hexdigest()
