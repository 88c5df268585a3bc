"""At a terminal and through a pipe: commands do what they say, thinking stands apart, stdout holds the answers alone."""

import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import warm
from foreign import NORMED, make_tokenizer, weights
from waiting import LONG_S

from mmdata.encode.rows import Conversation, Message, parse_row
from mmdata.encode.template import Template
from mmdata.errors import CheckpointError, UsageError
from mmtrain.commands.chat import Session, Speaker, chat, newest_finished_run, piped_lines
from mmtrain.commands.serve import serve
from mmtrain.convert.foreign import import_model, open_model
from mmtrain.inference.chat import Chat
from mmtrain.inference.settings import Sampling, ServeOptions

ROOT = Path(__file__).resolve().parent.parent
THOUGHT = "<think>\nhm\n</think>\n\nIt is 3."
CALLS = 'I look.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


class Scripted:
    """Says what it is told, in pieces of three characters; remembers the seeds it was asked with."""

    def __init__(self, *texts: str, opening: str = ""):
        self.texts, self.opening = list(texts), opening
        self.messages: list[Message] = []
        self.seeds: list[int] = []
        self.row = SimpleNamespace(ids=[1, 2], finish_reason="stop")

    def ask(self, text: str, options: Sampling, *, think: bool | None = None) -> Generator[str, None, None]:
        self.seeds.append(options.seed)
        said = self.texts[(len(self.seeds) - 1) % len(self.texts)]
        yield from (said[i : i + 3] for i in range(0, len(said), 3))
        self.messages += [Message("user", text), Message("assistant", self.opening + said)]


def session(*chats: Any, **options: Any) -> Session:
    speakers = [Speaker(f"model {i}", chat) for i, chat in enumerate(chats)]
    return Session(speakers, Sampling(seed=5), **options)


def test_what_is_loaded_is_said_before_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loading: list[str] = []

    def load(*_: Any, **__: Any) -> None:
        loading.append(capsys.readouterr().err)
        raise UsageError("enough", "")

    monkeypatch.setattr("mmtrain.commands.chat.open_speaker", load)
    monkeypatch.setattr("mmtrain.commands.chat.newest_finished_run", lambda *_: Path("runs/newest"))
    monkeypatch.setattr("mmtrain.convert.foreign.open_model", load)
    with pytest.raises(UsageError, match="enough"):
        chat([Path("runs/a"), Path("b.pth")], compare=True)
    with pytest.raises(UsageError, match="enough"):
        chat()
    with pytest.raises(UsageError, match="enough"):
        serve(Path("runs/a"), options=ServeOptions())
    assert loading == ["loading runs/a and b.pth\n", "loading runs/newest\n", "loading runs/a\n"]


@pytest.mark.parametrize(
    ("status", "fix"),
    [("interrupted", "mm chat runs/cut"), ("running", "mm demo")],
    ids=["interrupted", "no checkpoint"],
)
def test_where_no_run_is_finished_an_interrupted_one_is_named(
    status: str, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/cut").mkdir(parents=True)
    (tmp_path / "runs/cut/run.json").write_text(json.dumps({"stage": "sft", "status": status, "ended": 1.0}))
    with pytest.raises(CheckpointError, match="no finished run") as refused:
        newest_finished_run("chat", ("sft",))
    assert fix in refused.value.fix


def test_words_go_to_stdout_and_thinking_beside_them(capsys: pytest.CaptureFixture[str]) -> None:
    session(Scripted(THOUGHT)).ask("1 + 2?")
    out, err = capsys.readouterr()
    assert (out, err) == ("It is 3.\n", "thinking: hm\n")


def test_a_think_block_the_template_opened_is_thinking_too(capsys: pytest.CaptureFixture[str]) -> None:
    session(Scripted(THOUGHT.removeprefix("<think>\n"), opening="<think>\n")).ask("1 + 2?")
    out, err = capsys.readouterr()
    assert (out, err) == ("It is 3.\n", "thinking: hm\n")


def test_a_tool_call_has_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    session(Scripted(CALLS)).ask("1 + 2?")
    assert capsys.readouterr().out == 'I look.\ntool call: add {"a": 1}\n'


def test_json_has_the_parts_of_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    talk = session(Scripted(THOUGHT, CALLS), is_json=True)
    talk.run(iter(["a", "b"]), is_lenient=False)
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["prompt"], first["answer"], first["reasoning"], first["finish_reason"]) == (
        "a",
        "It is 3.",
        "hm",
        "stop",
    )
    assert second["tool_calls"] == [{"name": "add", "arguments": '{"a": 1}'}]


