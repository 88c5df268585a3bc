"""Open a file as a stream of UTF-8 bytes: plain or compressed (gzip, zstd, xz, bzip2, or zip with one file in it), in
any text encoding. Compression, tables and encodings are recognized by the content, not by the file's name.
"""

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import re
import shlex
import sys
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from mmdata.errors import InputError, UsageError
from mmdata.io.files import refuse_pointer

BUFFER_BYTES = 2**18  # many lines in one system call
HEAD_BYTES = 2**16  # beginning of a file by which its format and encoding are recognized
DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)  # raised while a damaged file is read
_GZIP, _ZSTD, _XZ, _BZIP2, _ZIP = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\0", b"BZh", b"PK\x03\x04"
_UNPACK = {_GZIP: "gzip -dc", _ZSTD: "zstd -dc", _XZ: "xz -dc", _BZIP2: "bzip2 -dc", _ZIP: "unzip -p"}
_TABLES = (b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")  # parquet, Arrow files (Feather), Arrow streams
_BOMS = {
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
_ICONV = {  # where iconv's name is not Python's in capitals
    "iso2022_jp": "ISO-2022-JP", "cp932": "SHIFT_JIS", "cp949": "EUC-KR", "euc_jis_2004": "EUC-JP", "utf_16_le": "UTF-16LE", "utf_16_be": "UTF-16BE",
}  # fmt: skip
_FEW_ZEROS = 4  # zero bytes; text in UTF-16 has more
_ISO_2022_JP = re.compile(rb"\x1b\$[@B]")  # to two bytes a character, all of them ASCII
_TYPOGRAPHIC = "«»„“”‘’–—…°€§·©®™¿¡"  # beside letters, the usual characters of western European texts beyond ASCII
_LITTLE_TEXT = 200  # bytes beyond ASCII; with fewer, the guess of an encoding is often wrong
_FEW_CHARACTERS = 20  # text in another encoding may be valid UTF-8 by chance with fewer characters beyond ASCII
# A file is taken to be in another encoding, rather than damaged, if this share of its first lines is not UTF-8, or this
# number of them and no line has a valid character beyond ASCII.
_BAD_SHARE, _FEW_LINES = 0.25, 3


@dataclass(frozen=True, slots=True)
class Stream:
    """An opened file. file: its decompressed UTF-8 bytes, from the beginning. head: the first bytes of these, at most
    HEAD_BYTES. is_plain: offsets in `file` are offsets on disk, and it can be seeked. is_packed: the file is compressed.
    is_table: the content is parquet or Arrow. name: the name of the file, or of that inside a zip, without the suffix of its compression.
    """

    file: Any
    head: bytes
    is_plain: bool
    is_packed: bool
    is_table: bool
    name: str


def open_stream(path: Path, encoding: str | None = None) -> Stream:
    """Open a file. path: "-" means standard input; may be a RemoteFile. encoding: of text, as Python names it; None is
    UTF-8. Raises InputError if the file cannot be read, is a zip of several files, needs a package that is not
    installed, is neither text nor a table, or is text in another encoding; UsageError if there is no such encoding."""
    try:
        file = sys.stdin.buffer if str(path) == "-" else path.open("rb", buffering=BUFFER_BYTES)
    except OSError as error:
        raise unreadable(path, error) from error
    close = file.close if str(path) != "-" else lambda: None
    try:
        return _recognized(path, file, encoding, close)
    except DAMAGED as error:
        close()
        raise damaged(path, error) from error
    except BaseException:
        close()
        raise


def unreadable(path: Path, error: OSError) -> InputError:
    """Return the error for a file that cannot be opened."""
    return InputError(f"{path}: {error.strerror}", "check the path; `mm fetch` downloads the known files")


def damaged(path: Path, error: object) -> InputError:
    """Return the error for a file whose content cannot be read to its end."""
    return InputError(f"{path}: damaged or cut off: {error}", "download the file again")


def _recognized(path: Path, file: Any, encoding: str | None, close: Callable[[], None]) -> Stream:
    """Return the stream of an open file. close: closes it, if it is to be closed."""
    magic, name = file.peek(10), Path(str(getattr(path, "name", path))).name
    packed = next((start for start in _UNPACK if magic.startswith(start)), None)
    if packed == _BZIP2 and magic[4:10] != b"1AY&SY":
        packed = None
    if packed == _ZIP:
        name, opened = _only_member(path, file)
    elif packed:
        name, opened = name.rpartition(".")[0] or name, _DECOMPRESSORS[packed](path, file)
    else:
        opened = file
    is_plain = packed is None and str(path) != "-"
    head = opened.read(HEAD_BYTES)
    if head.startswith(_TABLES):
        if not is_plain:
            fix = f"{_UNPACK[packed]} {shlex.quote(str(path))} > {name}" if packed else "write it to a file first"
            raise InputError(f"{path} is a table (parquet or Arrow) that cannot be read in parts", fix)
        close()
        return Stream(io.BytesIO(), head, False, False, True, name)
    _check_content(path, head)
    codec = _codec_of(path, head, encoding, packed)
    if is_plain and not codec:
        file.seek(0)
        return Stream(file, head, True, False, False, name)
    chunks = chain([head], iter(partial(opened.read, BUFFER_BYTES), b""))
    if codec:
        chunks = _decoded(path, chunks, codec)
        head = next(chunks, b"")
        chunks = chain([head], chunks)
    return Stream(io.BufferedReader(_Chunks(chunks, close), 1 << 20), head, False, packed is not None, False, name)


class _Chunks(io.RawIOBase):
    """The bytes that an iterator yields, as a file. close: called when the file is closed."""

    def __init__(self, chunks: Iterator[bytes], close: Callable[[], None]):
        self._chunks, self._close, self._ready = chunks, close, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._ready = memoryview(chunk)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        if not self.closed:
            self._close()
        super().close()


# --- compression


def _zstd(path: Path, file: Any) -> io.BufferedReader:
    """Return the decompressed bytes of zstd frames. Unlike zstandard's own reader, this one raises EOFError if the file
    ends inside a frame, and OSError for damaged data."""
    try:
        import zstandard
    except ImportError as error:
        raise InputError(f"{path} is zstd-compressed", "pip install 'mm-toolkit[zstd]'") from error

    def frames() -> Iterator[bytes]:
        data = b""
        while data := data or file.read(1 << 16):
            frame = zstandard.ZstdDecompressor().decompressobj()
            while not frame.eof:
                if not data:
                    raise EOFError("the file ends inside a zstd frame")
                try:
                    yield frame.decompress(data)
                except zstandard.ZstdError as error:
                    raise OSError(str(error)) from error
                data = b"" if frame.eof else file.read(1 << 16)
            data = frame.unused_data

    return io.BufferedReader(_Chunks(frames(), lambda: None), 1 << 20)


_DECOMPRESSORS: dict[bytes, Callable[[Path, Any], Any]] = {
    _GZIP: lambda _, file: gzip.GzipFile(fileobj=file),
    _XZ: lambda _, file: lzma.LZMAFile(file),  # noqa: SIM115
    _BZIP2: lambda _, file: bz2.BZ2File(file),
    _ZSTD: _zstd,
}


def _only_member(path: Path, file: Any) -> tuple[str, Any]:
    """Return name and content of the file in a zip. Raises InputError if there is not exactly one that can be read."""
    if not file.seekable():
        raise InputError(f"{path}: a zip cannot be read from a pipe", "write it to a file first")
    archive = zipfile.ZipFile(file)
    members = [m for m in archive.infolist() if not m.is_dir() and not m.filename.startswith("__MACOSX/")]
    members = [m for m in members if not m.filename.rpartition("/")[2].startswith(".")]
    if "xl/workbook.xml" in archive.namelist():
        raise InputError(f"{path} is an Excel workbook", "save its sheet as csv (UTF-8)")
    if len(members) != 1:
        names = ", ".join(member.filename for member in members[:5]) + (", …" if len(members) > 5 else "")
        unpack = f"unzip {shlex.quote(str(path))} -d DIR, then name the files that you want"
        raise InputError(f"{path} holds {len(members)} files ({names or 'none'}), expected one", unpack)
    try:
        return members[0].filename, archive.open(members[0])
    except (RuntimeError, NotImplementedError) as error:  # encrypted, or a compression that zipfile lacks
        raise InputError(f"{path}: {error}", f"unzip {shlex.quote(str(path))} and name the file in it") from error


# --- content and encoding


def _check_content(path: Path, head: bytes) -> None:
    """Raise InputError for content that is known not to be rows."""
    name = shlex.quote(str(path))
    refuse_pointer(Path(str(path)), head, InputError)
    if head[257:262] == b"ustar":
        raise InputError(f"{path} is a tar archive", f"tar -xf {name}, then name the files that you want")
    if head.startswith(b"FEA1"):
        raise InputError(f"{path} is a Feather file of version 1", "write it anew with pyarrow.feather or polars")


def _codec_of(path: Path, head: bytes, encoding: str | None, packed: bytes | None) -> str | None:
    """Return the encoding to decode with, or None for UTF-8. Raises InputError if the first bytes show another one than
    `encoding`, or none; UsageError if there is no such encoding."""
    if encoding is not None:
        try:
            "".encode(encoding)  # LookupError also for codecs of bytes, such as base64
        except LookupError:
            raise UsageError(
                f"--encoding {encoding} is unknown", "use a name such as gb18030, utf-16 or cp1252"
            ) from None
        codec = codecs.lookup(encoding).name
        if codec in ("utf-8", "utf-8-sig", "ascii"):
            return None
        text = head.decode(errors="replace")
        if "\ufffd" not in text[:-1] and sum(character > "\x7f" for character in text) >= _FEW_CHARACTERS:
            raise InputError(f"{path} is UTF-8, not {encoding}", "read it without --encoding, apart from the others")
        return codec
    fits = next((name for mark, name in _BOMS.items() if head.startswith(mark)), None)
    fits = fits or ("iso2022_jp" if _ISO_2022_JP.search(head) else None)
    is_binary = b"\0" in head[:64]
    if not fits and (is_binary or _is_other_than_utf8(head)):
        fits = guess_encoding(head)
    if fits:
        name, iconv = shlex.quote(str(path)), f"iconv -f {_ICONV.get(fits, fits.replace('_', '-').upper())} -t UTF-8"
        source = f"{_UNPACK[packed]} {name} | {iconv}" if packed else f"{iconv} {name}"
        stem, _, suffix = Path(str(path)).name.partition(".")
        new = shlex.quote(f"{stem}.utf8.{suffix.rpartition('.')[0] if packed else suffix}".rstrip("."))
        few = sum(byte > 127 for byte in head) < _LITTLE_TEXT and b"\0" not in head
        guess = ", as far as so little text shows: look at its rows" if few else ""
        raise InputError(
            f"{path} is not UTF-8: it fits {fits}{guess}", f"--encoding {fits}, or convert it: {source} > {new}"
        )
    if is_binary:
        at = f"byte {head.index(0) + 1:,} is zero"
        raise InputError(f"{path} is a binary file, no text: {at}", "give jsonl, a JSON array, parquet, Arrow or csv")
    return None


def _is_other_than_utf8(head: bytes) -> bool:
    """Return whether too many lines are not UTF-8 to be damaged: several and no line beyond ASCII is UTF-8, or the
    majority of these and a large share of all."""
    with contextlib.suppress(UnicodeDecodeError):
        codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be cut off
        return False
    lines = head.split(b"\n")
    bad = good = 0
    for number, line in enumerate(lines, 1):
        if not line.isascii():
            text = line.decode(errors="replace")
            text = text[:-1] if number == len(lines) else text  # the last character may be cut off
            broken = text.count("\ufffd")
            is_bad = broken > 0 and 2 * broken > sum(character > "\x7f" for character in text)
            bad, good = bad + is_bad, good + (not is_bad)
    return (not good and bad >= _FEW_LINES) or bad > max(good, _BAD_SHARE * len(lines))


def guess_encoding(data: bytes) -> str | None:
    """Return the encoding that text which is not UTF-8 seems to be in, as Python names it; None if none fits."""
    from charset_normalizer import from_bytes

    zeros = [data[half::2].count(0) for half in (0, 1)]
    is_wide = sum(zeros) >= _FEW_ZEROS and max(zeros) > 10 * min(zeros)  # the upper bytes of ASCII
    found = [match for match in from_bytes(data) if is_wide == match.encoding.startswith(("utf_16", "utf_32"))]
    if not found or found[0].encoding in ("ascii", "utf_8"):
        return None
    best = found[0].encoding
    scripts = Counter(unicodedata.name(c, "").split(" ")[0] for c in data.decode(best, "replace") if c.isalpha())
    # Some encodings fit as well as much more common ones, by which the text would have no other letters either.
    if scripts["CJK"] > 10 * (scripts["HIRAGANA"] + scripts["KATAKANA"]) and not best.startswith(("gb", "big5", "utf")):
        with contextlib.suppress(UnicodeDecodeError):
            codecs.getincrementaldecoder("gb18030")().decode(data)
            return "gb18030"
    is_western = any("cp1252" in match.could_be_from_charset for match in found) and set(+scripts) == {"LATIN"}
    if is_western and all(c.isalpha() or c in _TYPOGRAPHIC for c in data.decode("cp1252", "replace") if c > "\x7f"):
        return "cp1252"
    return best


def _decoded(path: Path, chunks: Iterator[bytes], codec: str) -> Iterator[bytes]:
    """Yield the UTF-8 bytes of text in another encoding, without a byte order mark. Raises InputError if it is not in
    it."""
    decoder, read, is_first = codecs.getincrementaldecoder(codec)(), 0, True
    for chunk in chain(chunks, [b""]):
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeError as error:
            at = read + (error.start if isinstance(error, UnicodeDecodeError) else 0)
            raise InputError(
                f"{path} cannot be read as {codec} (about byte {at:,}: {error})", "name another --encoding, or none"
            ) from None
        read += len(chunk)
        if text:
            yield text.removeprefix("\ufeff").encode() if is_first else text.encode()
            is_first = False
