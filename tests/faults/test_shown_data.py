"""What a terminal shows of data is data: no control character of a row, a name or a template reaches it."""

import json
from pathlib import Path

import pytest
from command_line import Run

from mmdata.errors import shown

EVIL = "a\x1b[31mred\x1b]0;title\x07\x9b2J\r\x08\x7f‮back⁦"
CONTROL = set("\x1b\x07\x9b\r\x08\x7f‮⁦")


def test_control_characters_become_escapes_and_other_text_stays() -> None:
    assert shown("\x1b[2J\r\x9b‮\0") == "\\x1b[2J\\r\\x9b\\u202e\\x00"
    text = "tabs\tand\nnewlines, 灯塔, é, 🙂, ⟦marks⟧"
    assert shown(text) == text


@pytest.fixture
def evil(home: Path) -> Path:
    """A file, of a name with escapes, of good and bad rows with escapes."""
    rows = [
        {"conversations": [{"role": "user", "content": EVIL}, {"role": "assistant", "content": EVIL}]},
        {"conversations": [{"role": EVIL, "content": "x"}], EVIL: 1},
        {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], EVIL: 1},
    ]
    path = home / "data" / "evil\x1b[31m.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"text": "\x1b[31m\n')
    return path


def test_commands_show_no_control_characters_of_data(mm: Run, evil: Path) -> None:
    name = f"'{evil}'"
    commands = [
        f"show {name}",
        f"show {name} --index 1",
        f"show {name} --index 3",
        f"validate {name}",
        f"validate {name}.gone",
        f"stats {name}",
        f"pack {name} --max-bad 0",
        f"pack {name} --out shards/evil --max-bad 100% --no-report",
        "show shards/evil",
    ]
    texts = []
    for command in commands:
        ran = mm(command)
        assert "Traceback" not in ran.err
        assert not CONTROL & set(ran.out + ran.err), (command, ran.out + ran.err)
        texts.append(ran.out + ran.err)
    assert "\\x1b[31mred" in texts[0] and "\\x1b[31m.jsonl" in texts[3]
