"""mm's tokenizer against others on text it did not see; training time and memory against the library called directly.

    python tests/bench/tokenizer.py held-out --dataset DIR --tokenizers DIR [DIR …]
    python tests/bench/tokenizer.py train --dataset DIR [--megabytes 100] [--text FILE] [--repeat 2]
    python tests/bench/tokenizer.py round-trip --dataset DIR [--strings 100000]

DIR of --dataset holds jsonl files. held-out: every text goes to one half by its hash, so that the same text is never in both;
mm trains on one half, all are measured on the other. train: the files' rows, letters swapped here and there so that words are
new, up to that size; the peer reads rows with json and hands their texts to `tokenizers`, with the same pattern, vocabulary
and special tokens. Both train on the same text: what rows say, tools and calls included, each once. round-trip: a tokenizer trained here, on hostile strings; transformers loads it and gives ids.
"""

import argparse
import hashlib
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import tokenizers  # noqa: E402

from mmdata.encode.rows import BadRow, parse_row  # noqa: E402
from mmdata.io.lines import iter_lines  # noqa: E402
from mmdata.tokenizer.hostile import hostile_strings  # noqa: E402
from mmdata.tokenizer.tokenizer import Tokenizer  # noqa: E402
from mmdata.tokenizer.toolkit.evaluate import evaluate  # noqa: E402
from mmdata.tokenizer.toolkit.layouts import LAYOUTS  # noqa: E402
from mmdata.tokenizer.toolkit.options import TokenizerOptions  # noqa: E402
from mmdata.tokenizer.toolkit.sample import draw, fields_of  # noqa: E402
from mmdata.tokenizer.toolkit.train import pre_tokenizer, train, train_to  # noqa: E402


def texts_of(path: Path) -> Iterator[str]:
    for line in iter_lines(path):
        try:
            row = parse_row(line.raw)
        except BadRow:
            continue
        yield from (text for _, text in fields_of(row) if text.strip())


def halves(files: list[Path], root: Path) -> tuple[list[Path], list[Path]]:
    """Two directories of documents: each text in the half its hash says."""
    found: tuple[list[Path], list[Path]] = [], []
    for path in files:
        written = [root / name / path.name for name in ("trained-on", "held-out")]
        for side in written:
            side.parent.mkdir(exist_ok=True)
        with written[0].open("w") as one, written[1].open("w") as other:
            for text in texts_of(path):
                side = hashlib.sha256(text.strip().encode()).digest()[0] % 2
                (one if side else other).write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        found[0].append(written[0])
        found[1].append(written[1])
    return found


