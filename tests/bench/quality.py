"""The rules of --quality beside datatrove's filters: `python tests/bench/quality.py FILE.jsonl … [--packages DIR]`.

Takes the English rows of the files, decides each by mm's presets and by datatrove's filters (pip install datatrove spacy, or
--target DIR for a folder apart), and prints how many rows each leaves out, where they differ, and the processor time of both
in this process. datatrove's filters see the same texts, without its readers and writers.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mmdata.encode.rows import BadRow, Document, parse_row
from mmdata.io.lines import iter_lines
from mmdata.pack.filter.features import RowBatch
from mmdata.pack.filter.quality import PRESETS
from mmdata.pack.filter.where import Where

ROWS = 500  # of a batch


def english(paths: Sequence[Path]) -> list[str]:
    """The texts of the English rows."""
    texts = []
    for path in paths:
        rows = []
        for line in iter_lines(path):
            try:
                rows.append(parse_row(line.raw))
            except BadRow:
                continue
        batch = RowBatch(rows)
        languages = batch.columns(["language"])["language"]
        texts += [
            "\n".join(text for _, text in pieces)
            for pieces, language in zip(batch.texts, languages, strict=True)
            if language == "English"
        ]
    return texts


def by_mm(texts: Sequence[str], preset: str) -> list[str | None]:
    """The first rule that each text breaks."""
    rules = {name: Where(rule) for name, rule in PRESETS[preset].items()}
    names = sorted({name for where in rules.values() for name in where.names})
    found: list[str | None] = []
    for begin in range(0, len(texts), ROWS):
        frame = RowBatch([Document(text) for text in texts[begin : begin + ROWS]]).columns(names)
        holds = {name: where.holds(frame).to_list() for name, where in rules.items()}
        found += [next((name for name in rules if not holds[name][i]), None) for i in range(len(frame))]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--packages", type=Path)
    options = parser.parse_args()
    if options.packages:
        sys.path.append(str(options.packages))
    from datatrove.data import Document as Text  # type: ignore[import-not-found]
    from datatrove.pipeline import filters  # type: ignore[import-not-found]

    theirs = {
        "gopher": [filters.GopherQualityFilter(), filters.GopherRepetitionFilter()],
        "c4": [filters.C4QualityFilter()],
        "fineweb": [filters.FineWebQualityFilter()],
    }

    def by_datatrove(text: str, preset: str) -> str | None:
        results = (each.filter(Text(text=text, id="")) for each in theirs[preset])
        return next((result[1] for result in results if result is not True), None)

    texts = english(options.files)
    for preset in PRESETS:
        by_datatrove("A text that loads its tokenizer.", preset)
        start = time.process_time()
        mine = by_mm(texts, preset)
        middle = time.process_time()
        others = [by_datatrove(text, preset) for text in texts]
        end = time.process_time()
        differ = Counter((a, b) for a, b in zip(mine, others, strict=True) if (a is None) != (b is None))
        print(
            f"{preset}: of {len(texts):,} texts mm leaves out {sum(x is not None for x in mine):,}, datatrove "
            f"{sum(x is not None for x in others):,}; {differ.total()} differ {dict(differ)}; {middle - start:.2f} s against "
            f"{end - middle:.2f} s: {(end - middle) / (middle - start):.1f} times"
        )


if __name__ == "__main__":
    main()
