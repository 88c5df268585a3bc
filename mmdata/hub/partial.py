"""The partial download of one file, on disk: its bytes in <name>.part, and in the journal <name>.part.json which byte
ranges (spans) of which content have been written, so that a later run, another process or a download from another source
can continue. Content is hashed as it arrives."""

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from mmdata.errors import FetchError
from mmdata.io.files import CHUNK_BYTES, Digest, move_into_place, write_unsynced
from mmdata.io.records import Count, read_record, sealed

JOURNAL_BYTES = 512 * 1024  # with several connections, at most this much is downloaded again after a kill
MIN_PIECE_BYTES, MAX_PIECE_BYTES = 1 << 20, 64 << 20
RESUME = "run the same command again: it goes on where it stopped (`--endpoint`, `--source modelscope` try another way)"


@dataclass(frozen=True, slots=True)
class Content:
    """The bytes that a file should have: `sha256` and `git_oid` (git's blob hash) in hex, None if not published."""

    num_bytes: int
    sha256: str | None = None
    git_oid: str | None = None
    etag: str | None = None
    first: bytes = b""  # one of these the file must begin with, known from its name; empty if anything is possible

    @property
    def identity(self) -> str | None:
        """What a partial download is recognized by: sha256, git_oid or etag; None means it cannot be resumed."""
        return self.sha256 or self.git_oid or self.etag

    @property
    def is_published(self) -> bool:
        """Whether a checksum is known before the download."""
        return bool(self.sha256 or self.git_oid)

    def mismatch(self, digest: Digest) -> str:
        """Return how `digest` differs in size or in a checksum, if one is known; empty if it does not."""
        if digest.position != self.num_bytes:
            return f"{digest.position:,} bytes, expected {self.num_bytes:,}"
        if self.sha256 and digest.sha256 != self.sha256:
            return f"sha256 {digest.sha256[:12]}…, expected {self.sha256[:12]}…"
        if self.git_oid and not self.sha256 and digest.git_oid != self.git_oid:
            return f"git hash {digest.git_oid[:12]}…, expected {self.git_oid[:12]}…"
        return ""


Span = tuple[Count, Count]  # byte offsets of a range: first, end (exclusive)


class Journal(msgspec.Struct, frozen=True):
    """The content of <name>.part.json: the size and identity of the file to download, and the spans written so far."""

    num_bytes: Count
    identity: str | None
    spans: list[Span]


def part_paths(target: Path) -> tuple[Path, Path]:
    """Return the paths of the partial download of `target` and of its journal: <name>.part and <name>.part.json."""
    return target.with_name(target.name + ".part"), target.with_name(target.name + ".part.json")


def kept_bytes(target: Path, content: Content | None = None) -> int:
    """Return how many bytes of `target` an earlier run left that need not be downloaded again. content: what is to be
    downloaded; a partial download of other content counts as 0 bytes. None accepts any."""
    return sum(end - begin for begin, end in _kept_spans(target, content))


def _kept_spans(target: Path, content: Content | None) -> list[Span]:
    """Return the spans that an earlier run left, sorted and disjoint. Empty if the partial file or its journal is
    missing, unreadable or too long, has other content than `content` (None: any), or content without an identity."""
    part, path = part_paths(target)
    try:
        journal = read_record(path, Journal, FetchError, RESUME)
        length = part.stat().st_size
    except (OSError, FetchError):
        return []
    is_same = content is None or (journal.num_bytes, journal.identity) == (content.num_bytes, content.identity)
    if not is_same or (content and content.identity is None):
        return []
    if not journal.spans or length > journal.num_bytes:
        return []
    *spans, (begin, end) = sorted(journal.spans)
    spans.append((begin, max(end, length)))  # the last span was written in order, up to the end of the partial file
    return merge([(begin, min(end, length)) for begin, end in spans])


def merge(spans: list[Span]) -> list[Span]:
    """Return sorted, non-empty, disjoint spans that cover the same bytes; touching spans are joined."""
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        elif begin < end:
            merged.append((begin, end))
    return merged


def missing(spans: list[Span], num_bytes: int) -> list[Span]:
    """Return the spans of [0, num_bytes) that `spans`, which must be merged, do not cover."""
    ends = [0, *(end for _, end in spans)]
    begins = [*(begin for begin, _ in spans), num_bytes]
    return [(end, begin) for end, begin in zip(ends, begins, strict=True) if end < begin]


