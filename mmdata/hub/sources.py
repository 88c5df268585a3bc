"""Where files come from: the Hugging Face Hub or a mirror of it, ModelScope, a folder, or a plain web address.

Every request starts at the endpoint itself and not at the signed address that an earlier request was redirected to, so
an expired signature only costs one more redirect. The access token is sent to the endpoint that the user chose and
nowhere else. The Hub's Xet transfer protocol is never used.
"""

import contextlib
import email.utils
import json
import re
import ssl
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, NoReturn
from urllib.parse import quote, urlencode, urlsplit

from mmdata.errors import AccessError, IntegrityError, MMError, NetworkError, NotFoundError, UsageError
from mmdata.hub.partial import Content
from mmdata.hub.transfer import NOT_DATA, Body, OpenBody, RetryPolicy, TryAgain, WrongSize, with_retries
from mmdata.io.files import CHUNK_BYTES

HF_ENDPOINT = "https://huggingface.co"
MODELSCOPE_ENDPOINT = "https://www.modelscope.cn"
REACH = "check the network and proxies; `--endpoint` names a mirror, `--source modelscope` asks ModelScope"
PAGE = 200  # files per request to ModelScope
MAX_COMMITS = 1000  # how many commits are searched for a file that is gone from the main branch
# HTTP status codes that are worth another attempt
RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 520, 521, 522, 524}


@dataclass(frozen=True, slots=True)
class Source:
    """A place to download from. `kind`: hf, modelscope, dir or url. `endpoint`: address (no final slash) or folder."""

    kind: str
    endpoint: str
    retry: RetryPolicy = field(default_factory=RetryPolicy)


@dataclass(frozen=True, slots=True)
class Repo:
    """A repository of a source. `id`: such as owner/name; `kind`: dataset or model."""

    id: str
    kind: str = "dataset"


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a repository at one commit, by path in the repository."""

    commit: str
    files: dict[str, Content]


def open_source(name: str, endpoint: str | None, retry: RetryPolicy) -> Source:
    """Return the source that `--source` (`name`: hf, modelscope, a folder or a web address) and `--endpoint` (None: the
    usual one) describe. Makes no request. Raises UsageError if `name` is none of these, if the endpoint names no host,
    or if it is given for a folder or web address."""
    if name in ("hf", "modelscope"):
        default = HF_ENDPOINT if name == "hf" else MODELSCOPE_ENDPOINT
        return Source(name, _endpoint(endpoint or default), retry)
    if endpoint:
        raise UsageError("--endpoint belongs to --source hf and --source modelscope", "leave one of the two out")
    if re.match(r"https?://", name):
        return Source("url", name.rstrip("/"), retry)
    if Path(name).is_dir():
        return Source("dir", str(Path(name).resolve()), retry)
    raise UsageError(f"--source {name} is no folder and no web address", "use hf, modelscope, a folder, or https://…")


def _endpoint(text: str) -> str:
    """Return a web address without final slash, with https:// if it has no scheme. Raises UsageError without a host."""
    text = (text if re.match(r"https?://", text) else f"https://{text}").rstrip("/")
    if not urlsplit(text).hostname:
        raise UsageError(f"--endpoint {text} names no host", "give it like https://hf-mirror.com")
    return text


def is_safe(path: str) -> bool:
    """Return whether a listed path stays inside the directory that it is joined to, on any operating system: not if it
    is empty or absolute or has ., .., an empty component, a backslash, a colon or a control character."""
    parts = PurePosixPath(path).parts
    bad = not path or path.startswith("/") or "\\" in path or ":" in path or any(ord(c) < 32 for c in path)
    return not bad and ".." not in parts and "." not in path.split("/") and "" not in path.split("/")


# --- listings


def list_files(source: Source, repo: Repo, revision: str) -> Listing:
    """Return a repository's files at a branch, tag or commit. Raises NotFoundError, AccessError or NetworkError."""
    if source.kind == "hf":
        return with_retries(lambda: _list_hf(source, repo, revision), source.retry, whom=_host(source), fix=REACH)
    assert source.kind == "modelscope", source.kind
    return _list_modelscope(source, repo, revision)


def first_bytes(path: str) -> bytes:
    """Return the bytes of which a file of this name must begin with one: `{[` for .jsonl and .json, else empty."""
    return b"{[" if path.endswith((".jsonl", ".json")) else b""


