"""The page of `mm tokenizer eval`: every figure stands in it, in both languages, and text cannot break it."""

from dataclasses import replace
from html import unescape

import pytest
import text_data

from mmdata.stats.report.page import Translation
from mmdata.stats.report.tokenizer import eval_page, short_names, tables
from mmdata.tokenizer.toolkit.evaluate import Evaluation, Shape, evaluate
from mmdata.tokenizer.toolkit.sample import draw


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    root = tmp_path_factory.mktemp("report")
    both = [text_data.trained(root), text_data.trained(root, vocab_size=500)]
    corpus = draw(list(text_data.make(root / "text").values()), limit_bytes=10**9)
    found = evaluate(both, corpus, shapes={"small": Shape(64, 10_000)}, step_tokens=100, num_hostile=50)
    found.tokenizers[0].round_trip.examples.append("</script><b>")
    return found


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_every_figure_stands_in_the_page(figures: Evaluation, lang: str) -> None:
    made = eval_page(figures, lang=lang)
    texts = unescape(made)
    for found in tables(figures):
        assert Translation(lang)(found.title) in made
        for row in found.rows:
            assert all(text in texts for text in found.texts(row, Translation(lang)))
    assert "minimind3-digits-420" in made and "minimind3-digits-500" in made
    assert "</script><b>" not in made and "&lt;/script&gt;&lt;b&gt;" in made


def test_names_of_tokenizers_and_files_are_never_translated(figures: Evaluation) -> None:
    one = replace(figures.tokenizers[0], name="data/tokenizer", by_file={"data/all": figures.tokenizers[0]})
    by_file = tables(replace(figures, tokenizers=[one]))[1]
    names = [Translation("zh")(column.name) for column in by_file.columns]
    assert names == ["", "tokenizer"] and by_file.texts(by_file.rows[0], Translation("zh"))[0] == "all"
    assert Translation("zh")("tokenizer") == "分词器"


def test_a_row_has_a_value_for_each_tokenizer(figures: Evaluation) -> None:
    titles = [found.title for found in tables(figures)]
    assert len(titles) == len(set(titles)) == 5
    assert all(len(row) == 3 for found in tables(figures) for row in found.rows)
    model = dict(zip(titles, tables(figures), strict=True))["a model with it"]
    assert model.rows[-1][1:] == ["0.0 M, 72.9%", "0.0 M, 76.2%"]  # 420 and 500 rows of 64 beside 10,000 parameters


def test_names_are_as_short_as_tells_them_apart() -> None:
    assert short_names(["a/b/one", "a/b/two"]) == ["one", "two"]
    assert short_names(["a/x/one", "a/y/one/"]) == ["x/one", "y/one"]
    assert short_names(["one", "one"]) == ["one", "one"]
