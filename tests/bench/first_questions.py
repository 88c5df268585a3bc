"""What the demo's model answers to the questions that people type first: `python tests/bench/first_questions.py RUN`.

A test holds that none of first_questions.json is trained on. Its sets: "tuned" was looked at while the demo's texts were
written, "unseen" was written by someone who had not seen them and never looked at, "final" was written after the last
change of the wordings, before the run that was measured, and "fresh" after every change of the data and the recipe, by
two who had seen neither. A sum counts as right if the answer's last number is the sum; any other question if the answer
is one of the two that the demo teaches for its kind. "Can you …?" may be answered with what the model can do or with
that it does not know, and a question in both languages, or in neither, in either.
"""

import argparse
import json
import re
from collections import Counter
from pathlib import Path

from mmdata.demo.items import LANGUAGES, demo_texts
from mmdata.encode.rows import Message
from mmdata.encode.template import Template
from mmdata.tokenizer.tokenizer import Tokenizer
from mmtrain.checkpoint import load_model
from mmtrain.inference.chat import answer_batch

QUESTIONS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
PHRASES = {
    "greeting": ["hello"], "thanks": ["thanks", "bye"], "identity": ["who"], "ability": ["can"], "unknown": ["else"],
}  # fmt: skip
CAN_YOU = re.compile(r"(can|could|would) you |你(会|能|可以)", re.IGNORECASE)


def is_right(question: dict, answer: str) -> bool:
    """Return whether an answer is sensible, and exact where it is a sum."""
    if question["kind"] == "sum":
        return re.findall(r"\d+", answer)[-1:] == [str(question["sum"])]
    names, ask = PHRASES[question["kind"]], question["ask"]
    if CAN_YOU.match(ask) and question["kind"] in ("ability", "unknown"):
        names = ["can", "else"]
    is_english, is_chinese = re.search("[a-z]", ask, re.IGNORECASE), re.search("[\u4e00-\u9fff]", ask)
    languages = LANGUAGES if bool(is_english) == bool(is_chinese) else [question["language"]]
    phrases = demo_texts().phrases
    return any(answer.strip() in phrases[language][name][1:3] for language in languages for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    tokenizer = Tokenizer.load(run / "tokenizer")
    asked = [[Message("user", question["ask"])] for question in QUESTIONS]
    answers = answer_batch(load_model(run)[0].eval(), tokenizer, Template(tokenizer), asked, max_new_tokens=48)
    asked_of, right_of = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for question, answer in zip(QUESTIONS, answers, strict=True):
        is_good = is_right(question, answer)
        key = question["set"], question["kind"]
        asked_of[key] += 1
        right_of[key] += is_good
        print(f"{'right' if is_good else 'WRONG':5} {' '.join(key):16} {question['ask']!r} -> {answer.strip()!r}")
    for name in dict(asked_of):
        print(f"{' '.join(name)}: {right_of[name]} of {asked_of[name]}")
    for name in ("tuned", "unseen", "final", "fresh"):
        right, asked_all = (sum(n for key, n in counts.items() if key[0] == name) for counts in (right_of, asked_of))
        print(f"{name}: {right} of {asked_all}")


if __name__ == "__main__":
    main()
