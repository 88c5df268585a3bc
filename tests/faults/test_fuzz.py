"""Coverage-guided fuzzing of all that reads foreign input: rows, files, templates, records, Arrow files, requests, conditions.

An input is made from those kept so far: bytes are flipped, removed, doubled, spliced with another's, or a word of the target
comes in. If a line of our code runs that no input before has reached, the new one is kept as well. Whatever the input, the
target gives a result or refuses it by name. `make faults` takes a minute for each target, with the seed that it prints.
"""

import json
import os
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from damage import SEED

from mmdata.encode.columns import read_lines
from mmdata.encode.encoder import RowEncoder
from mmdata.encode.rows import BadRow, parse_row, row_hash
from mmdata.errors import MMError
from mmdata.io.lines import iter_lines
from mmdata.pack.filter.where import Where
from mmdata.shards.dataset import open_dataset, sample_rows, source_rows
from mmdata.tokenizer.tokenizer import Tokenizer
from mmtrain.inference.serve.api import RequestError, chat_request, completion_request
from mmtrain.records import RUN, read_run

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 60  # inputs of each target in `make test`
SECONDS = 60  # for each target in `make faults`
REFUSALS = (MMError, BadRow, RequestError)
JSON = [
    b'"',
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"null",
    b"true",
    b"-1",
    b"1e400",
    b"9" * 30,
    b"\\ud800",
    b"\\u0000",
]
ROWS = [
    b'{"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
    b'{"text": "<|im_start|>\xe4\xbd\xa0\xe5\xa5\xbd"}',
    b'{"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "rejected": [{"role": "user", '
    b'"content": "a"}, {"role": "assistant", "content": "c"}]}',
    b'{"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]], "system": null}',
    b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": null, '
    b'"tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{\\"x\\": 1}"}}], "weight": 0}, {"role": "tool", '
    b'"tool_call_id": "1", "content": "2"}, {"role": "assistant", "content": "b", "reasoning_content": "c"}], "tools": []}',
    b'{"chosen": "\\n\\nHuman: a\\n\\nAssistant: b", "rejected": "\\n\\nHuman: a\\n\\nAssistant: c"}',
]


@dataclass
class Target:
    """What is fuzzed. use: called with each input. seeds: the first inputs. words: that may come in."""

    use: Callable[[bytes], Any]
    seeds: list[bytes]
    words: list[bytes] = field(default_factory=list)


def mutated(kept: list[bytes], words: list[bytes], draw: random.Random) -> bytes:
    data = bytearray(draw.choice(kept))
    for _ in range(draw.randint(1, 4)):
        begin, end = sorted(draw.randrange(len(data) + 1) for _ in range(2))
        end = min(end, begin + 40)
        match draw.randrange(6):
            case 0:
                del data[begin:end]
            case 1:
                data[begin:begin] = data[begin:end] * draw.randint(1, 20)
            case 2:
                other = draw.choice(kept)
                data[begin:end] = other[draw.randrange(len(other) + 1) :][: draw.randint(1, 60)]
            case 3 if data:
                data[min(begin, len(data) - 1)] ^= 1 << draw.randrange(8)
            case _:
                data[begin : draw.choice((begin, end))] = draw.choice(words or [b"\0"])
    return bytes(data[:20_000])


def fuzz(target: Target) -> int:
    """Use mutated inputs; return how many of them reached something new."""
    draw, kept, reached = random.Random(SEED), list(target.seeds), set()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith((f"{ROOT}/mmdata", f"{ROOT}/mmtrain")):
            return None
        reached.add((frame.f_code, frame.f_lineno))
        return trace

    def use(data: bytes) -> bool:
        before, old = len(reached), sys.gettrace()
        sys.settrace(trace)
        threading.settrace(trace)
        try:
            target.use(data)
        except REFUSALS as refused:
            assert str(refused)
        except BaseException as error:
            raise AssertionError(f"FAULTS_SEED={SEED}: {data[:3000]!r}") from error
        finally:
            sys.settrace(old)
            threading.settrace(old)  # type: ignore[arg-type]
        return len(reached) > before

    for seed in target.seeds:
        use(seed)
    end = time.monotonic() + SECONDS
    is_thorough = "FAULTS_SEED" in os.environ
    rounds = 0
    while time.monotonic() < end if is_thorough else rounds < ROUNDS:
        rounds += 1
        data = mutated(kept, target.words, draw)
        if use(data):
            kept.append(data)
    return len(kept) - len(target.seeds)


def test_rows() -> None:
    def use(data: bytes) -> None:
        at, columns = read_lines([data], "conversation")
        try:
            row = parse_row(data)
        except BadRow:
            assert not len(at)
            raise
        if len(at):
            assert columns.hashes()[0].tobytes() == row_hash(row)

    words = [
        *JSON,
        b'"role"',
        b'"content"',
        b'"assistant"',
        b'"weight"',
        b'"tool_calls"',
        b'"prompt"',
        b'"text"',
        b'"history"',
    ]
    assert fuzz(Target(use, ROWS, words)) > 0


