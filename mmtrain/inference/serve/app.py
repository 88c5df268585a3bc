"""The web server of `mm serve`: OpenAI's HTTP API for one model, and a chat page. Needs the extra mm[serve].

A new answer joins those in generation at the next step. A request that is too large or too long, takes too long, or
comes while too many answers are waiting, gets a 4xx or 5xx status and an error in JSON. When a client disconnects, its
answers are cancelled. Neither the page nor the API sends anything to other machines.
"""

import asyncio
import contextlib
import hmac
import secrets
import socket
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib import resources
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import UNSET, UnsetType, structs

from mmdata.encode.rows import Message
from mmdata.encode.template import Template
from mmdata.errors import MMError, TokenizerError, UsageError
from mmtrain.inference.chat import fit, plain_prompt
from mmtrain.inference.engine import Delta, Engine
from mmtrain.inference.serve.api import Request, RequestError, chat_request, completion_request
from mmtrain.inference.serve.responses import AnswerStream, Choice, Completion, ModelCard, Usage
from mmtrain.inference.serve.worker import Ask, BusyError, StoppedError, Worker
from mmtrain.inference.settings import ServeOptions

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request as HttpRequest
    from starlette.responses import Response

# URL path -> file in assets/
PAGE = {"": "index.html", "chat.js": "chat.js", "chat.css": "chat.css", "icon.svg": "icon.svg"}
TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
NO_TOOLS = '299 - "the chat template of this model writes no tools: it does not see those of the request"'
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# When old turns are dropped and the request has no max_tokens, this many tokens are left free for the answer, or half
# the window if that is less.
ANSWER_TOKENS = 512
READ_S = 30  # seconds in which a request body must arrive
POLL_S = 0.5  # seconds between checks whether a client is still connected


@dataclass(frozen=True)
class Service:
    """The model that is served, and the limits on requests. `name` is the model's name in the API, `prompts` what the
    chat page proposes to ask."""

    name: str
    template: Template
    worker: Worker
    options: ServeOptions
    prompts: Sequence[str] = ()
    started: int = field(default_factory=lambda: int(time.time()))  # Unix time

    @property
    def engine(self) -> Engine:
        """The engine that the worker runs."""
        return self.worker.engine

    @cached_property
    def knows_thinking(self) -> bool:
        """Whether the chat template makes a different prompt when thinking is requested than when it is not."""
        hello = [Message("user", "hello")]
        with_thinking, without = (
            self.template.prompt_ids(self.engine.tokenizer, hello, think=on) for on in (True, False)
        )
        return with_thinking != without

    @cached_property
    def knows_tools(self) -> bool:
        """Whether the chat template writes the tools of a request into the prompt."""
        hello: list[Message] = [Message("user", "hello")]
        function = {"name": "lookup", "description": "Look it up.", "parameters": {"type": "object", "properties": {}}}
        tools = [{"type": "function", "function": function}]
        return self.template.prompt_ids(self.engine.tokenizer, hello, tools) != self.template.prompt_ids(
            self.engine.tokenizer, hello
        )

    @property
    def card(self) -> ModelCard:
        """The description of the model in the response of /v1/models."""
        engine = self.engine
        figures = (engine.num_params, engine.tokenizer.vocab_size)
        return ModelCard(self.name, self.started, engine.window, self.knows_thinking, *figures, self.prompts)


def check_installed() -> None:
    """Raise UsageError if starlette or uvicorn is not installed."""
    if not all(map(find_spec, ("starlette", "uvicorn"))):
        raise UsageError("mm serve needs starlette and uvicorn", "pip install 'mm-toolkit[serve]'")