def held_out(files: list[Path], directories: list[Path]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        trained_on, others = halves(files, Path(scratch))
        loaded = [Tokenizer.load(directory) for directory in directories]
        for pattern, weights in (
            ("digits", {}),
            ("gpt2", {}),
            ("digits", {"Chinese": 1.0}),
        ):
            name = f"mm-{pattern}" + (f"-Chinese={weights['Chinese']:g}" if weights else "")
            written, _ = train(trained_on, TokenizerOptions(6400, pattern=pattern, weights=weights))
            loaded.append(Tokenizer(Path(name), written))
        corpus = draw(others, limit_bytes=10**9)
        figures = evaluate(loaded, corpus, shapes={}, step_tokens=65_536).tokenizers
    languages = list(figures[0].by_language)
    print(
        "| tokenizer | "
        + " | ".join(f"{name} ({figures[0].by_language[name].bytes / 1e3:,.0f} kB)" for name in languages),
        "| all |",
    )
    print("|---" * (len(languages) + 2) + "|")
    for one in figures:
        values = [one.by_language[name].bytes_per_token for name in languages]
        print(
            f"| {Path(one.name).name} | " + " | ".join(f"{value:.3f}" for value in values),
            f"| {one.bytes_per_token:.3f} |",
        )


def perturbed(files: list[Path], out: Path, num_bytes: int) -> None:
    """A jsonl file of about this size: real rows, drawn again and again, with letters of the same script swapped."""
    random_ = random.Random(0)
    rows = [path.read_text().splitlines() for path in files if "dpo" not in path.name]

    def swap(text: str) -> str:
        chars = list(text)
        for _ in range(max(1, len(chars) // 40)):
            i, j = random_.randrange(len(chars)), random_.randrange(len(chars))
            if chars[i].isalpha() and chars[j].isalpha() and (ord(chars[i]) > 255) == (ord(chars[j]) > 255):
                chars[i], chars[j] = chars[j], chars[i]
        return "".join(chars)

    def change(value: Any) -> Any:
        if isinstance(value, dict):
            said = ("content", "text")
            return {k: swap(v) if k in said and isinstance(v, str) and v else change(v) for k, v in value.items()}
        return [change(item) for item in value] if isinstance(value, list) else value

    with out.open("w") as file:
        for number in range(10**9):
            file.write(
                json.dumps(change(json.loads(random_.choice(rows[number % len(rows)]))), ensure_ascii=False) + "\n"
            )
            if not number % 100 and out.stat().st_size >= num_bytes:
                return


def peer(path: Path) -> None:
    """What a careful user writes with the library."""

    def texts() -> Iterator[str]:
        with path.open() as file:
            for row in map(json.loads, file):
                if "text" in row:
                    yield row["text"]
                for message in row.get("conversations", ()):
                    yield from filter(None, map(message.get, ("content", "reasoning_content", "tool_calls", "tools")))

    begun = time.monotonic()
    native = tokenizers.Tokenizer(tokenizers.models.BPE())
    native.pre_tokenizer = pre_tokenizer("digits")
    native.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=6400,
        special_tokens=list(LAYOUTS["minimind3"].tokens),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    native.train_from_iterator(texts(), trainer)
    report(begun, resource.RUSAGE_SELF)


def ours(path: Path) -> None:
    """`mm tokenizer train --weight Chinese=1`, its child process included."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        train_to([path], Path(scratch) / "made", TokenizerOptions(6400, weights={"Chinese": 1.0}))
        report(begun, resource.RUSAGE_CHILDREN)


def report(begun: float, who: int) -> None:
    used = resource.getrusage(who)
    cpu_s = used.ru_utime + used.ru_stime
    print(json.dumps({"seconds": time.monotonic() - begun, "cpu_s": cpu_s, "megabytes": used.ru_maxrss * 1024 / 1e6}))


def training(files: list[Path], megabytes: int, repeat: int, text: Path | None) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        path = text or Path(scratch) / "text.jsonl"
        if not text:
            perturbed(files, path, megabytes * 1_000_000)
        print(f"{path.stat().st_size / 1e6:.0f} MB of jsonl, tokenizers {tokenizers.__version__}")
        print("| run | library called directly | `mm tokenizer train --weight Chinese=1` | ratio |\n|---|---|---|---|")
        for number in range(repeat):
            found = []
            for side in ("peer", "ours"):
                command = [sys.executable, __file__, side, "--dataset", str(path)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found.append(json.loads(done.stdout))
            shown = [f"{one['seconds']:.1f} s ({one['cpu_s']:.1f} of CPU), {one['megabytes']:,.0f} MB" for one in found]
            print(
                f"| {number + 1} | {shown[0]} | {shown[1]} | {found[1]['seconds'] / found[0]['seconds']:.2f} |",
                flush=True,
            )


def round_trip(files: list[Path], count: int) -> None:
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        for pattern in ("digits", "gpt2"):
            out = Path(scratch) / pattern
            train_to(files, out, TokenizerOptions(6400, pattern=pattern))
            found, theirs = Tokenizer.load(out), AutoTokenizer.from_pretrained(out)
            strings = list(hostile_strings(count, tokens=list(found.control_tokens)))
            changed = differing = 0
            for begin in range(0, count, 1000):
                batch = strings[begin : begin + 1000]
                flat, ends = found.encode_batch(batch)
                lists = [flat[b:e].tolist() for b, e in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)]
                changed += sum(found.decode(ids) != text for ids, text in zip(lists, batch, strict=True))
                given = theirs(batch, add_special_tokens=False, split_special_tokens=True)["input_ids"]
                differing += sum(one != other for one, other in zip(lists, given, strict=True))
            print(
                f"{pattern}: {count:,} strings, {changed} changed by a round trip, {differing} with other ids in transformers"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("held-out", "train", "round-trip", "peer", "ours"))
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--tokenizers", type=Path, nargs="*", default=[])
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--text", type=Path, help="train: a jsonl file to take instead of making one")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--strings", type=int, default=100_000)
    given = parser.parse_args()
    jsonl = sorted(given.dataset.glob("*.jsonl"))
    if given.what == "held-out":
        held_out(jsonl, given.tokenizers)
    elif given.what == "train":
        training(jsonl, given.megabytes, given.repeat, given.text)
    elif given.what == "round-trip":
        round_trip(jsonl, given.strings)
    else:
        {"peer": peer, "ours": ours}[given.what](given.dataset)
