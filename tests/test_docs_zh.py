"""Every page of docs/ is there in Chinese, with the same code, numbers, as many headings and tables, and links that lead there and back."""

import os
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
ENGLISH = {page.relative_to(DOCS) for page in DOCS.rglob("*.md")} - {Path("CHANGELOG.md")}
ENGLISH = sorted(path for path in ENGLISH if path.parts[0] != "zh")
PAIRS = [(DOCS / path, DOCS / "zh" / path) for path in ENGLISH]
PAIRS.append((ROOT / "shards" / "README.md", DOCS / "zh" / "format.md"))
PAIRS.append((ROOT / "README.md", ROOT / "README.zh.md"))
# Named by README.zh.md alone: what its readers need before anything else.
MIRRORS = {"-i", "HF_ENDPOINT=https://hf-mirror.com mm fetch", "mm fetch --source modelscope"}
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.M | re.S)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def bare(language: str, line: str) -> str:
    """A line without its comment or, in a tree, what is said of its folders: these are translated."""
    return re.sub(r"(^|\s+)#(\s.*)?$" if language else r"(?<=/)  +.*", "", line).rstrip()


def blocks(page: Path) -> list[tuple[str, list[str]]]:
    """Language and lines of the fenced blocks."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    lines = [(language, [bare(language, line) for line in code.splitlines()]) for language, code in found]
    return [(language, [line for line in each if line]) for language, each in lines]


def text(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def code(page: Path) -> set[str]:
    """Code in the text, by paragraph: a span may go over a line's end."""
    paragraphs = (re.sub(r"\s+", " ", paragraph) for paragraph in text(page).replace("```", "").split("\n\n"))
    return {span for paragraph in paragraphs for span in re.findall(r"`([^`]*)`", paragraph)}


def test_every_page_is_there_in_both_languages() -> None:
    chinese = {page for _, page in PAIRS if page.is_relative_to(DOCS)}
    assert sorted(chinese ^ set((DOCS / "zh").rglob("*.md"))) == []


both = pytest.mark.parametrize(("english", "chinese"), PAIRS, ids=lambda page: page.name)


@both
def test_the_chinese_page_has_the_code_headings_and_tables_of_the_english_one(english: Path, chinese: Path) -> None:
    assert blocks(chinese) == blocks(english)
    for pattern in (r"^#+(?= )", r"^ *\|(?=.*\|)", r"^ *(?:- |\d\. )"):  # levels of headings, lines of tables, items
        assert re.findall(pattern, text(chinese), re.M) == re.findall(pattern, text(english), re.M), pattern


@both
def test_both_pages_name_the_same_options_and_files(english: Path, chinese: Path) -> None:
    """Code in the text: what one page says of an option, a key or a file, the other says too."""
    extra = MIRRORS if chinese == ROOT / "README.zh.md" else set()
    assert sorted((code(english) ^ code(chinese)) - extra) == []


@both
def test_the_chinese_page_has_every_number_of_the_english_one(english: Path, chinese: Path) -> None:
    """Numbers in digits, outside of code blocks and links; the Chinese page may have more, as of months."""
    without = (re.sub(r"\[[^\]]*\]\([^)]*\)", "", text(page)) for page in (english, chinese))
    numbers = [Counter(re.findall(r"\d+(?:[.,]\d+)*", page)) for page in without]
    assert numbers[0] - numbers[1] == Counter()


@both
def test_the_pages_link_to_each_other_and_chinese_ones_to_chinese_ones(english: Path, chinese: Path) -> None:
    for page, label, other in ((english, "中文", chinese), (chinese, "English", english)):
        link = f"[{label}]({os.path.relpath(other, page.parent)})"
        assert link in page.read_text(encoding="utf-8").split("\n\n")[1], f"{name(page)}: {link} below the title"
    paths = [path.partition("#")[0] for path in re.findall(r"\]\(([^)\s:]+)\)", text(chinese))]
    linked = {Path(os.path.normpath(chinese.parent / path)) for path in paths if path}
    assert sorted(linked & {pair[0] for pair in PAIRS} - {english}) == []