def _list_hf(source: Source, repo: Repo, revision: str) -> Listing:
    """`list_files` for the Hugging Face Hub: files in Git LFS have a sha256, all others a git object id."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=source.endpoint)
    ask = api.dataset_info if repo.kind == "dataset" else api.model_info
    with _explained(source, f"{repo.id} at {revision}"):
        info = ask(repo.id, revision=revision, files_metadata=True, timeout=source.retry.read_timeout_s)
    files = {}
    for file in info.siblings or []:
        if file.size is not None:
            sha256 = file.lfs.sha256 if file.lfs else None
            oid = None if file.lfs else file.blob_id
            files[file.rfilename] = Content(file.size, sha256, oid, first=first_bytes(file.rfilename))
    return Listing(info.sha or revision, files)


def commits(source: Source, repo: Repo) -> list[str]:
    """Return the commit ids of a Hub repository's main branch, newest first, to the page that reaches MAX_COMMITS."""
    url: str | None = f"{source.endpoint}/api/{repo.kind}s/{repo.id}/commits/main"
    ids: list[str] = []
    while url and len(ids) < MAX_COMMITS:
        page, links = _get_json(source, url, repo.id)
        ids.extend(str(item["id"]) for item in page)
        following = links.get("next", {}).get("url")
        url = following if following and urlsplit(following)[:2] == urlsplit(source.endpoint)[:2] else None
    return ids


def _list_modelscope(source: Source, repo: Repo, revision: str) -> Listing:
    """`list_files` for ModelScope, page by page. A page after the first that is refused is requested again."""
    tail = "repo/tree" if repo.kind == "dataset" else "repo/files"
    files: dict[str, Content] = {}
    commit, number = revision, 1
    while True:
        query = urlencode({"Revision": revision, "Recursive": "True", "PageNumber": number, "PageSize": PAGE})
        url = f"{source.endpoint}/api/v1/{repo.kind}s/{repo.id}/{tail}?{query}"
        answer, _ = _get_json(source, url, f"{repo.id} at {revision}", is_again=number > 1)
        data = answer.get("Data") or {}
        if not answer.get("Success", True) or "Files" not in data:
            raise NotFoundError(f"ModelScope lists nothing for {repo.id} at {revision}", "try --source hf")
        for file in data["Files"]:
            if file.get("Type") != "tree":
                files[file["Path"]] = Content(
                    int(file["Size"]), file.get("Sha256") or None, first=first_bytes(file["Path"])
                )
        commit = data.get("LatestCommitter", {}).get("Revision") or commit
        if repo.kind == "model" or len(data["Files"]) < PAGE:
            return Listing(commit, files)
        number += 1


def look_up(source: Source, path: str) -> Content | None:
    """Return size and version (mtime or ETag) of a file of a folder or web address, without checksum; None if it is not
    there. Raises NetworkError if a web server does not send the size, and IntegrityError for a web page."""
    if source.kind == "dir":
        file = Path(source.endpoint) / path
        if not file.is_file():
            return None
        stat = file.stat()
        return Content(stat.st_size, etag=f"mtime {stat.st_mtime_ns}", first=first_bytes(path))
    return with_retries(lambda: _look_up_url(source, path), source.retry, whom=_host(source), fix=REACH)


def _look_up_url(source: Source, path: str) -> Content | None:
    try:
        with _stream(source, f"{source.endpoint}/{quote(path)}", {}, path) as response:
            length = response.headers.get("content-length")
            _refuse_page(response, path)
            if length is None:
                raise NetworkError(f"{source.endpoint} sends no size for {path}", "fetch it with another --source")
            return Content(int(length), etag=response.headers.get("etag"), first=first_bytes(path))
    except NotFoundError:
        return None


# --- bodies


def opener(source: Source, repo: Repo, commit: str, path: str) -> OpenBody:
    """Return a function that opens one file at a byte range (first byte, end; exclusive, None for the rest) as a
    context manager for a `Body`. `repo` and `commit` are ignored for a folder and a plain web address."""
    if source.kind == "dir":
        return lambda begin, _end: _open_file(Path(source.endpoint) / path, begin)
    url = _address(source, repo, commit, path)
    return lambda begin, end: _open_url(source, url, path, begin, end)


def _address(source: Source, repo: Repo, commit: str, path: str) -> str:
    if source.kind == "hf":
        prefix = "datasets/" if repo.kind == "dataset" else ""
        return f"{source.endpoint}/{prefix}{repo.id}/resolve/{quote(commit, safe='')}/{quote(path)}"
    if source.kind == "modelscope":
        query = urlencode({"Revision": commit, "FilePath": path})
        return f"{source.endpoint}/api/v1/{repo.kind}s/{repo.id}/repo?{query}"
    return f"{source.endpoint}/{quote(path)}"