def make_app(service: Service) -> "Starlette":
    """Return the ASGI application for a service. The service's worker is started and stopped with the application."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.cors import CORSMiddleware
    from starlette.routing import Route

    @contextlib.asynccontextmanager
    async def lifespan(_app: "Starlette") -> AsyncIterator[None]:
        service.worker.start()
        yield
        await asyncio.to_thread(service.worker.stop)

    async def models(_request: "HttpRequest") -> "Response":
        return _json({"object": "list", "data": [service.card]})

    async def model(request: "HttpRequest") -> "Response":
        if request.path_params["name"] != service.name:
            raise RequestError(f"no model {request.path_params['name']!r} here", status=404, code="model_not_found")
        return _json(service.card)

    async def health(_request: "HttpRequest") -> "Response":
        worker = service.worker
        counts = {"running": worker.num_running, "waiting": worker.num_waiting}
        return _json({"status": "ok", "model": service.name, **counts})

    async def page(request: "HttpRequest") -> "Response":
        return _page(request.url.path.removeprefix("/"))

    async def error_response(request: "HttpRequest", error: Exception) -> "Response":
        status = getattr(error, "status_code", 500)
        messages = {404: f"nothing at {request.url.path}", 405: f"{request.url.path} takes another method"}
        return _json(RequestError(messages.get(status, "something went wrong"), status=status).body(), status)

    guarded = partial(_guarded, service)
    return Starlette(
        routes=[
            Route("/v1/models", guarded(models)),
            Route("/v1/models/{name:path}", guarded(model)),
            Route("/v1/chat/completions", guarded(partial(_complete, service, chat_request)), methods=["POST"]),
            Route("/v1/completions", guarded(partial(_complete, service, completion_request)), methods=["POST"]),
            Route("/health", guarded(health)),
            *(Route(f"/{path}", guarded(page)) for path in PAGE),
        ],
        middleware=[
            Middleware(CORSMiddleware, service.options.origins, ("GET", "POST"), ("*",), allow_private_network=True)
        ]
        * bool(service.options.origins),
        exception_handlers=dict.fromkeys((404, 405, 500), error_response),
        lifespan=lifespan,
    )


def _guarded(service: Service, handle: Callable) -> Callable:
    """Return `handle` behind a check of the Host header and, below /v1/, the API key; RequestErrors become JSON."""

    async def answer(request: "HttpRequest") -> "Response":
        try:
            _check_host(service, request)
            if request.url.path.startswith("/v1/"):
                _check_key(service, request)
            return await handle(request)
        except RequestError as error:
            return _json(error.body(), error.status)

    return answer


def serve(service: Service, ready: Callable[[str], None]) -> None:
    """Serve on the service's host and port until SIGINT or SIGTERM; answers in generation then have 5 seconds to end.
    Raise UsageError when the port is taken or the host is not an address of this machine. ready: called with the
    address once the server is listening."""
    app = make_app(service)
    import uvicorn

    host = service.options.host
    listening = listen(host, service.options.port)
    host = f"[{host}]" if ":" in host else host
    ready(f"http://{host}:{listening.getsockname()[1]}")
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=5, server_header=False
    )
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal again after its shutdown
        uvicorn.Server(config).run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on `port` of `host`; port 0 takes a free one. Raise UsageError when the port is not
    from 0 to 65535 or cannot be used, or the host has no address."""
    if not 0 <= port < 65536:
        raise UsageError(f"--port {port} is no port", "give a number from 0 to 65535")
    try:
        (family, kind, protocol, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError):
        fix = "--host 127.0.0.1, or 0.0.0.0 for all addresses of this machine"
        raise UsageError(f"--host {host} is no address", fix) from None
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


# --- checks and bodies


def _check_host(service: Service, request: "HttpRequest") -> None:
    """Raise RequestError (status 403) if the server listens on a loopback address and the Host header names another: a
    web page of another site could otherwise reach it by a domain that resolves to this machine (DNS rebinding)."""
    host = request.headers.get("host", "")
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if service.options.host in LOOPBACK and name not in (*LOOPBACK, "testserver"):
        raise RequestError("this address is not served here: Host must be a loopback name", status=403)


def _check_key(service: Service, request: "HttpRequest") -> None:
    """Raise RequestError (status 401) when the service has an API key that the Authorization header does not carry."""
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    expected = service.options.api_key
    if expected is None:
        return
    if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), expected.encode()):
        message = "this server needs its API key: Authorization: Bearer KEY"
        raise RequestError(message, status=401, code="invalid_api_key")


