"""A run behind OpenAI's HTTP interface, with a chat page of its own: `mm serve`. Needs the extra mm[serve].

Requests are batched as they come: a new answer joins those being written at the next step. What a request may ask for, how
long it may be, how many may wait and how long one may take are limited; each limit is a 4xx or 503 with a JSON error. A
client that goes away ends its answers. The page and the interface never send anything elsewhere.
"""

import asyncio
import contextlib
import hmac
import json
import secrets
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mmdata.encode.template import Message, Template
from mmdata.errors import MMError, TokenizerError, UsageError
from mmtrain.inference.chat import THINKING, fit
from mmtrain.inference.engine import Delta, Engine, Token
from mmtrain.inference.replies import THINK, Splitter
from mmtrain.inference.sampling import Sampling
from mmtrain.inference.serve import api
from mmtrain.inference.serve.api import Request, RequestError
from mmtrain.inference.serve.worker import Ask, BusyError, StoppedError, Worker

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request as HttpRequest
    from starlette.responses import Response

PAGE = {"": "index.html", "chat.js": "chat.js", "chat.css": "chat.css", "icon.svg": "icon.svg"}
TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
LOOPBACK = ("127.0.0.1", "localhost", "::1")
KEPT_FREE = 512  # tokens for the answer when turns are dropped for it; never more than half the window
READ_S = 30  # a body must have come by then
LOOK_S = 0.5  # between looks whether a client is still there


@dataclass(frozen=True)
class Service:
    """What is served and within which limits."""

    name: str
    template: Template
    worker: Worker
    api_key: str | None = None
    host: str = "127.0.0.1"
    max_body_bytes: int = 2**20
    max_tokens: int | None = None  # of one answer; None: what the window has room for
    timeout_s: float = 600
    started: int = field(default_factory=lambda: int(time.time()))

    @property
    def engine(self) -> Engine:
        """Generates."""
        return self.worker.engine

    @cached_property
    def knows_thinking(self) -> bool:
        """Whether the chat template writes another prompt when thinking is asked for."""
        hello = [Message("user", "hello")]
        asked, unasked = (self.template.prompt_ids(self.engine.tokenizer, hello, think=on) for on in (True, False))
        return asked != unasked


def check_installed() -> None:
    """UsageError where the extra is not installed."""
    if not all(map(find_spec, ("starlette", "uvicorn"))):
        raise UsageError("mm serve needs starlette and uvicorn", "pip install 'mm-toolkit[serve]'")


def make_app(service: Service) -> "Starlette":
    """The ASGI application."""
    from starlette.applications import Starlette
    from starlette.routing import Route

    @contextlib.asynccontextmanager
    async def lifespan(_app: "Starlette") -> AsyncIterator[None]:
        service.worker.start()
        yield
        await asyncio.to_thread(service.worker.stop)

    def guarded(handle: Callable) -> Callable:
        """Turn what a request did wrong, or what went wrong, into a JSON error."""

        async def answer(request: "HttpRequest") -> "Response":
            try:
                if not _may_come(service, request):
                    raise RequestError("this address is not served here: Host must be a loopback name", status=403)
                if request.url.path.startswith("/v1/"):
                    _check_key(service, request)
                return await handle(request)
            except RequestError as error:
                return _json(error.body(), error.status)

        return answer

    async def models(_request: "HttpRequest") -> "Response":
        return _json({"object": "list", "data": [_model(service)]})

    async def model(request: "HttpRequest") -> "Response":
        if request.path_params["name"] != service.name:
            raise RequestError(f"no model {request.path_params['name']!r} here", status=404, code="model_not_found")
        return _json(_model(service))

    async def health(_request: "HttpRequest") -> "Response":
        worker = service.worker
        return _json(
            {"status": "ok", "model": service.name, "running": worker.num_running, "waiting": worker.num_waiting}
        )

    async def chat(request: "HttpRequest") -> "Response":
        return await _complete(service, request, api.chat_request)

    async def completion(request: "HttpRequest") -> "Response":
        return await _complete(service, request, api.completion_request)

    async def page(request: "HttpRequest") -> "Response":
        return _page(request.url.path.removeprefix("/"))

    async def elsewhere(request: "HttpRequest", error: Exception) -> "Response":
        status = getattr(error, "status_code", 500)
        what = {404: f"nothing at {request.url.path}", 405: f"{request.url.path} takes another method"}
        return _json(RequestError(what.get(status, "something went wrong"), status=status).body(), status)

    return Starlette(
        routes=[
            Route("/v1/models", guarded(models)),
            Route("/v1/models/{name:path}", guarded(model)),
            Route("/v1/chat/completions", guarded(chat), methods=["POST"]),
            Route("/v1/completions", guarded(completion), methods=["POST"]),
            Route("/health", guarded(health)),
            *(Route(f"/{path}", guarded(page)) for path in PAGE),
        ],
        exception_handlers={404: elsewhere, 405: elsewhere, 500: elsewhere},
        lifespan=lifespan,
    )