@contextlib.contextmanager
def _open_file(path: Path, begin: int) -> Iterator[Body]:
    """Open a local file from byte `begin` to its end. Raises NotFoundError if there is no such file."""
    try:
        with open(path, "rb") as file:
            file.seek(begin)
            num_bytes = path.stat().st_size
            yield Body(begin, num_bytes, iter(lambda: file.read(CHUNK_BYTES), b""))
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} is not there", "check the folder given as --source") from error


@contextlib.contextmanager
def _open_url(source: Source, url: str, path: str, begin: int, end: int | None) -> Iterator[Body]:
    """Request the bytes [begin, end) of a file; `end` None means to its end. A server that ignores ranges, or
    compresses although asked not to, sends the file from byte 0: see `Body.start`. Raises TryAgain for a compressed
    range, and what `_stream` raises."""
    headers = {} if begin == 0 and end is None else {"Range": f"bytes={begin}-{'' if end is None else end - 1}"}
    with _stream(source, url, headers, path) as response:
        _refuse_page(response, path)
        if response.headers.get("content-encoding", "identity") != "identity":
            if response.status_code == 206:
                raise TryAgain("the server sends compressed ranges, which cannot be joined")
            yield Body(0, None, response.iter_bytes())  # compressed although not asked for: iter_bytes decompresses
        elif response.status_code == 206:
            start, total = _content_range(response.headers.get("content-range", ""), begin)
            yield Body(start, total, response.iter_raw())
        else:
            length = response.headers.get("content-length")
            yield Body(0, int(length) if length else None, response.iter_raw())


def _content_range(text: str, begin: int) -> tuple[int, int | None]:
    """Return first byte and total size (None if unknown) of a Content-Range header; (begin, None) if malformed."""
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", text.strip())
    if match is None:
        return begin, None
    return int(match[1]), None if match[3] == "*" else int(match[3])


def _refuse_page(response: Any, path: str) -> None:
    """Raise IntegrityError if the response is a web page, such as a login page, although `path` does not name one."""
    if "text/html" in response.headers.get("content-type", "") and not path.endswith((".html", ".htm")):
        raise IntegrityError(f"a web page came instead of {path}", NOT_DATA)


# --- HTTP


def _http(session: Any) -> ModuleType:
    """Return the HTTP package that huggingface_hub uses, for its exceptions: httpx, from its version 2 on httpx2."""
    client = next(base for base in type(session).__mro__ if base.__name__ == "Client")
    return sys.modules[client.__module__.partition(".")[0]]


def _headers(source: Source) -> dict[str, str]:
    """Return the request headers of huggingface_hub. The user's access token is included only for the source hf."""
    from huggingface_hub.utils import build_hf_headers

    token = None if source.kind == "hf" else False  # the user's token is for the Hub only
    return build_hf_headers(token=token, library_name="mm", library_version="fetch")


@contextlib.contextmanager
def _stream(source: Source, url: str, headers: dict[str, str], what: str) -> Iterator[Any]:
    """Context manager that yields the streamed response, of status below 400, to a GET request. what: for messages.
    Raises as `_explained` does, and TryAgain if an address that the server redirected to refuses the request, since its
    signature may have expired."""
    from huggingface_hub.utils import get_session, hf_raise_for_status

    session = get_session()
    headers = {**_headers(source), "Accept-Encoding": "identity", **headers}
    timeout = _http(session).Timeout(source.retry.read_timeout_s)
    with (
        _explained(source, what),
        session.stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response,
    ):
        if response.status_code >= 400:
            response.read()
            if response.history and response.status_code in (401, 403, 404, 410):
                raise TryAgain(f"{response.url.host} refused a signed address (status {response.status_code})")
            hf_raise_for_status(response)
        yield response


def _get_json(source: Source, url: str, what: str, *, is_again: bool = False) -> tuple[Any, dict]:
    """Return the JSON response and its Link headers. Retries, with `is_again` (not the first page) also for 403."""
    from huggingface_hub.utils import get_session, hf_raise_for_status

    def ask() -> tuple[Any, dict]:
        with _explained(source, what):
            session = get_session()
            response = session.get(url, headers=_headers(source), timeout=source.retry.read_timeout_s)
            if is_again and response.status_code == 403:
                raise TryAgain(f"{source.endpoint} refused a page")
            hf_raise_for_status(response)
            return response.json(), response.links

    return with_retries(ask, source.retry, whom=_host(source), fix=REACH)