def test_several_models_answer_the_same_questions(capsys: pytest.CaptureFixture[str]) -> None:
    talk = session(Scripted("one"), Scripted("two"))
    talk.ask("which?")
    assert capsys.readouterr().out == "== model 0\none\n== model 1\ntwo\n"
    talk.is_json = True
    talk.ask("which?")
    assert json.loads(capsys.readouterr().out)["answers"]["model 1"]["answer"] == "two"


def test_commands_forget_set_the_system_prompt_and_ask_again(capsys: pytest.CaptureFixture[str]) -> None:
    chat = Scripted("first", "second", "third")
    talk = session(chat)
    talk.run(
        iter(["hello", "/regen", "/regen", "/system Be kind.", "again", "/reset", "/quit", "never"]), is_lenient=False
    )
    assert capsys.readouterr().out == "first\nsecond\nthird\nfirst\n"
    assert chat.seeds == [5, 6, 7, 7]
    assert chat.messages == [Message("system", "Be kind.")]


def test_a_saved_conversation_is_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "said.jsonl"
    talk = session(Scripted(THOUGHT, CALLS), system="Be kind.")
    talk.run(iter(["a", "你好", f"/save {path}"]), is_lenient=False)
    row = parse_row(path.read_bytes())
    assert isinstance(row, Conversation)
    assert [message.role for message in row.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert (row.messages[2].content, row.messages[2].reasoning_content) == ("It is 3.", "hm")
    assert row.messages[3].content == "你好"


@pytest.mark.parametrize(
    ("line", "reason"),
    [("/what", "/what is no command"), ("/regen", "no answer yet"), ("/save x.jsonl", "nothing to save")],
)
def test_what_cannot_be_done_is_said_and_at_a_terminal_ends_nothing(
    line: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match=reason):
        session(Scripted("x")).run(iter([line]), is_lenient=False)
    session(Scripted("x")).run(iter([line, "still there?"]), is_lenient=True)
    out, err = capsys.readouterr()
    assert out == "x\n"
    assert reason in err


def test_a_pipe_may_hold_any_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("你好 \n\n".encode() + b"ok\xff\n")))
    assert list(piped_lines()) == ["你好", "", "ok\ufffd"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    make_tokenizer(root / "tokenizer")
    torch.save(weights(NORMED), root / "model.pth")
    import_model(root / "model.pth", root / "run")
    return root / "run"


def test_a_model_that_knows_no_turns_goes_on_with_the_text(run: Path) -> None:
    model, tokenizer = open_model(run)
    chat = Chat(model, tokenizer, None)
    "".join(chat.ask("Where", Sampling(max_new_tokens=2)))
    "".join(chat.ask("Where does", Sampling(max_new_tokens=2)))
    assert chat.row is not None
    assert chat.row._prompt == [tokenizer.bos_id, *tokenizer.encode_batch(["Where does"])[0].tolist()]


def test_an_answer_cut_short_stays_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = open_model(run)
    chat = Chat(model, tokenizer, Template(tokenizer))
    step, count = chat.engine.step, 0

    def interrupted() -> Any:
        nonlocal count
        count += 1
        if count == 6:
            raise KeyboardInterrupt
        return step()

    chat.engine.step = interrupted  # type: ignore[method-assign]
    talk = Session([Speaker("m", chat)], Sampling(max_new_tokens=50))
    talk.ask("Hi")
    assert chat.messages[-1].role == "assistant"
    assert capsys.readouterr().out.strip() == chat.messages[-1].content.strip()
    chat.engine.step = step  # type: ignore[method-assign]
    talk.ask("And?")
    assert len(chat.messages) == 4


def test_at_a_terminal_lines_are_edited_and_chinese_is_taken(run: Path) -> None:
    """Typed through a pseudo-terminal: a character deleted, Chinese text, a command, the end."""
    master, slave = pty.openpty()
    command = [
        *warm.command(),
        "-c",
        "import cli; cli.main()",
        "chat",
        str(run),
        "--max-new-tokens",
        "3",
        "--temperature",
        "0",
    ]
    environment = {**os.environ, "TERM": "xterm", "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, stdin=slave, stdout=slave, stderr=subprocess.PIPE, env=environment, text=False
    ) as process:
        os.close(slave)
        os.write(master, "皮姆x\x7f在哪里？\r".encode())
        os.write(master, b"/system Be kind\r/nonsense\r/quit\r")
        assert process.stderr is not None
        err = process.stderr.read().decode()
        assert process.wait(timeout=LONG_S) == 0
    shown = b""
    while True:
        try:
            shown += os.read(master, 4096)
        except OSError:
            break
        if not shown:
            break
    os.close(master)
    assert "皮姆" in shown.decode(errors="replace")
    assert "system prompt: Be kind" in err
    assert "/nonsense is no command" in err