def cut(gaps: list[Span], connections: int) -> list[Span]:
    """Cut spans into about four pieces per connection, so that all finish at about the same time; for one, nothing.
    Pieces have MIN_PIECE_BYTES to MAX_PIECE_BYTES; the last one of a span may be shorter."""
    if connections == 1:
        return gaps
    total = sum(end - begin for begin, end in gaps)
    size = min(max(total // (4 * connections), MIN_PIECE_BYTES), MAX_PIECE_BYTES)
    return [(at, min(at + size, end)) for begin, end in gaps for at in range(begin, end, size)]


class PartialFile:
    """The file <name>.part with its journal, open for writing. `done`: the completely written spans. `digest` has
    hashed an unbroken run of bytes from the beginning."""

    def __init__(self, target: Path, content: Content) -> None:
        """Open the partial download of `target`, continuing an earlier one of the same content. Raises OSError."""
        self.path, self.journal = part_paths(target)
        self.content = content
        self.done = _kept_spans(target, content)
        self._guard = threading.Lock()
        self._active: list[list[int]] = []  # [begin, position] of the spans being written
        self._unsaved = 0
        if not self.done:
            self.path.unlink(missing_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        self.digest = self._new_digest()
        self._save()

    def _new_digest(self) -> Digest:
        """Return an empty digest. Git's blob hash is computed only if it is the only checksum that is published."""
        return Digest(self.content.num_bytes, with_git=bool(self.content.git_oid and not self.content.sha256))

    def _spans(self) -> list[Span]:
        """Return all spans that have been written, those still being written included; neither sorted nor merged."""
        return [*self.done, *((begin, position) for begin, position in self._active)]

    def _save(self) -> None:
        self._unsaved = 0
        spans = sorted(self._spans() or [(0, 0)])
        journal = Journal(self.content.num_bytes, self.content.identity, spans)
        write_unsynced(self.journal, json.dumps(sealed(journal)))

    @contextlib.contextmanager
    def writing(self, offset: int) -> Iterator[list[int]]:
        """Context manager that yields a span [begin, position], both `offset` at first, for one thread to write to. It
        is in the journal before its first byte is written, and is added to `done` at the end."""
        span = [offset, offset]
        with self._guard:
            self._active.append(span)
            self._save()
        try:
            yield span
        finally:
            with self._guard:
                self._active.remove(span)
                self.done = merge([*self.done, (span[0], span[1])])
                self._save()

    def write(self, span: list[int], data: bytes, *, is_only: bool) -> None:
        """Write data at the position of a span and advance the position. Raises OSError. is_only: no other thread
        writes; the bytes are then hashed at once if they continue the digest."""
        view, offset = memoryview(data), span[1]
        while view:
            view = view[os.pwrite(self._file, view, offset + len(data) - len(view)) :]
        if is_only and self.digest.position == offset:
            self.digest.update(data)
        span[1] += len(data)
        # Without later bytes in the file, its length shows how far a single writer has come: no journal is needed.
        if not is_only or (self.done and self.done[-1][1] > offset):
            with self._guard:
                self._unsaved += len(data)
                if self._unsaved >= JOURNAL_BYTES:
                    self._save()

    def catch_up(self, *, stop: int | None = None) -> None:
        """Hash the unbroken bytes on disk that follow the digest's position, at most up to offset `stop`."""
        with self._guard:
            spans = merge(self._spans())
        whole = spans[0][1] if spans and spans[0][0] == 0 else 0
        whole = whole if stop is None else min(whole, stop)
        while self.digest.position < whole:
            data = os.pread(self._file, min(CHUNK_BYTES, whole - self.digest.position), self.digest.position)
            assert data, f"{self.path} ends at {self.digest.position} of {whole}"
            self.digest.update(data)

    def restart(self) -> None:
        """Delete all bytes and begin with an empty digest."""
        os.ftruncate(self._file, 0)
        self.done, self.digest = [], self._new_digest()
        self._save()

    def close(self) -> None:
        """Save the journal and close the file, for a later run to continue. Without any bytes, both are removed."""
        if self._file < 0:
            return
        os.close(self._file)
        self._file = -1
        with self._guard, contextlib.suppress(OSError):  # a full disk has been reported already
            self._save()
        if not merge(self._spans()):
            self.discard()

    def discard(self) -> None:
        """Close and delete the partial file and its journal, because its bytes are wrong."""
        self.close()
        self.path.unlink(missing_ok=True)
        self.journal.unlink(missing_ok=True)

    def become(self, target: Path) -> None:
        """Flush the complete file to the disk, rename it to `target` (replacing that) and delete the journal."""
        move_into_place(self.path, target)
        os.close(self._file)
        self._file = -1
        self.journal.unlink(missing_ok=True)