@contextlib.contextmanager
def _explained(source: Source, what: str) -> Iterator[None]:
    """Context manager that turns the HTTP client's exceptions into TryAgain (worth another attempt) or an MMError.
    what: what is requested, for messages, which name hosts, but never queries, headers or tokens."""
    from huggingface_hub import errors
    from huggingface_hub.utils import get_session

    http = _http(get_session())
    try:
        yield
    except (TryAgain, MMError):
        raise
    except errors.OfflineModeIsEnabled as error:
        problem = f"{what} is not complete here, and HF_HUB_OFFLINE forbids requests"
        raise NetworkError(problem, "unset HF_HUB_OFFLINE") from error
    except (errors.HfHubHTTPError, http.HTTPStatusError) as error:
        _explain_status(source, what, error)
    except http.TimeoutException as error:
        problem = f"{_host(source)} kept silent for {source.retry.read_timeout_s:g} s"
        raise TryAgain(problem, is_timeout=True) from error
    except (http.UnsupportedProtocol, http.InvalidURL) as error:
        problem = f"{source.endpoint} is no web address"
        raise UsageError(problem, "give --endpoint like https://hf-mirror.com") from error
    except http.TooManyRedirects as error:
        raise NetworkError(f"{_host(source)} redirects in a circle", REACH) from error
    except http.HTTPError as error:
        if isinstance(error, http.ConnectError) and _is_tls(error):
            raise NetworkError(
                f"no trusted connection to {_host(source)}: its certificate was not accepted",
                "check the clock, the https:// address and any proxy that opens TLS (SSL_CERT_FILE names its certificate)",
            ) from error
        kind = "the proxy" if isinstance(error, http.ProxyError) else _host(source)
        raise TryAgain(f"{kind} cannot be reached or dropped the connection ({type(error).__name__})") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise NetworkError(f"{_host(source)} answers, but not like a hub (no JSON)", NOT_DATA) from error


def _host(source: Source) -> str:
    """Return the host and port of a source's endpoint, without user name and password."""
    return urlsplit(source.endpoint).netloc.rpartition("@")[2]


def _is_tls(error: BaseException | None) -> bool:
    """Return whether an exception was caused by TLS, as by an untrusted certificate, and not by a closed connection."""
    while error is not None:
        if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _explain_status(source: Source, what: str, error: Any) -> NoReturn:
    """Raise TryAgain for a status in RETRIED, WrongSize for 416, else AccessError, NotFoundError or NetworkError."""
    from huggingface_hub import errors

    status, headers = error.response.status_code, error.response.headers
    host = _host(source)
    if status in RETRIED:
        raise TryAgain(f"{host} answered {status}", wait_s=asked_wait(headers, is_limit=status == 429)) from error
    if status == 416:
        raise WrongSize(f"{host} has a shorter file than the published one") from error
    if isinstance(error, errors.GatedRepoError):
        fix = f"accept the conditions at {source.endpoint}, then `hf auth login` or set HF_TOKEN"
        raise AccessError(f"{what}: access to the repository is gated", fix) from error
    if isinstance(error, errors.RevisionNotFoundError):
        raise NotFoundError(f"{what}: no such revision on {host}", "`--update` takes the newest one instead") from error
    if isinstance(error, errors.RepositoryNotFoundError) and status == 401:
        problem = f"{what}: absent, or private and visible only with a token"
        raise AccessError(problem, "log in: `hf auth login`") from error
    if status in (401, 403):
        problem = f"{what}: {host} refused access (status {status}): the token is wrong or lacks the right"
        raise AccessError(
            problem, "log in with `hf auth login`, or set HF_TOKEN to a token that may read it"
        ) from error
    if status in (404, 410):
        raise NotFoundError(f"{what}: not found on {host}", "`mm fetch --list` shows the known names") from error
    raise NetworkError(f"{what}: {host} answered {status}", REACH) from error


def asked_wait(headers: Any, *, is_limit: bool = False) -> float | None:
    """Return the seconds that a server asks to wait, by Retry-After; None if it does not ask. is_limit: the status is
    429, so that the reset time `t` of a RateLimit header counts too."""
    text = (headers.get("retry-after") or "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    with contextlib.suppress(TypeError, ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    limit = re.search(r"\bt\s*=\s*(\d+)", headers.get("ratelimit") or "") if is_limit else None
    return float(limit[1]) if limit else None
