"""What a model says to fixed prompts, so that one sees it learn to speak: RUN/samples.jsonl, a line a prompt and validation.

Greedy, through the KV cache, a few tokens each: no random state is touched, and a run with samples steps like one without.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdata.encode.template import Message, Template
from mmdata.tokenizer.tokenizer import Tokenizer
from mmtrain.inference.engine import Engine
from mmtrain.inference.sampling import Sampling
from mmtrain.model.model import Model

FILE = "samples.jsonl"
NEW_TOKENS = 40
BEGINNINGS = ("The sun", "Once upon a time", "人工智能", "在一个")  # for pretraining: to go on from
QUESTIONS = ("Who are you?", "What is 3 + 4?", "你好，请介绍一下你自己。", "为什么天空是蓝色的？")


def say(model: Model, tokenizer: Tokenizer, stage: str) -> list[dict[str, str]]:
    """{"prompt", "text"} for each fixed prompt: continued after pretraining, answered after sft and dpo."""
    if stage == "pretrain":
        begin = [tokenizer.bos_id] if tokenizer.bos_id is not None else []
        prompts, asked = BEGINNINGS, [begin + tokenizer.encode_batch([text])[0].tolist() for text in BEGINNINGS]
    else:
        template = Template(tokenizer)
        prompts = QUESTIONS
        asked = [template.prompt_ids(tokenizer, [Message("user", text)]) for text in QUESTIONS]
    engine = Engine(model, tokenizer)
    rows = [engine.submit(ids, Sampling(max_new_tokens=NEW_TOKENS)) for ids in asked]
    while not engine.is_idle:
        engine.step()
    return [{"prompt": prompt, "text": row.text} for prompt, row in zip(prompts, rows, strict=True)]


def keep(run_dir: Path, step: int, said: Sequence[dict[str, str]]) -> None:
    """Append what was said at a step."""
    with (run_dir / FILE).open("a", encoding="utf-8") as file:
        for one in said:
            file.write(json.dumps({"step": step, **one}, ensure_ascii=False) + "\n")


def cut_after(run_dir: Path, step: int) -> None:
    """Drop what was said, and the events, after a step: a resumed run says it again."""
    for name in (FILE, "events.jsonl"):
        path = run_dir / name
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)  # of bytes: a text may hold U+2028
            path.write_bytes(b"".join(line for line in lines if _step_of(line) <= step))


def _step_of(line: bytes) -> float:
    try:
        found: Any = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # torn
    return found