async def _body(service: Service, request: "HttpRequest") -> Any:
    """Read a request's JSON body. Raise RequestError when its type is not JSON, it is larger than --max-body,
    takes longer than READ_S seconds to arrive, or cannot be decoded."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError("Content-Type must be application/json", status=415)
    max_bytes = service.options.max_body
    too_large = RequestError(f"the body is larger than {max_bytes:,} bytes", status=413)
    with contextlib.suppress(ValueError):
        if int(request.headers.get("content-length", "0")) > max_bytes:
            raise too_large
    read = bytearray()
    try:
        async with asyncio.timeout(READ_S):
            async for piece in request.stream():
                read += piece
                if len(read) > max_bytes:
                    raise too_large
    except TimeoutError:
        raise RequestError(f"the body did not arrive within {READ_S} s", status=408) from None
    try:
        return msgspec.json.decode(read)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {error}") from None


def _json(body: Any, status: int = 200) -> "Response":
    """Return a response with a JSON body and, for status 401 and 503, the header that belongs to the status."""
    from starlette.responses import Response

    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {"Retry-After": "1"} if status == 503 else None
    return Response(msgspec.json.encode(body), status, headers, "application/json")


def _event(body: Any) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


def _page(path: str) -> "Response":
    """Return a file of the chat page; `path` is a key of `PAGE`."""
    from starlette.responses import Response

    name = PAGE[path]
    content = resources.files("mmtrain.inference.serve").joinpath("assets", name).read_bytes()
    return Response(content, headers=HEADERS, media_type=TYPES[name.rpartition(".")[2]])


# --- answering


async def _complete(service: Service, read: Callable[[Any, Sequence[str]], Request], http: "HttpRequest") -> "Response":
    """Answer a request for a chat or a completion, streamed if it says so. read: `chat_request` or
    `completion_request`. Raise RequestError for a request that cannot be served."""
    from starlette.responses import StreamingResponse

    request = read(await _body(service, http), [service.name])
    if request.think and not service.knows_thinking:
        raise RequestError("this model's chat template has no thinking", param="chat_template_kwargs")
    generation = await asyncio.to_thread(_Generation, service, request)
    headers = {"Warning": NO_TOOLS} if request.tools and not service.knows_tools else {}
    if not request.stream:
        response = _json(await generation.whole(http))
        response.headers.update(headers)
        return response
    deltas = generation.deltas()
    first = await anext(deltas)  # an error before the first token becomes an error response, not an event of a stream
    events = generation.events(first, deltas)
    return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"} | headers)


class _Generation:
    """The generation of all answers to one request: `n` for each prompt, prompt by prompt. Creating it raises
    RequestError when a prompt and its answer do not fit the window or the chat template refuses the messages."""

    def __init__(self, service: Service, request: Request):
        self._service, self._request = service, request
        self._asks: list[Ask] = []
        seed = secrets.randbits(62) if request.seed is None else request.seed
        vocab_size = service.engine.tokenizer.vocab_size
        if unknown := [id for id, _ in request.sampling.logit_bias if not 0 <= id < vocab_size]:
            raise RequestError(f"logit_bias: no token {unknown[0]}, ids are below {vocab_size:,}", param="logit_bias")
        if request.sampling.json_schema:
            self._check_schema(request.sampling.json_schema)
        for prompt_ids in self._prompts():
            max_new_tokens = self._max_new_tokens(len(prompt_ids))
            for _ in range(request.n):
                own_seed = (seed + len(self._asks)) % 2**63
                sampling = replace(request.sampling, seed=own_seed, max_new_tokens=max_new_tokens)
                self._asks.append(Ask(prompt_ids, sampling))
        tokenizer = service.engine.tokenizer
        self._answers = [AnswerStream(request, i, ask.prompt_ids, tokenizer) for i, ask in enumerate(self._asks)]

    def _check_schema(self, schema: str) -> None:
        try:
            self._service.engine.json_grammar.guide(schema)
        except UsageError as error:
            raise RequestError(f"response_format: {error.message}", param="response_format") from None

    def _prompts(self) -> list[list[int]]:
        """Return the ids of each prompt: one for a chat, one per text for a completion. With `truncate`, the oldest
        turns of a chat are dropped until there is room for an answer. Raises the errors of `_Generation`."""
        request, template = self._request, self._service.template
        tokenizer, window = self._service.engine.tokenizer, self._service.engine.window
        messages, tools, think = request.messages, request.tools, request.think
        if not request.is_chat:
            return [plain_prompt(tokenizer, text) for text in request.prompts]
        try:
            if not request.truncate:
                return [template.prompt_ids(tokenizer, messages, tools, think=think)]
            room = window - min(request.max_tokens or ANSWER_TOKENS, window // 2)
            return [fit(template, tokenizer, messages, room=room, tools=tools, think=think)]
        except TokenizerError as error:
            raise RequestError(error.message, param="messages") from None
        except UsageError as error:
            raise RequestError(error.message, param="messages", code="context_length_exceeded") from None

    def _max_new_tokens(self, num_prompt: int) -> int:
        """Return the most tokens of an answer to a prompt of `num_prompt` tokens, by window, request and server. Raise
        RequestError if the window has no room for the request's `max_tokens` (with `truncate`: for one token)."""
        request, window = self._request, self._service.engine.window
        room, needed = window - num_prompt, 1 if request.truncate else request.max_tokens or 1
        if room < needed:
            raise RequestError(
                f"the prompt has {num_prompt:,} tokens; with {needed:,} for the answer that is more than "
                f"the window of {window:,}",
                param="messages" if request.is_chat else "prompt",
                code="context_length_exceeded",
            )
        return min(room, request.max_tokens or room, self._service.options.max_tokens or room)

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """Yield (index of the answer, delta) as the worker generates them. Raise RequestError: 503 when too many
        answers are waiting or generation stopped, 504 after the service's timeout, 400 for other errors."""
        worker, timeout_s = self._service.worker, self._service.options.timeout
        try:
            async with contextlib.aclosing(worker.answer(self._asks, timeout_s=timeout_s)) as deltas:
                async for delta in deltas:
                    yield delta
        except BusyError:
            raise RequestError("too many requests are waiting: try again soon", status=503, code="busy") from None
        except TimeoutError:
            raise RequestError(f"the answer took longer than {timeout_s:g} s", status=504, code="timeout") from None
        except StoppedError as error:
            raise RequestError(str(error), status=503) from None
        except MMError as error:
            raise RequestError(error.message) from None

    async def whole(self, http: "HttpRequest") -> Completion:
        """Return the body of a response that is not streamed. If the client disconnects, cancel the answers and raise
        RequestError."""

        async def read() -> None:
            async with contextlib.aclosing(self.deltas()) as deltas:
                async for index, delta in deltas:
                    self._answers[index].add(delta)

        reading = asyncio.ensure_future(read())
        try:
            while not (await asyncio.wait([reading], timeout=POLL_S))[0]:
                if await http.is_disconnected():
                    raise RequestError("the client has disconnected", status=499)
            await reading
        finally:
            reading.cancel()
        return self._body([answer.whole() for answer in self._answers], self._usage())

    async def events(
        self, first: tuple[int, Delta], deltas: AsyncGenerator[tuple[int, Delta], None]
    ) -> AsyncIterator[bytes]:
        """Yield the server-sent events of a streamed response: the chunks of all answers, the token counts if they were
        requested, and `[DONE]`; a RequestError becomes the last event instead. first: already taken from `deltas`."""
        empty = self._body([], None if self._request.include_usage else UNSET)

        def event(choice: Choice) -> bytes:
            return _event(structs.replace(empty, choices=[choice]))

        try:
            async with contextlib.aclosing(deltas):
                for answer in self._answers if self._request.is_chat else ():
                    yield event(answer.begin())
                for choice in self._answers[first[0]].add(first[1]):
                    yield event(choice)
                async for index, delta in deltas:
                    for choice in self._answers[index].add(delta):
                        yield event(choice)
        except RequestError as error:
            yield _event(error.body())
            return
        if self._request.include_usage:
            yield _event(structs.replace(empty, usage=self._usage()))
        yield b"data: [DONE]\n\n"

    def _body(self, choices: list[Choice], usage: Usage | UnsetType | None) -> Completion:
        """Return a response body with a new id. usage: UNSET leaves the field out, None writes null."""
        prefix, kind = ("chatcmpl", "chat.completion") if self._request.is_chat else ("cmpl", "text_completion")
        if self._request.stream and self._request.is_chat:
            kind = "chat.completion.chunk"
        return Completion(f"{prefix}-{uuid.uuid4().hex}", kind, int(time.time()), self._service.name, choices, usage)

    def _usage(self) -> Usage:
        """Return the token counts of all answers. A prompt counts once for its `n` answers."""
        num_prompt = sum(answer.num_prompt for answer in self._answers[:: self._request.n])
        num_new = sum(answer.num_new for answer in self._answers)
        return Usage(num_prompt, num_new, num_prompt + num_new)