def serve(service: Service, port: int, *, ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; answers in progress then have a few seconds to end. `ready` is told the address.

    UsageError when the port is taken or the host is no address of this machine.
    """
    app = make_app(service)
    import uvicorn

    listening = listen(service.host, port)
    host = f"[{service.host}]" if ":" in service.host else service.host
    ready(f"http://{host}:{listening.getsockname()[1]}")
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=5, server_header=False
    )
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal again once all has ended
        uvicorn.Server(config).run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one."""
    if not 0 <= port < 65536:
        raise UsageError(f"--port {port} is no port", "give a number from 0 to 65535")
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError):
        raise UsageError(
            f"--host {host} is no address", "--host 127.0.0.1, or 0.0.0.0 for all of this machine"
        ) from None
    listening = socket.socket(family, kind, protocol)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        listening.close()
        raise UsageError(
            f"cannot listen on {host} port {port}: {error.strerror}", f"choose another port: mm serve --port {port + 1}"
        ) from None
    return listening


# --- who may ask, and what they sent ----------------------------------------------------------------------------------


def _may_come(service: Service, request: "HttpRequest") -> bool:
    """A server on the loopback address answers to loopback names only: a page elsewhere cannot reach it by a name of its
    own that leads here."""
    if service.host not in LOOPBACK:
        return True
    host = request.headers.get("host", "")
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name in (*LOOPBACK, "testserver")


def _check_key(service: Service, request: "HttpRequest") -> None:
    if service.api_key is None:
        return
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), service.api_key.encode()):
        raise RequestError(
            "this server wants its API key: Authorization: Bearer KEY", status=401, code="invalid_api_key"
        )


