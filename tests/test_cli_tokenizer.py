"""`mm tokenizer …` as a person runs it: from jsonl to a tokenizer that packs, and every mistake answered in two lines."""

import json
from pathlib import Path

import pytest
from command_line import Run, fine, refused


def test_what_comes_after_training_reads_the_files_in_the_same_way(home: Path, mm: Run) -> None:
    (home / "data/faq.csv").write_text("ask,reply\n" + "".join(f"What is {n}?,It is {n}.\n" for n in range(200)))
    line = "tokenizer train data/faq.csv --map prompt=ask --map completion=reply --vocab-size 300 --out data/mine"
    following = fine(mm(line)).err.split("next: mm ")[1].split("    or    mm ")
    assert [fine(mm(each)).code for each in following] == [0, 0]


@pytest.fixture
def trained(home: Path, mm: Run) -> Path:
    """data/tokenizer-300, trained as a user would."""
    ran = fine(mm("tokenizer train --vocab-size 300 --quiet"))
    assert "wrote data/tokenizer-300: 300 tokens" in ran.out and "next: mm tokenizer eval" in ran.err
    return home / "data" / "tokenizer-300"


def test_a_trained_tokenizer_is_evaluated_checked_compared_and_packs(trained: Path, mm: Run) -> None:
    assert "is up to date" in fine(mm("tokenizer train --vocab-size 300")).out
    ran = fine(mm("tokenizer eval data/tokenizer data/tokenizer-300 --html page.html --lang zh"))
    assert "分词器" in Path("page.html").read_text(encoding="utf-8") and "report: page.html" in ran.err
    assert "bytes per token" in ran.out and "tokenizer-300" in ran.out and "hostile strings changed" in ran.out
    figures = json.loads(fine(mm("tokenizer eval data/tokenizer-300 --data data/dpo.jsonl --json")).out)
    assert figures["tokenizers"][0]["vocab_size"] == 300 and set(figures["tokenizers"][0]["embedding"]) >= {"minimind2"}
    assert "0 errors" in fine(mm("tokenizer check data/tokenizer-300 --model minimind3")).out
    assert fine(mm("tokenizer compare data/tokenizer data/tokenizer-300")).out.startswith("No: ")
    assert json.loads(fine(mm("tokenizer compare data/tokenizer data/tokenizer --json")).out)["may_read"]
    fine(mm("pack data/sft_512.jsonl --tokenizer data/tokenizer-300"))


def test_show_and_extend(trained: Path, mm: Run) -> None:
    shown = fine(mm("tokenizer show data/tokenizer-300 'one and two'"))
    assert "␣and" in shown.out and "11 bytes" in shown.err
    assert (
        json.loads(fine(mm("tokenizer show data/tokenizer-300 --from 2 --count 1 --json")).out)[0]["text"]
        == "<|im_end|>"
    )
    assert "⏎" in fine(mm("tokenizer show data/tokenizer-300 --count 300")).out
    ran = fine(mm("tokenizer extend data/tokenizer-300 --add '<a>' --add '<b>' --out data/more"))
    assert "<a> is 300, <b> is 301" in ran.out and "--resize-embeddings" in ran.err
    assert "2 more" in fine(mm("tokenizer compare data/tokenizer-300 data/more")).out
    refused(mm("tokenizer extend data/tokenizer-300 --add '<a>' --out data/more"), "is not empty", "--out")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("tokenizer train none.jsonl", ["none.jsonl: no such file"]),
        ("tokenizer train --vocab-size 10", ["--vocab-size 10", "leave no room"]),
        ("tokenizer train --algorithm magic", ["--algorithm magic"]),
        ("tokenizer train --weight assistant", ["--weight 'assistant' is not NAME=NUMBER"]),
        ("tokenizer train --weight nobody=2", ["--weight nobody", "fields are"]),
        ("tokenizer train -", ["can be read only once"]),
        ("tokenizer train --out data", ["data exists and was not trained"]),
        ("tokenizer eval nowhere", ["nowhere is not a directory"]),
        ("tokenizer eval data/tokenizer --limit-bytes 0", ["--limit-bytes 0"]),
        ("tokenizer eval data/tokenizer --batch-tokens -1", ["--batch-tokens -1"]),
        ("tokenizer eval data/tokenizer --lang fr", ["--lang fr"]),
        ("tokenizer compare data/tokenizer nowhere", ["nowhere is not a directory"]),
        ("tokenizer check nowhere", ["nowhere is not a directory"]),
        ("tokenizer check data/tokenizer --model huge", ["--model huge is unknown"]),
        ("tokenizer show data/tokenizer --from 99999", ["has ids 0 to"]),
        ("tokenizer show data/tokenizer --control", ["--control needs TEXT"]),
        ("tokenizer show data/tokenizer hello --find x", ["--from and --find"]),
        ("tokenizer extend data/tokenizer --add '<|im_end|>' --out data/x", ["has it already"]),
    ],
)
def test_mistakes_are_answered_with_what_helps(home: Path, mm: Run, line: str, words: list[str]) -> None:
    refused(mm(line), *words)
