"""Published rules for the quality of text as columns of rows, and the presets of `--quality` that combine them.

- gopher: Rae et al. 2021, "Scaling Language Models: Methods, Analysis & Insights from Training Gopher", appendix A.1.
- c4: Raffel et al. 2020, "Exploring the Limits of Transfer Learning", section 2.2, without its list of bad words.
- fineweb: Penedo et al. 2024, "The FineWeb Datasets", section 3.6, with the thresholds of the released code.

The rules were made for English web pages. For Chinese, a character counts as a word; rules on the length of words and on
English stop words hold for English only; a line of up to 15 characters is short instead of 30; and sentences end with
Chinese marks, too. `datatrove`'s filters differ where it splits words and sentences by spaCy (docs/frames.md).
"""

import re
import unicodedata
from collections.abc import Sequence
from itertools import chain

import numpy as np
import polars as pl

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
SHORT_LINE, SHORT_CHINESE_LINE = 30, 15  # characters
TOP_GRAMS = {2: 0.2, 3: 0.18, 4: 0.16}  # n: largest share of characters in the most frequent n-gram
REPEATED_GRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1}  # n: largest share in repeated n-grams
TERMINAL = "!.?։؝؞؟۔।॥၊။።៕‼‽⁇⁈⁉⸮。꓿﹒﹖﹗！．？｡"  # marks with which sentences end
_POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_HAN = "\u3400-\u9fff\uf900-\ufaff"
_WORDS = re.compile(
    rf"(?:https?://|www\.)\S+|[^\W\d_{_HAN}]+?(?=n['’]t\b)|n['’]t\b|['’](?:s|re|ve|ll|d|m)\b|\d+(?:[.,:]\d+)+|[^\W{_HAN}]+|[{_HAN}]|\.\.\.|[^\w\s]"
)
_CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
_SENTENCE_END = re.compile(r"[.!?]['\"”’)]*(?=\s|$)|[。！？][”’）」]*")

# The columns, by what they are computed from: name -> what it says.
LINES = {
    "punctuated_lines": "share of the lines that end with a mark that ends sentences",
    "short_lines": f"share of the lines of up to {SHORT_LINE} characters (Chinese: {SHORT_CHINESE_LINE})",
    "bullet_lines": "share of the lines that begin with a bullet",
    "ellipsis_lines": "share of the lines that end with an ellipsis",
    "repeated_lines": "share of the lines that repeat an earlier one",
    "repeated_line_characters": "share of the characters in such lines",
    "repeated_paragraphs": "share of the paragraphs that repeat an earlier one",
    "repeated_paragraph_characters": "share of the characters in such paragraphs",
    "sentences": "sentences in the lines that C4 keeps",
    "lorem_ipsum": "1 if such a line has the phrase lorem ipsum, else 0",
    "curly_bracket": "1 if such a line has a curly bracket, else 0",
}
WORDS = {
    "words": "words, without marks and symbols",
    "word_length": "mean characters of a word",
    "hashes_per_word": "hash signs a word or mark",
    "ellipses_per_word": "ellipses a word or mark",
    "newlines_per_word": "line ends a word or mark",
    "alphabetic_words": "share of the words and marks that have a letter",
    "stop_words": f"how many of {', '.join(STOP_WORDS)} occur",
}
GRAMS = {
    **{f"top_{n}_gram": f"share of the characters in the most frequent run of {n} words" for n in TOP_GRAMS},
    **{f"repeated_{n}_grams": f"share of the characters in repeated runs of {n} words" for n in REPEATED_GRAMS},
}
# Preset -> rules: name -> the condition that a row must meet.
PRESETS: dict[str, dict[str, str]] = {
    "gopher": {
        "too few words": "words >= 50",
        "too many words": "words <= 100000",
        "mean word length": "language <> 'English' or word_length between 3 and 10",
        "hash signs": "hashes_per_word <= 0.1",
        "ellipses": "ellipses_per_word <= 0.1",
        "bullet lines": "bullet_lines <= 0.9",
        "ellipsis lines": "ellipsis_lines <= 0.3",
        "alphabetic words": "alphabetic_words >= 0.8",
        "stop words": "language <> 'English' or stop_words >= 2",
        "repeated paragraphs": "repeated_paragraphs <= 0.3 and repeated_paragraph_characters <= 0.2",
        "repeated lines": "repeated_lines <= 0.3 and repeated_line_characters <= 0.2",
        **{f"most frequent {n}-gram": f"top_{n}_gram <= {most}" for n, most in TOP_GRAMS.items()},
        **{f"repeated {n}-grams": f"repeated_{n}_grams <= {most}" for n, most in REPEATED_GRAMS.items()},
    },
    "c4": {
        "lorem ipsum": "lorem_ipsum = 0",
        "curly bracket": "curly_bracket = 0",
        "too few sentences": "sentences >= 5",
    },
    "fineweb": {
        "lines without a final mark": "punctuated_lines >= 0.12",
        "short lines": "short_lines <= 0.67",
        "repeated lines": "repeated_line_characters <= 0.01",
        "line ends": "newlines_per_word <= 0.3",
    },
}