async def _body(service: Service, request: "HttpRequest") -> Any:
    """The JSON of a request, read no further than may be."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError("Content-Type must be application/json", status=415)
    too_large = RequestError(f"the body is larger than {service.max_body_bytes:,} bytes", status=413)
    with contextlib.suppress(ValueError):
        if int(request.headers.get("content-length", "0")) > service.max_body_bytes:
            raise too_large
    read = bytearray()
    try:
        async with asyncio.timeout(READ_S):
            async for piece in request.stream():
                read += piece
                if len(read) > service.max_body_bytes:
                    raise too_large
    except TimeoutError:
        raise RequestError(f"the body did not come within {READ_S} s", status=408) from None
    try:
        return json.loads(read, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is no JSON: {error}") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


# --- a request -> asks --------------------------------------------------------------------------------------------------


def _asks(service: Service, request: Request) -> list[Ask]:
    """The answers a request wants, `n` to each prompt; RequestError when they cannot fit the window."""
    seed = secrets.randbits(62) if request.seed is None else request.seed
    asks = []
    for prompt_ids in _prompts(service, request):
        room = service.engine.window - len(prompt_ids)
        needed = 1 if request.truncate else request.max_tokens or 1
        if room < needed:
            raise RequestError(
                f"the prompt has {len(prompt_ids):,} tokens; with {needed:,} for the answer that is more than "
                f"the window of {service.engine.window:,}",
                param="messages" if request.is_chat else "prompt",
                code="context_length_exceeded",
            )
        longest = min(room, request.max_tokens or room, service.max_tokens or room)
        for _ in range(request.n):
            asks.append(Ask(prompt_ids, _sampling(request, (seed + len(asks)) % 2**63, longest)))
    return asks


def _prompts(service: Service, request: Request) -> list[list[int]]:
    tokenizer = service.engine.tokenizer
    if not request.is_chat:
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        return [bos + tokenizer.encode_batch([text])[0].tolist() for text in request.prompts]
    try:
        if not request.truncate:
            return [service.template.prompt_ids(tokenizer, request.messages, request.tools, think=request.think)]
        room = service.engine.window - min(request.max_tokens or KEPT_FREE, service.engine.window // 2)
        return [fit(service.template, tokenizer, request.messages, room=room, tools=request.tools, think=request.think)]
    except TokenizerError as error:
        raise RequestError(error.message, param="messages") from None
    except UsageError as error:
        raise RequestError(error.message, param="messages", code="context_length_exceeded") from None


def _sampling(request: Request, seed: int, max_new_tokens: int) -> Sampling:
    return Sampling(
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        seed=seed,
        max_new_tokens=max_new_tokens,
        stop=request.stop,
        logprobs=request.logprobs,
    )


# --- answers --------------------------------------------------------------------------------------------------------------


class _Choice:
    """One answer of a response as it comes: told apart for a chat, as it is for a completion."""

    def __init__(self, service: Service, request: Request, index: int, ask: Ask):
        self.index, self._request, self._tokenizer = index, request, service.engine.tokenizer
        self._splitter = Splitter(with_calls=bool(request.tools)) if request.is_chat else None
        self.num_prompt = len(ask.prompt_ids)
        self.num_new = 0
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[dict[str, Any]] = []
        self.tokens: list[Token] = []
        self.finish_reason: str | None = None
        opening = self._tokenizer.decode(list(ask.prompt_ids)[-8:])
        if self._splitter and opening.endswith(THINKING):  # the prompt itself has opened the block
            self._splitter.feed(THINK + "\n")

    def add(self, delta: Delta) -> list[dict[str, Any]]:
        """Take in what was said; the streamed deltas it makes."""
        self.num_new += len(delta.tokens)
        self.tokens += delta.tokens if self._request.logprobs is not None else ()
        if self._splitter is None:
            self.content.append(delta.text)
            made = [{"text": delta.text}] if delta.text or delta.tokens else []
        else:
            pieces = self._splitter.feed(delta.text)
            pieces += self._splitter.close() if delta.finish_reason else []
            made = [self._piece(piece) for piece in pieces]
        if delta.finish_reason:
            self.finish_reason = "tool_calls" if self.calls else delta.finish_reason
        return made

    def _piece(self, piece: Any) -> dict[str, Any]:
        if piece.call:
            call = api.tool_call(piece.call, len(self.calls))
            self.calls.append(call)
            return {"tool_calls": [call]}
        if piece.kind == "reasoning":
            self.reasoning.append(piece.text)
            return {"reasoning_content": piece.text}
        self.content.append(piece.text)
        return {"content": piece.text}

    def whole(self) -> dict[str, Any]:
        """The choice of a response that is not streamed."""
        made = {"index": self.index, "finish_reason": self.finish_reason, "logprobs": self.logprobs(self.tokens)}
        if self._splitter is None:
            return made | {"text": "".join(self.content)}
        calls = [{name: value for name, value in call.items() if name != "index"} for call in self.calls]
        message: dict[str, Any] = {"role": "assistant", "content": "".join(self.content) or (None if calls else "")}
        if self.reasoning:
            message["reasoning_content"] = "".join(self.reasoning)
        if calls:
            message["tool_calls"] = calls
        return made | {"message": message}

    def streamed(self, delta: dict[str, Any], tokens: Sequence[Token] = (), *, is_last: bool = False) -> dict[str, Any]:
        """A choice of a streamed chunk."""
        made = {"index": self.index, "finish_reason": self.finish_reason if is_last else None}
        made["logprobs"] = self.logprobs(tokens) if tokens else None
        return made | ({"delta": delta} if self._splitter else {"text": delta.get("text", "")})

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """Log-probabilities in OpenAI's two forms; None when none were asked for."""
        if self._request.logprobs is None:
            return None
        if self._splitter is None:
            texts = [self._text(token.id) for token in tokens]
            return {
                "tokens": texts,
                "token_logprobs": [token.logp for token in tokens],
                "top_logprobs": [{self._text(id): logp for id, logp in token.top} for token in tokens],
            }
        return {
            "content": [
                self._entry(token.id, token.logp) | {"top_logprobs": [self._entry(*top) for top in token.top]}
                for token in tokens
            ]
        }

    def _entry(self, id: int, logp: float | None) -> dict[str, Any]:
        text = self._text(id)
        return {"token": text, "logprob": logp, "bytes": None if "\ufffd" in text else list(text.encode())}

    def _text(self, id: int) -> str:
        return self._tokenizer.decode([id])


