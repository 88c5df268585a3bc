"""What a terminal's encoding lacks is replaced, and an argument that is not UTF-8 is one error; nothing is a traceback."""

import io
import json
import os
import re
import sys
from contextlib import nullcontext
from pathlib import Path

import eras
import pytest
from command_line import Ran, Run, refused
from rich.cells import cell_len
from waiting import wait_until

import cli
from mmdata.commands import terminal
from mmdata.commands.terminal import json_text, print_styled, result, say

OWL = "🦉 皮姆 é"


def written(monkeypatch: pytest.MonkeyPatch, encoding: str, errors: str = "strict") -> io.BytesIO:
    """Make stdout and stderr one stream in an encoding, and prepare it as `mm` does. Return what is written."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, errors=errors, write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    cli.replace_unknown_characters()
    return raw


@pytest.mark.parametrize(
    ("encoding", "shown"), [("gbk", "? 皮姆 é"), ("ascii", "? ?? ?"), ("latin-1", "? ?? é"), ("utf-8", OWL)]
)
def test_characters_that_the_terminal_lacks_are_replaced(
    monkeypatch: pytest.MonkeyPatch, encoding: str, shown: str
) -> None:
    raw = written(monkeypatch, encoding)
    result(OWL)
    say(OWL)
    print_styled([(OWL, "green", f"⟦{OWL}⟧")])
    lines = raw.getvalue().decode(encoding).splitlines()
    assert lines[:2] == [shown, shown] and shown in lines[2]
    assert json.loads(json_text({"text": OWL})) == {"text": OWL} and json_text(OWL).isascii() == (encoding != "utf-8")


def test_lone_surrogates_are_replaced_in_a_unicode_terminal_too(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = written(monkeypatch, "utf-8")
    result("a\udcff")
    assert raw.getvalue() == b"a?\n"


def test_show_of_an_owl_in_gbk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"conversations": [{"role": "user", "content": OWL}, {"role": "assistant", "content": "฿"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    raw = written(monkeypatch, "gbk")
    command = ["mm", "show", str(tmp_path / "rows.jsonl"), "--tokenizer", str(eras.directory("chatml"))]
    for more in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", [*command, *more])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
    assert "? 皮姆 é" in raw.getvalue().decode("gbk")


@pytest.mark.parametrize("argument", [b"a\xff", b"\xe7\x9a", b"--text=\xff", b"--\xff", b"\xff=/"])
def test_an_argument_that_is_not_utf_8_is_one_line(argument: bytes, mm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    surrogates = argument.decode("utf-8", "surrogateescape")
    ran: Ran = refused(mm(f"tokenizer show {eras.directory('chatml')} {surrogates}"), "argument 4 is not valid UTF-8")
    assert argument.decode("utf-8", "backslashreplace") in ran.err


@pytest.mark.parametrize(("argument", "starts"), [("你好".encode(), 1), (b"\xff\xfe", 0), (b"hello", 0)])
def test_utf_8_in_a_c_locale_is_read_in_utf_8_mode(
    argument: bytes, starts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[list[str]] = []
    word = argument.decode("ascii", "surrogateescape")
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    monkeypatch.setattr(sys, "argv", ["mm", "chat", word])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "cli", "chat", word])
    monkeypatch.setattr(os, "execv", lambda _, words: begun.append(words))
    monkeypatch.setenv("PYTHONUTF8", "0")
    terminal.take_arguments_as_utf8()
    assert begun == [[sys.executable, "-X", "utf8", "-m", "cli", "chat", word]] * starts
    assert os.environ["PYTHONUTF8"] == str(starts)


def test_the_path_of_a_file_may_be_any_bytes(tmp_path: Path, mm: Run) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl")
    Path(path).write_text('{"text": "a"}\n')
    assert mm(f"validate {path}").code == 0


class Screen(io.StringIO):
    """A terminal that keeps what is written."""

    def isatty(self) -> bool:
        return True


def test_on_a_terminal_a_line_says_that_it_works_until_the_first_output(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = Screen(), Screen()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(terminal, "WORKING_S", 0.0)
    with terminal.working():
        wait_until(lambda: err.getvalue().startswith("\rworking, 0 s"))
        result("a")
        say("b")
    assert out.getvalue() == "a\n" and "\r\033[2K" in err.getvalue()
    begin = len(err.getvalue())
    say("c")
    assert err.getvalue()[begin:] == "c\n"


@pytest.mark.parametrize(("flags", "times"), [("", 1), ("-q", 0), ("--json", 0)])
def test_a_quiet_command_does_not_say_that_it_works(
    flags: str, times: int, mm: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    monkeypatch.setattr(terminal, "working", lambda: nullcontext(begun.append(1)))
    mm(f"tokenizer show {eras.directory('chatml')} abc {flags}")
    assert len(begun) == times


def test_a_block_that_takes_long_says_what_it_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(terminal, "say", said.append)
    with terminal.waiting("hub.example"):
        pass
    monkeypatch.setattr(terminal, "WORKING_S", 0)
    with terminal.waiting("hub.example", quiet=True), terminal.waiting("a.example"):
        wait_until(lambda: said)
    assert said == ["waiting for a.example"]


def test_a_table_too_wide_for_the_terminal_keeps_its_figures_whole(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("a run of a name", "x" * 40, *(10**9 + n for n in range(6)), "█" * 9)]
    terminal.table("", ["run", "text", *["steps of an epoch"] * 6, ""], rows)
    out = capsys.readouterr().out
    assert "█" not in out and max(map(len, out.splitlines())) <= terminal.PIPE_WIDTH
    assert all(f"{10**9 + n:,}" in out for n in range(6))


@pytest.mark.parametrize(
    "text", ["学习语言模型，需要数据。" * 20, "例如 hello，世界 " * 30, "word " * 50, "한국어 문장 " * 30]
)
def test_lines_on_a_terminal_are_wrapped_by_cells(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wide character takes two cells. No character is lost, and no line begins with a comma."""
    from mmtrain.log.console import Console, print_line

    for write, stream in ((result, "stdout"), (say, "stderr"), (print_line, "stderr")):
        screen = Screen()
        monkeypatch.setattr(sys, stream, screen)
        monkeypatch.setattr(terminal.shutil, "get_terminal_size", lambda: os.terminal_size((80, 24)))
        write(text)
        lines = screen.getvalue().splitlines()
        assert len(lines) > 1 and all(60 < cell_len(line) <= 80 for line in lines[:-1]) and cell_len(lines[-1]) <= 80
        assert re.sub(r"\s", "", "".join(lines)) == re.sub(r"\s", "", text)
        assert not any(line.lstrip().startswith(("，", "。")) for line in lines)
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    Console(print, is_live=True).live(lambda: text)
    assert 60 < cell_len(screen.getvalue()) < 80


def test_a_long_path_stays_whole_to_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, path = Screen(), "/" + "a-long-name/" * 20
    monkeypatch.setattr(sys, "stderr", screen)
    say(f"written to {path} now")
    assert path in screen.getvalue().splitlines()[1].split()


def test_a_long_text_of_a_table_is_cut_by_cells() -> None:
    assert cell_len(terminal._one_line("数据" * 99)) in (terminal.CELL_WIDTH - 1, terminal.CELL_WIDTH)
    assert terminal._one_line("数据" * 25) == "数据" * 25 and terminal._one_line("a " * 99).endswith("…")