def test_files(tmp_path: Path) -> None:
    import gzip
    import io
    import zipfile

    import polars as pl

    def use(data: bytes) -> None:
        for name in ("rows.jsonl", "rows.json", "rows.csv", "rows.parquet"):
            path = tmp_path / name
            path.write_bytes(data)
            for line in iter_lines(path):
                try:
                    parse_row(line.raw)
                except BadRow:
                    continue

    zipped, parquet, arrow = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr("rows.jsonl", ROWS[0])
    frame = pl.DataFrame({"prompt": ["a", "b"], "completion": ["c", None], "n": [1, 2]})
    frame.write_parquet(parquet)
    frame.write_ipc(arrow)
    text = b"\n".join(ROWS)
    seeds = [text, b"[" + b",".join(ROWS) + b"]", gzip.compress(text, mtime=0), zipped.getvalue(), parquet.getvalue()]
    seeds += [arrow.getvalue(), b"prompt,completion\na,b\n", text.decode().encode("utf-16")]
    assert fuzz(Target(use, seeds, [*JSON, b"\n", b"\r\n", b"\xef\xbb\xbf", b"\x1f\x8b", b"PK\x03\x04", b"PAR1"])) > 0


def test_templates(tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MM_TEMPLATE_SECONDS", "0.5")
    directory = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_dir, directory)
    config = directory / "tokenizer_config.json"
    values = json.loads(config.read_text())

    def use(data: bytes) -> None:
        config.write_text(json.dumps(values | {"chat_template": data.decode("utf-8", "replace")}))
        RowEncoder(Tokenizer.load(directory), max_len=64).encode_lines(ROWS[:1], "conversation")

    words = [
        b"{{",
        b"}}",
        b"{%",
        b"%}",
        b"message",
        b"content",
        b"| tojson",
        b"| trim",
        b"loop.last",
        b"namespace()",
        b"[-1]",
    ]
    words += [
        b"{% if ",
        b"{% endif %}",
        b"{% for m in messages %}",
        b"{% endfor %}",
        b"* 10 ** 9",
        b"is defined",
        b"raise_exception('x')",
    ]
    simple = b"{% for m in messages %}{{ m.role + '\\n' + m.content }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant\\n' }}{% endif %}"
    assert fuzz(Target(use, [values["chat_template"].encode(), simple], words)) > 0


@pytest.mark.parametrize("name", ["manifest.json", "train", "sources"])
def test_datasets(packed: "dict[str, Any]", tmp_path: Path, name: str) -> None:
    """Bytes of the manifest, a shard and a file of sources; those of Arrow with the hash that fits, as a stranger may send them."""
    from mmdata.io.files import sha256_of

    whole = packed["conversation"].out
    small = tmp_path / "small"
    shutil.copytree(whole, small)
    path = small / name if name.endswith(".json") else next((small / name).rglob("*.arrow"))
    manifest = small / "manifest.json"
    text, before = manifest.read_text(), sha256_of(path)

    def use(data: bytes) -> None:
        path.write_bytes(data)
        if path != manifest:
            manifest.write_text(_without_seal(text).replace(before, sha256_of(path)))
        dataset = open_dataset(small)
        assert sample_rows(dataset, "train", 0) and list(source_rows(dataset))

    assert fuzz(Target(use, [path.read_bytes()], JSON)) >= 0


def _without_seal(text: str) -> str:
    values = json.loads(text)
    values.pop("record_sha256", None)
    return json.dumps(values)


def test_records_of_runs(runs: Path, tmp_path: Path) -> None:
    content = (runs / "sft" / RUN).read_bytes()

    def use(data: bytes) -> None:
        (tmp_path / RUN).write_bytes(data)
        read_run(tmp_path)

    assert fuzz(Target(use, [content, _without_seal(content.decode()).encode()], JSON)) > 0


def test_requests() -> None:
    import msgspec

    chat = b'{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "temperature": 0.5, "stop": ["x"], "logit_bias": {"5": 1}}'
    tools = b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "tools": [{"type": "function", "function": {"name": "f"}}]}'
    schema = b'{"prompt": ["a", "b"], "n": 2, "logprobs": 3, "seed": 1, "stream": true, "response_format": {"type": "json_object"}}'

    def use(data: bytes) -> None:
        try:
            body = msgspec.json.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return
        for read in (chat_request, completion_request):
            try:
                read(body, ["m"])
            except RequestError as refused:
                assert 400 <= refused.status < 500 and str(refused)

    words = [
        *JSON,
        b'"tools"',
        b'"n"',
        b'"top_p"',
        b'"response_format"',
        b'"json_schema"',
        b'"stream_options"',
        b'"tool_choice"',
    ]
    assert fuzz(Target(use, [chat, tools, schema], words)) > 0


def test_conditions() -> None:
    words = [
        b"characters",
        b"language",
        b"'",
        b"(",
        b")",
        b" and ",
        b" between ",
        b" in ",
        b"avg(",
        b"::",
        b" over ",
        b";",
        b"--",
        b"9" * 40,
    ]
    words += [
        b"select ",
        b" case when ",
        b" end",
        b" like ",
        b"[",
        b"*",
        b"\\",
        b"null",
        b"interval '1 day'",
        b"cast(",
        b" as int)",
    ]
    seeds = [
        b"language = 'Chinese' and characters between 20 and 2000",
        b"not has_tools and repeated < 0.3 or file like '%x'",
        b"characters > 2 * avg(characters)",
        b"kind in ('pair', 'document')",
    ]
    assert fuzz(Target(lambda data: Where(data.decode("utf-8", "replace")), seeds, words)) >= 0
