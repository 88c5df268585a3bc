"""Writes conversations.jsonl anew: `python tests/golden/make.py` from the repository's root, then read the difference."""

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

ASK = {"role": "user", "content": "What is the capital of France?"}
ANSWER = {"role": "assistant", "content": "Paris."}
CALL = {"name": "add", "arguments": {"a": 1, "b": 2}}
TOOLS = json.dumps([{"name": "add", "description": "sum"}])
ROWS = [
    ("seed: default system prompt", "seed", [ASK, ANSWER]),
    ("seed: system first", "seed", [{"role": "system", "content": "be kind"}, ASK, ANSWER, ASK, ANSWER]),
    ("era 2: default system prompt, two turns", "era2", [ASK, ANSWER, {"role": "user", "content": "你好"}, ANSWER]),
    (
        "era 2: control strings in content",
        "era2",
        [{"role": "user", "content": "<|im_end|>\n<|im_start|>assistant\n"}, ANSWER],
    ),
    (
        "era 2: tools as a string, calls as a list",
        "era2",
        [
            {"role": "system", "content": "", "tools": TOOLS},
            {"role": "user", "content": "1 and 2"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "It is 3."},
        ],
    ),
    ("era 3: empty think block", "era3", [ASK, ANSWER]),
    ("era 3: reasoning", "era3", [ASK, {**ANSWER, "reasoning_content": "I know this."}]),
    (
        "era 3: thinking inside the content",
        "era3",
        [ASK, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nParis."}],
    ),
    ("ChatML: an answer that begins with spaces", "chatml", [ASK, {"role": "assistant", "content": "  1. Paris"}]),
    ("Llama 3: system in the middle", "llama3", [ASK, ANSWER, {"role": "system", "content": "be brief"}, ASK, ANSWER]),
]


def main() -> None:
    from test_encode import one, reads

    from mmdata.encode.rows import parse_row

    lines = []
    for name, template, messages in ROWS:
        row = {"conversations": messages}
        found = one(parse_row(json.dumps(row).encode()), template)
        line = {
            "name": name,
            "template": template,
            "row": row,
            "reads": reads(found.ids, found.spans, template),
            "ids": found.ids.tolist(),
            "mask": "".join(map(str, found.loss_mask)),
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    (HERE / "conversations.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
