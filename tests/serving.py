"""A served model for tests: a small one with random weights, or one that says what a test wants; on a free loopback port."""

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import uvicorn

from mmdata.encode.template import Template
from mmdata.tokenizer.tokenizer import Tokenizer, train_bpe
from mmtrain.inference.engine import Delta, Engine, Token
from mmtrain.inference.serve.app import Service, listen, make_app
from mmtrain.inference.serve.worker import Worker
from mmtrain.inference.settings import Sampling, ServeOptions
from mmtrain.model.model import Model
from mmtrain.shapes import ModelConfig

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% if enable_thinking %}{{ '<think>\\n' }}{% endif %}{% endif %}"
)


def small_tokenizer(directory: Path) -> Tokenizer:
    texts = ["user\n", "assistant\n", "Where does Pim live?", "皮姆住在哪里？"] * 4
    return train_bpe(texts, vocab_size=300, control_tokens=CONTROL, chat_template=TEMPLATE, out_dir=directory)


def random_engine(tokenizer: Tokenizer, **options: Any) -> Engine:
    """An engine of a model with random weights, spread so that no two tokens tie."""
    torch.manual_seed(5)
    model = Model(ModelConfig(tokenizer.vocab_size, 48, 2, 4, 2, 64, rope_theta=1e4, qk_norm=True))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    return Engine(model.eval(), tokenizer, **options)


class SaidRow:
    def __init__(self, num_prompt: int, ids: list[int], options: Sampling):
        self.num_prompt, self.options, self.ids, self.left = num_prompt, options, [], ids
        self.finish_reason: str | None = None


class SayingEngine:
    """Says `script`, a token a step, `pause_s` apart, whatever is asked; fails where `error` is set."""

    def __init__(
        self, tokenizer: Tokenizer, script: str, *, pause_s: float = 0.0, window: int = 512, max_rows: int = 8
    ):
        self.tokenizer, self.script, self.pause_s = tokenizer, script, pause_s
        self.num_params = 104_030_976
        self.window, self.max_rows = window, max_rows
        self.rows: list[SaidRow] = []
        self.error: Exception | None = None
        self.may_step = threading.Event()  # cleared, it holds every step back
        self.may_step.set()
        self.num_cancelled = 0

    @property
    def is_idle(self) -> bool:
        return not self.rows

    @property
    def num_running(self) -> int:
        return min(len(self.rows), self.max_rows)

    @property
    def num_waiting(self) -> int:
        return len(self.rows) - self.num_running

    def submit(self, prompt_ids: Sequence[int], options: Sampling) -> SaidRow:
        row = SaidRow(len(prompt_ids), self.tokenizer.encode_batch([self.script])[0].tolist(), options)
        self.rows.append(row)
        return row

    def cancel(self, row: SaidRow) -> None:
        if row.finish_reason is None:
            row.finish_reason = "cancelled"
            self.rows.remove(row)
            self.num_cancelled += 1

    def step(self) -> list[Delta]:
        self.may_step.wait()
        time.sleep(self.pause_s)
        if self.error:
            error, self.error = self.error, None
            raise error
        deltas = []
        for row in self.rows[: self.max_rows]:
            id = row.left.pop(0)
            row.ids.append(id)
            is_long = len(row.ids) == row.options.max_new_tokens
            row.finish_reason = "length" if is_long else None if row.left else "stop"
            text = self.tokenizer.decode([id])
            deltas.append(Delta(row, text, (Token(id, -0.5, ((id, -0.5),)),), row.finish_reason))  # type: ignore[arg-type]
        self.rows = [row for row in self.rows if row.finish_reason is None]
        return deltas


class _Server(uvicorn.Server):
    """Signals belong to the test, not to the server's thread."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.contextmanager
def served(engine: Any, *, max_waiting: int = 64, prompts: tuple[str, ...] = (), **options: Any) -> Iterator[str]:
    """The base address of a service of `engine`; it has ended when the block has."""
    service = Service(
        "runs-a", Template(engine.tokenizer), Worker(engine, max_waiting=max_waiting), ServeOptions(**options), prompts
    )
    listening = listen("127.0.0.1", 0)
    server = _Server(uvicorn.Config(make_app(service), log_level="warning", timeout_graceful_shutdown=60))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()