# --- lines


def lines_frame(texts: Sequence[str]) -> pl.DataFrame:
    """Return the columns of LINES, one row per text."""
    return pl.DataFrame(map(_of_lines, texts), dict.fromkeys(LINES, pl.Float64), orient="row")


def _of_lines(text: str) -> tuple[float, ...]:
    """Return the columns of LINES of one text. Lines of white space alone do not count."""
    lines = [line for line in text.split("\n") if line.strip()]
    number = max(len(lines), 1)
    paragraphs = re.split(r"\n{2,}", text.strip())
    repeated, characters = _repeated(lines)
    again, inside = _repeated(paragraphs)
    is_short = (len(line) <= (SHORT_CHINESE_LINE if _is_han(line) else SHORT_LINE) for line in lines)
    return (
        sum(line.endswith(tuple(TERMINAL)) for line in lines) / number,
        sum(is_short) / number,
        sum(line.lstrip().startswith(("•", "-")) for line in lines) / number,
        sum(line.rstrip().endswith(("...", "…")) for line in lines) / number,
        repeated / number,
        characters / max(len(text) - text.count("\n"), 1),
        again / len(paragraphs),
        inside / max(len(text), 1),
        *_of_c4(lines),
    )


def _repeated(items: Sequence[str]) -> tuple[int, int]:
    """Return how many items repeat an earlier one, and their characters."""
    distinct = dict.fromkeys(items)
    return len(items) - len(distinct), sum(map(len, items)) - sum(map(len, distinct))


def _is_han(line: str) -> bool:
    """Return whether Chinese characters are the most of a line."""
    return not line.isascii() and 2 * sum("\u3400" <= character <= "\u9fff" for character in line) > len(line)


def _of_c4(lines: Sequence[str]) -> tuple[int, int, int]:
    """Return the number of sentences in the lines that C4 keeps, whether such a line (with words that C4 drops lines
    for) has the phrase lorem ipsum, and whether one has a curly bracket."""
    sentences, has_lorem, has_bracket = 0, 0, 0
    for line in map(str.strip, lines):
        words = line.split()
        line = _CITATION.sub("", line)
        is_sentence = line.endswith((".", "?", "!", '"', "'", *"。？！”’")) and not line.endswith("...")
        is_long = len(words) >= 3 or (_is_han(line) and len(line) >= 3)
        if not is_sentence or not is_long or max(map(len, words)) > (1000 if not _is_han(line) else len(line)):
            continue
        lower = line.lower()
        has_lorem |= "lorem ipsum" in lower
        has_bracket |= "{" in line
        if "javascript" not in lower and not any(phrase in lower for phrase in _POLICY):
            ends = [end.end() for end in _SENTENCE_END.finditer(line)]
            sentences += len(ends) + (not ends or ends[-1] < len(line))
    return sentences, int(has_lorem), int(has_bracket)


# --- words


