"""Read the lines of a plain or compressed file with their numbers and byte offsets, one line in memory at a time."""

import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mmdata.errors import InputError

BUFFER_BYTES = 2**18  # many lines in one system call
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"  # the bytes that files of these formats start with


class Line(NamedTuple):
    """One line of a file. number: 1-based. offset: of its first byte (decompressed). raw: without the line end."""

    number: int
    offset: int
    raw: bytes


def open_stream(path: Path) -> io.BufferedIOBase:
    """Open a plain, gzip or zstd file (recognized by its first bytes) for reading decompressed bytes. path: "-" means
    standard input; may be a RemoteFile. Raises InputError if it cannot be read, or is zstd and zstandard is not
    installed.
    """
    try:
        file = sys.stdin.buffer if str(path) == "-" else path.open("rb", buffering=BUFFER_BYTES)
        assert isinstance(file, io.BufferedReader)
        magic = file.peek(4)
    except OSError as error:
        raise _unreadable(path, error) from error
    if magic.startswith(_GZIP):
        if not isinstance(path, Path) or str(path) == "-":
            return gzip.GzipFile(fileobj=file)
        file.close()
        return gzip.GzipFile(path)
    if magic.startswith(_ZSTD):
        return io.BufferedReader(_ZstdStream(file, path), 1 << 20)
    return file


class _ZstdStream(io.RawIOBase):
    """The decompressed bytes of one or more zstd frames. Unlike zstandard's own reader, raises EOFError if the file
    ends inside a frame, and OSError if the data is damaged.
    """

    def __init__(self, file: io.BufferedReader, path: Path):
        try:
            import zstandard
        except ImportError as error:
            raise InputError(f"{path} is zstd-compressed", "pip install 'mm-toolkit[zstd]'") from error
        self._file = file
        self._decompressor = zstandard.ZstdDecompressor()
        self._errors = zstandard.ZstdError
        self._frame = self._decompressor.decompressobj()
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            begun = self._frame.unused_data if self._frame.eof else b""
            data = begun or self._file.read(1 << 16)
            if not data:
                if self._frame.eof:
                    return 0
                raise EOFError("the file ends inside a zstd frame")
            if self._frame.eof:
                self._frame = self._decompressor.decompressobj()
            try:
                self._ready = memoryview(self._frame.decompress(data))
            except self._errors as error:
                raise OSError(str(error)) from error
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def is_seekable(path: Path) -> bool:
    """Return False for a compressed file (gzip, zstd) and standard input ("-"). Raises InputError if it cannot be read."""
    if str(path) == "-":
        return False
    try:
        with path.open("rb") as file:
            return not file.read(4).startswith((_GZIP, _ZSTD))
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: {error.strerror}", "check the path; `mm fetch` downloads the known files")


def iter_lines(path: Path, begin: int = 0, end: int | None = None, *, first_number: int = 1) -> Iterator[Line]:
    """Yield the lines of `path` whose first byte is in [begin, end), in order; blank lines are counted but not yielded.

    begin, end: byte offsets of line starts; None means the end of the file. A begin other than 0 needs an uncompressed
    file. first_number: the number of the first line read. A byte order mark at the start of the file and the line ends
    (`\\n`, `\\r\\n`) are removed. Raises InputError if the file cannot be read, is damaged or is cut off.
    """
    stream = open_stream(path)
    try:
        if begin:
            stream.seek(begin)
        offset = begin
        for number, raw in enumerate(stream, first_number):
            if end is not None and offset >= end:
                return
            start, offset = offset, offset + len(raw)
            if start == 0:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            raw = raw.rstrip(b"\r\n")
            if raw and not raw.isspace():
                yield Line(number, start, raw)
    except (EOFError, OSError, zlib.error) as error:
        raise InputError(f"{path}: damaged or cut off: {error}", "download the file again") from error
    finally:
        if str(path) != "-":
            stream.close()
