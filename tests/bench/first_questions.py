"""What the demo's model answers to the questions that people type first: `python tests/bench/first_questions.py RUN`.

The 105 questions of first_questions.json were written by someone who had not seen the demo's texts; a test holds that
none of them is trained on. The first 55 were looked at while the demo was tuned, the other 50 were not. A sum counts as right if the answer's last number is the sum; any other question if the
answer is one of the two that the demo teaches for its kind.
"""

import argparse
import json
import re
from collections import Counter
from pathlib import Path

from mmdata.demo import demo_texts
from mmdata.encode.rows import Message
from mmdata.encode.template import Template
from mmdata.tokenizer.tokenizer import Tokenizer
from mmtrain.checkpoint import load_model
from mmtrain.inference.chat import answer_batch

QUESTIONS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
PHRASES = {
    "greeting": ["hello"], "thanks": ["thanks", "bye"], "identity": ["who"], "ability": ["can"], "unknown": ["else"],
}  # fmt: skip


def is_right(question: dict, answer: str) -> bool:
    """Return whether an answer is sensible, and exact where it is a sum."""
    if question["kind"] == "sum":
        return re.findall(r"\d+", answer)[-1:] == [str(question["sum"])]
    phrases = demo_texts().phrases[question["language"]]
    return any(answer.strip() in phrases[name][1:3] for name in PHRASES[question["kind"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    tokenizer = Tokenizer.load(run / "tokenizer")
    asked = [[Message("user", question["ask"])] for question in QUESTIONS]
    answers = answer_batch(load_model(run)[0].eval(), tokenizer, Template(tokenizer), asked, max_new_tokens=48)
    right: Counter[str] = Counter()
    for question, answer in zip(QUESTIONS, answers, strict=True):
        is_good = is_right(question, answer)
        right[question["kind"]] += is_good
        print(f"{'right' if is_good else 'WRONG':5} {question['kind']:8} {question['ask']!r} -> {answer.strip()!r}")
    kinds = Counter(question["kind"] for question in QUESTIONS)
    print(", ".join(f"{kind} {right[kind]} of {number}" for kind, number in kinds.items()))
    print(f"{right.total()} of {len(QUESTIONS)}")


if __name__ == "__main__":
    main()