class Words:
    """The words of texts, end to end. tokens: int64 [W], equal for equal words. of: int64 [W], the text of each. counts,
    ends: int64 [texts], the number of words of each text and where they end. lengths: int64 [distinct words], their characters."""

    def __init__(self, texts: Sequence[str]):
        self.texts = texts
        split = list(map(_WORDS.findall, texts))
        self.ids = ids = {word: id for id, word in enumerate(dict.fromkeys(chain.from_iterable(split)))}
        self.tokens = np.array([ids[word] for words in split for word in words], np.int64)
        self.counts = np.fromiter(map(len, split), np.int64, len(split))
        self.of = np.repeat(np.arange(len(split)), self.counts)
        self.ends = np.cumsum(self.counts)
        self.lengths = np.fromiter(map(len, ids), np.int64, len(ids))

    def per_text(self, values: np.ndarray) -> np.ndarray:
        """Return the sum of `values`, one for each distinct word, over the words of each text."""
        return np.bincount(self.of, weights=values[self.tokens], minlength=len(self.texts))

    def frame(self) -> pl.DataFrame:
        """Return the columns of WORDS, one row per text."""
        is_word = np.fromiter((any(unicodedata.category(c)[0] not in "PSC" for c in word) for word in self.ids), bool)
        has_letter = np.fromiter((any(map(str.isalpha, word)) for word in self.ids), bool)
        number, num_words = np.maximum(self.counts, 1), self.per_text(is_word)
        stops = [np.unique(self.of[self.tokens == self.ids.get(word, -1)]) for word in STOP_WORDS]
        return pl.DataFrame(
            {
                "words": num_words,
                "word_length": self.per_text(self.lengths * is_word) / np.maximum(num_words, 1),
                "hashes_per_word": np.array([text.count("#") for text in self.texts]) / number,
                "ellipses_per_word": np.array([text.count("...") + text.count("…") for text in self.texts]) / number,
                "newlines_per_word": np.array([text.count("\n") for text in self.texts]) / number,
                "alphabetic_words": self.per_text(has_letter) / number,
                "stop_words": np.bincount(np.concatenate(stops), minlength=len(self.texts)),
            }
        )

    def gram_frame(self) -> pl.DataFrame:
        """Return the columns of GRAMS, one row per text."""
        characters = np.maximum(np.fromiter(map(len, self.texts), np.int64, len(self.texts)), 1)
        columns = {}
        at = np.arange(len(self.tokens))
        for n in range(min(TOP_GRAMS), max(REPEATED_GRAMS) + 1):
            hashes, at = self._grams(at, n)
            if n in TOP_GRAMS:
                columns[f"top_{n}_gram"] = self._top(hashes, at, n) / characters
            if n in REPEATED_GRAMS:
                columns[f"repeated_{n}_grams"] = self._repeated(hashes, at, n) / characters
        return pl.DataFrame(columns)

    def _grams(self, at: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the hashes, sorted, and the positions of the first words of the runs of n words that occur more than
        once in a text. Hashes are equal only in the same text; positions of equal ones ascend. at: positions that
        contain those of all repeated runs of n - 1 words, for no others begin a repeated run of n."""
        of = self.of[at]
        is_inside = at + n <= self.ends[of]
        at, of = at[is_inside], of[is_inside]
        hashes = np.zeros(len(at), np.uint64)
        for k in range(n):
            hashes *= np.uint64(0x9E3779B97F4A7C15)
            hashes += self.tokens[at + k].view(np.uint64) + np.uint64(1)
        hashes = (hashes ^ hashes >> np.uint64(31)) * np.uint64(0xD6E8FEB86659FD93) + of.view(np.uint64)
        order = np.lexsort((at, hashes))
        hashes, at = hashes[order], at[order]
        is_same = hashes[1:] == hashes[:-1]
        is_repeated = np.zeros(len(hashes), bool)
        is_repeated[1:] |= is_same
        is_repeated[:-1] |= is_same
        return hashes[is_repeated], at[is_repeated]

    def _top(self, hashes: np.ndarray, at: np.ndarray, n: int) -> np.ndarray:
        """Return the characters in all occurrences of each text's most frequent (first of equals) run of n words,
        joined by spaces: int64 [texts]. hashes, at: of `_grams`."""
        found = np.zeros(len(self.texts), np.int64)
        whole = np.flatnonzero(self.counts >= n)  # if no run is repeated, the first is the most frequent
        found[whole] = self._characters((self.ends - self.counts)[whole], n) + n - 1
        begins = np.flatnonzero(np.diff(hashes, prepend=hashes[:1] + np.uint64(1)))
        counts, first = np.diff(begins, append=len(hashes)), at[begins]
        best = np.lexsort((first, -counts, self.of[first]))
        best = best[np.flatnonzero(np.diff(self.of[first[best]], prepend=-1))]
        found[self.of[first[best]]] = (self._characters(first[best], n) + n - 1) * counts[best]
        return found

    def _repeated(self, hashes: np.ndarray, at: np.ndarray, n: int) -> np.ndarray:
        """Return the characters in runs of n words that came before in their text, searched from left to right and on
        behind each: int64 [texts]. hashes, at: of `_grams`."""
        is_same = hashes[1:] == hashes[:-1]
        later, earlier = at[1:][is_same], at[:-1][is_same]
        before = dict(zip(later.tolist(), earlier.tolist(), strict=True))  # the last equal run before each run
        skipped: set[int] = set()
        places, end = [], 0
        for place in np.sort(later).tolist():
            if place < end:
                continue
            found = before[place]
            while found in skipped:  # a run that the search jumped over did not come before
                found = before.get(found, -1)
            if found >= 0:
                places.append(place)
                end = place + n
                skipped.update(range(place + 1, end))
        repeated = np.array(places, np.int64)
        return np.bincount(self.of[repeated], weights=self._characters(repeated, n), minlength=len(self.texts))

    def _characters(self, places: np.ndarray, n: int) -> np.ndarray:
        """Return the characters of the n words from each place on."""
        begins = np.concatenate([[0], np.cumsum(self.lengths[self.tokens])])
        return begins[places + n] - begins[places]