async def _complete(service: Service, http: "HttpRequest", read: Callable[[Any, Sequence[str]], Request]) -> "Response":
    """Answer a chat or a completion, whole or streamed."""
    from starlette.responses import StreamingResponse

    request = read(await _body(service, http), [service.name])
    if request.think and not service.knows_thinking:
        raise RequestError("this model's chat template has no thinking to ask for", param="chat_template_kwargs")
    asks = await asyncio.to_thread(_asks, service, request)
    deltas = _deltas(service, asks)
    choices = [_Choice(service, request, index, ask) for index, ask in enumerate(asks)]
    if not request.stream:
        return _json(await _whole(service, http, request, choices, deltas))
    first = await anext(deltas)  # what cannot be begun is an error of its own, not one inside a stream
    events = _events(service, request, choices, first, deltas)
    return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def _deltas(service: Service, asks: Sequence[Ask]) -> AsyncGenerator[tuple[int, Delta], None]:
    """What the worker says, its errors as RequestErrors, within the time a request may take."""
    try:
        async with contextlib.aclosing(service.worker.answer(asks, timeout_s=service.timeout_s)) as said:
            async for event in said:
                yield event
    except BusyError:
        raise RequestError("too many requests wait already: try again soon", status=503, code="busy") from None
    except TimeoutError:
        raise RequestError(f"the answer took longer than {service.timeout_s:g} s", status=504, code="timeout") from None
    except StoppedError as error:
        raise RequestError(str(error), status=503) from None
    except MMError as error:
        raise RequestError(error.message) from None


async def _whole(
    service: Service,
    http: "HttpRequest",
    request: Request,
    choices: Sequence[_Choice],
    deltas: AsyncGenerator[tuple[int, Delta], None],
) -> dict[str, Any]:
    """The body of a response once all answers have ended; a client that leaves ends them."""

    async def read() -> None:
        async with contextlib.aclosing(deltas):
            async for index, delta in deltas:
                choices[index].add(delta)

    reading = asyncio.ensure_future(read())
    try:
        while not (await asyncio.wait([reading], timeout=LOOK_S))[0]:
            if await http.is_disconnected():
                raise RequestError("the client has left", status=499)
        await reading
    finally:
        reading.cancel()
    made = [choice.whole() for choice in choices]
    return api.response(request, api.new_id(request.is_chat), service.name, made, _counts(request, choices))


async def _events(
    service: Service,
    request: Request,
    choices: Sequence[_Choice],
    first: tuple[int, Delta],
    deltas: AsyncGenerator[tuple[int, Delta], None],
) -> AsyncIterator[str]:
    """Server-sent events; an error on the way is the last of them."""
    id, created = api.new_id(request.is_chat), int(time.time())

    def event(made: list[dict[str, Any]], counts: dict[str, int] | None = None) -> str:
        return _event(api.chunk(request, id, created, service.name, made, counts))

    try:
        async with contextlib.aclosing(deltas):
            if request.is_chat:
                for choice in choices:
                    yield event([choice.streamed({"role": "assistant", "content": ""})])
            for made in _chunks(choices, *first):
                yield event([made])
            async for index, delta in deltas:
                for made in _chunks(choices, index, delta):
                    yield event([made])
    except RequestError as error:
        yield _event(error.body())
        return
    if request.include_usage:
        yield event([], _counts(request, choices))
    yield "data: [DONE]\n\n"


def _chunks(choices: Sequence[_Choice], index: int, delta: Delta) -> Iterator[dict[str, Any]]:
    """The streamed choices that one step of an answer makes; its log-probabilities go with the first."""
    choice = choices[index]
    made = choice.add(delta)
    tokens = delta.tokens if choice.logprobs(()) is not None else ()
    if tokens and not made:
        made = [{}]
    for one in made:
        yield choice.streamed(one, tokens)
        tokens = ()
    if delta.finish_reason:
        yield choice.streamed({}, is_last=True)


def _counts(request: Request, choices: Sequence[_Choice]) -> dict[str, int]:
    prompts = sum(choice.num_prompt for choice in choices[:: request.n])  # n answers share a prompt
    return api.usage(prompts, sum(choice.num_new for choice in choices))


# --- bodies ---------------------------------------------------------------------------------------------------------------


def _json(body: Any, status: int = 200) -> "Response":
    from starlette.responses import Response

    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {"Retry-After": "1"} if status == 503 else None
    content = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    return Response(content, status, headers, "application/json")


def _event(body: Any) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _page(path: str) -> "Response":
    from starlette.responses import Response

    name = PAGE[path]
    content = resources.files("mmtrain.inference.serve").joinpath("assets", name).read_bytes()
    return Response(content, headers=HEADERS, media_type=TYPES[name.rpartition(".")[2]])


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.started,
        "owned_by": "mm",
        "context_length": service.engine.window,
        "knows_thinking": service.knows_thinking,
    }
