"""The data report: its figures are those of JSON and terminal, in both languages, whatever the rows say."""

import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
from command_line import Run, fine, refused
from pack_data import words, write_rows
from pages import HOSTILE, cards, parsed

from mmdata.errors import InputError
from mmdata.pack.options import PackOptions
from mmdata.pack.pipeline import PackResult, pack
from mmdata.shards.dataset import open_dataset
from mmdata.shards.verify import verify
from mmdata.stats import stats
from mmdata.stats.figures import cut_lines
from mmdata.stats.frames import rows
from mmdata.stats.report import compare, data
from mmdata.stats.report.page import Translation, as_name
from mmdata.stats.tally import NUM_STRINGS, Tally, counts_of, length_figures, lengths_by
from mmdata.tokenizer.tokenizer import train_bpe
from mmdata.tokenizer.toolkit.layouts import LAYOUTS

KINDS = ("document", "conversation", "pair")


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_dataset_and_its_file_can_be_reported_and_say_the_same(
    packed: dict[str, PackResult], tokenizer_dir: Path, kind: str
) -> None:
    of_dataset = stats.measure_dataset(packed[kind].out)
    of_file = stats.measure_file(packed[kind].out.with_suffix(".jsonl"), tokenizer_dir)
    of_share = stats.measure_dataset(packed[kind].out, is_quick=True)
    both = stats.contained([of_dataset, of_file])
    assert [warning["exact"] for warning in both] == [1.0, 1.0]
    for lang in ("en", "zh"):
        for measured in (of_dataset, of_file, of_share):
            html = data.dataset_page([measured], lang=lang)
            assert len(html.encode()) < 2_000_000 and html.startswith("<!doctype html>")
            assert f"{measured.figures['tokens']:,}" in html
        assert compare.compare_page(of_dataset, of_file, lang=lang, others=both)
        assert data.dataset_page([of_dataset, of_file], lang=lang, others=both)
    every_heading_is_explained(of_dataset)
    rows_have_the_columns_of_the_frame(of_dataset)
    one, other = of_dataset.figures, of_file.figures
    same = ("characters_by", "languages", "scripts", "turns", "duplicates", "openings", "ngrams", "systems", "tools")
    for name in (*same, "vocabulary", "token_scripts"):
        if name != "vocabulary" or kind != "document":  # a document cut in two gets one more bos
            assert one.get(name) == other.get(name), name
    assert one.get("pairs") == other.get("pairs")


def test_html_json_and_terminal_agree(home: Path, mm: Run) -> None:
    fine(mm("pack data/sft_512.jsonl data/dpo.jsonl"))
    for path in ("shards/sft_512", "shards/dpo", "data/sft_512.jsonl"):
        ran = fine(mm(f"stats {path} --json --html page.html"))
        figures = json.loads(ran.out)[path]
        shown = cards(Path("page.html").read_text(encoding="utf-8"))
        printed = fine(mm(f"stats {path}")).out
        for name, key in (("rows", "kept"), ("tokens", "tokens"), ("trained tokens", "loss_tokens")):
            assert shown[name] == f"{figures[key]:,}"
            assert re.search(rf"^{name} +{figures[key]:,}\b", printed, re.M), printed
        for warning in figures["warnings"]:
            assert f"! {warning['text']}" in printed
        exact = figures["duplicates"]["exact"]
        assert shown["exact repeats"] == f"{exact:,}" and re.search(rf"^exact repeats +{exact:,}\b", printed, re.M)


def test_pack_writes_the_report_and_the_dataset_stays_what_it_was(home: Path, mm: Run) -> None:
    assert "look: shards/sft_512/report.html" in fine(mm("pack data/sft_512.jsonl")).err
    page = home / "shards/sft_512/report.html"
    before = page.read_bytes()
    assert verify(home / "shards/sft_512") == []
    fine(mm("pack data/sft_512.jsonl"))
    assert page.read_bytes() == before
    fine(mm("pack data/sft_512.jsonl --out shards/other --no-report"))
    assert not (home / "shards/other/report.html").exists()
    one, other = (sorted(p.relative_to(d) for p in d.rglob("*")) for d in (page.parent, home / "shards/other"))
    assert [
        path for path in one if path.name not in ("report.html", "README.md", ".verified.json", ".verified.lock")
    ] == other
    for path in other:
        if (page.parent / path).is_file():
            assert (page.parent / path).read_bytes() == (home / "shards/other" / path).read_bytes()


def test_options_are_honoured_or_refused(home: Path, mm: Run) -> None:
    refused(mm("stats data/sft_512.jsonl --lang de"), "de", "zh")
    refused(mm("stats data/sft_512.jsonl data/dpo.jsonl --compare data/dpo.jsonl"), "--compare")
    refused(mm("stats data/nothing.jsonl"), "nothing.jsonl")
    refused(mm("stats data/sft_512.jsonl --losses data/dpo.jsonl"), "line 1", "nll")
    fine(mm("pack data/sft_512.jsonl --no-report"))
    refused(mm("stats shards/sft_512 --exact"), "--exact")
    fine(mm("stats shards/sft_512 --lang zh --html page.html"))
    assert 'lang="zh-CN"' in Path("page.html").read_text(encoding="utf-8")


def test_compare_marks_what_differs(home: Path, mm: Run) -> None:
    lines = (home / "data/sft_512.jsonl").read_text().splitlines(keepends=True)
    (home / "data/half.jsonl").write_text("".join(lines[::2]))
    ran = fine(mm("stats data/sft_512.jsonl --compare data/half.jsonl --json --html page.html"))
    found = {one["figure"]: one for one in json.loads(ran.out)["differences"]}
    assert found["rows"] == {"figure": "rows", "one": 240, "other": 120, "change": -0.5, "differs": True}
    assert not found["tools, share of rows"]["differs"]
    assert "100 % of half.jsonl is also in sft_512.jsonl" in json.dumps(json.loads(ran.out)["warnings"])
    html = Path("page.html").read_text(encoding="utf-8")
    assert re.search(
        r'<tr class="differs"><td class=short>rows</td>\s*<td class="num">240</td>\s*<td class="num">120</td>', html
    )
    assert "-50.0 %" in fine(mm("stats data/sft_512.jsonl --compare data/half.jsonl")).out


def test_rows_of_highest_loss_are_shown(home: Path, mm: Run) -> None:
    records = [{"file": "data/sft_512.jsonl", "line": n, "tokens": 4, "nll": 4.0 * n} for n in range(1, 30)]
    (home / "losses.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    fine(mm("pack data/sft_512.jsonl --no-report"))
    for path in ("data/sft_512.jsonl", "shards/sft_512"):
        fine(mm(f"stats {path} --losses losses.jsonl --html page.html"))
        scripts = parsed(Path("page.html").read_text(encoding="utf-8")).scripts
        samples = next(json.loads(s) for s in scripts if s.startswith("[{"))
        assert [(s["line"], s["loss"]) for s in samples if s["why"] == "loss"] == [(n, n) for n in range(29, 23, -1)]


@pytest.mark.parametrize("inputs", ["there", "gone"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_condition_gives_the_figures_of_its_rows(tmp_path: Path, tokenizer_dir: Path, kind: str, inputs: str) -> None:
    path, where = write_rows(tmp_path / "rows.jsonl", kind, 200), "characters > 90 and tokens < 400 and line > 3"
    packed = pack([path], tmp_path / "packed", PackOptions(tokenizer=tokenizer_dir, max_len=2048, part_bytes=20_000))
    expected = stats.measure_file(path, tokenizer_dir, where=where)
    if inputs == "gone":
        path.unlink()
    found = stats.measure_dataset(packed.out, where=where)
    assert 0 < found.figures["kept"] < 200 and len(open_dataset(packed.out).parts) > 1
    names = [
        *OF_TEXTS,
        "rows",
        "kept",
        "left_out",
        "characters",
        "tokens",
        "loss_tokens",
        "tokens_by",
        "lengths",
        "cuts",
    ]
    for name in (*names, "vocabulary", "token_scripts", "trained_share", "where"):
        assert found.figures.get(name) == expected.figures.get(name), name
    assert found.rows.drop("file", "bytes").equals(expected.rows.select(found.rows.drop("file", "bytes").columns))
    with pytest.raises(InputError, match="holds for no row"):
        stats.measure_dataset(packed.out, where="line < 0")


def rows_have_the_columns_of_the_frame(measured: stats.Measured) -> None:
    names = [name for name in measured.rows.columns if name != "text"]
    assert {"duplicate", "tokens", "language", "han", "longest_line", "answer_characters", "repeated"} <= {*names}
    expected = rows(measured.path).select(names).collect()
    assert measured.rows.select(names).equals(expected.filter(pl.col("line").is_in(measured.rows["line"])))
    spec = next(block for block in data.sections_of(measured) if block.id == "rows").blocks[1].spec(Translation("zh"))
    assert len(spec) > 15 and all(len(column["values"]) == len(measured.rows) for column in spec)
    assert all(re.search("[\u4e00-\u9fff]", column["help"]) for column in spec)  # translated


def every_heading_is_explained(measured: stats.Measured) -> None:
    html = data.dataset_page([measured], lang="zh", command="mm stats x")
    bare = [tag for tag, attributes in parsed(html).tags if tag == "th" and "title" not in attributes]
    assert len(bare) == len(re.findall(r"<th[^>]*></th>", html))  # those of bars
    assert "mm stats x" in html and Translation("zh")("Terms") in html and measured.path.name in html


def test_the_name_of_a_dataset_is_not_translated() -> None:
    called_dpo: Any = SimpleNamespace(path=Path("shards/dpo"))  # as a stage is, which has a translation
    assert Translation("zh")(data.name_of(called_dpo)) == "dpo" != Translation("zh")("dpo")


def samples_of(figures: list[dict[str, Any]], why: str) -> list[dict[str, Any]]:
    return [sample for sample in figures if sample["why"] == why]


def test_samples_hold_the_whole_text_and_the_trained_tokens(packed: dict[str, PackResult]) -> None:
    measured = stats.measure_dataset(packed["conversation"].out)
    lines = packed["conversation"].out.with_suffix(".jsonl").read_text().splitlines()
    assert len(samples_of(measured.samples, "random")) == stats.NUM_RANDOM
    lengths = [sum(len(m["content"]) for m in json.loads(line)["conversations"]) for line in lines]
    assert [s["characters"] for s in samples_of(measured.samples, "longest")] == sorted(lengths)[::-1][:6]
    assert [s["characters"] for s in samples_of(measured.samples, "shortest")] == sorted(lengths)[:6]
    for sample in measured.samples:
        row = json.loads(lines[sample["line"] - 1])["conversations"]
        (part,) = sample["parts"]
        assert [message["role"] for message in part["messages"]] == [message["role"] for message in row]
        for message, said in zip(part["messages"], row, strict=True):
            plain = [(t, m) for t, m in zip(message["text"], message["marks"], strict=True) if m in "01"]
            assert "".join(text for text, _ in plain).strip() == said["content"]
            assert {mark for _, mark in plain if _.strip()} == {"1" if said["role"] == "assistant" else "0"}
        trained = sum(
            len(ids) for m in part["messages"] for ids, mark in zip(m["ids"], m["marks"], strict=True) if mark in "13"
        )
        assert trained == sample["trained"]


def hostile_rows(kind: str) -> list[dict[str, Any]]:
    found = []
    for text in [*HOSTILE, "x" * 1_100_000, "很" * 100_000]:
        if kind == "document":
            found.append({"text": text})
        else:
            found.append({"conversations": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]})
    return found


@pytest.mark.parametrize("kind", ["document", "conversation"])
def test_hostile_rows_are_shown_as_text(tmp_path: Path, tokenizer_dir: Path, kind: str) -> None:
    path = write_rows(tmp_path / "</script><b>.jsonl".replace("/", "⁄"), kind, 30)
    with path.open("a") as file:
        for row in hostile_rows(kind):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.write('{"text": "<script>alert(1)</script>\n')
        file.write("\u202e not json </script>\n")
    pack([path], tmp_path / "packed", PackOptions(tokenizer=tokenizer_dir, max_len=128))
    for measured in (stats.measure_dataset(tmp_path / "packed"), stats.measure_file(path, tokenizer_dir)):
        html = data.dataset_page([measured])
        assert len(html.encode()) < 2_000_000
        assert "<script>alert" not in html and "<img src=x" not in html and "<b>.jsonl" not in html
        assert len(parsed(html).tags) > 100
        assert json.loads(json.dumps(measured.figures)) == measured.figures


def test_a_large_files_tokens_are_a_samples_and_near_the_truth(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", "conversation", 1000)
    monkeypatch.setattr("mmdata.stats.scan.SAMPLE_BYTES", path.stat().st_size // 4)
    sampled = stats.measure_file(path, tokenizer_dir)
    found = sampled.figures
    exact = stats.measure_file(path, tokenizer_dir, is_exact=True).figures
    assert "sample" not in exact and found["sample"]["of"] == 1000 and 150 < found["sample"]["rows"] < 350
    assert found["tokens"] == pytest.approx(exact["tokens"], rel=0.05)
    assert found["characters"] == exact["characters"] and found["duplicates"] == exact["duplicates"]
    assert "--exact" in data.dataset_page([sampled])


def test_workers_change_nothing(tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "rows.jsonl", "pair", 300)
    whole = stats.measure_file(path, tokenizer_dir)
    monkeypatch.setattr("mmdata.stats.scan.PART_BYTES", 20_000)
    parts = stats.measure_file(path, tokenizer_dir)
    assert parts.figures == whole.figures and parts.samples == whole.samples


OF_TEXTS = (
    "characters_by", "languages", "scripts", "turns", "duplicates", "openings", "ngrams", "systems", "tools", "reasoning", "pairs",
)  # fmt: skip


def tool_rows() -> Iterator[dict[str, Any]]:
    """Conversations with a system prompt, thinking, a tool, a call of it and its answer; some with less."""
    draw = random.Random(5)
    tool = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object", "properties": {}}}}
    call = {"name": "tide", "arguments": {"at": "港口 <b>"}}
    for number in range(60):
        system = {"role": "system", "content": f"Look at the {words(draw, 3)}.", "tools": json.dumps([tool])}
        user = {"role": "user", "content": f"\n{words(draw, 8)}\n"}
        calling = {"role": "assistant", "content": words(draw, 4), "tool_calls": json.dumps([call])}
        answer = {"role": "tool", "content": words(draw, 3)}
        last = {"role": "assistant", "content": words(draw, 9), "reasoning_content": f"so {words(draw, 5)}"}
        plain = {"role": "assistant", "content": f"{words(draw, 9)}\n\n"}
        yield {"conversations": [user, plain, user, last] if number % 3 else [system, user, calling, answer, last]}


@pytest.mark.parametrize("kind", [*KINDS, "tools"])
def test_figures_of_texts_are_those_of_the_first_version(tmp_path: Path, kind: str) -> None:
    """golden/stats.json has the figures of these rows from the version that counted each figure on its own (5761d24)."""
    path = write_rows(tmp_path / "rows.jsonl", "conversation" if kind == "tools" else kind, 150)
    if kind == "tools":
        path.write_text("".join(json.dumps(row) + "\n" for row in tool_rows()))
    with path.open("a") as file:
        file.write("not json\n" + path.read_text().splitlines()[3] + "\n")
    found = stats.measure_file(path).figures
    del found["path"]
    for item in found["set_aside"]:
        del item["examples"]
    golden = json.loads((Path(__file__).parent / "golden/stats.json").read_text(encoding="utf-8"))
    assert found == golden[kind]


@pytest.mark.parametrize("kind", [*KINDS, "tools"])
def test_shards_tell_of_texts_what_the_inputs_told(tmp_path: Path, tokenizer_dir: Path, kind: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", "conversation" if kind == "tools" else kind, 150)
    if kind == "tools":
        path.write_text("".join(json.dumps(row) + "\n" for row in tool_rows()))
        layout = LAYOUTS["minimind3"]
        tokenizer_dir = tmp_path / "tokenizer"
        draw = random.Random(1)
        train_bpe(
            [words(draw, 60) for _ in range(100)],
            vocab_size=420,
            control_tokens=layout.control,
            chat_template=layout.template,
            out_dir=tokenizer_dir,
        )
    if kind == "document":
        with path.open("a") as file:
            file.write(json.dumps({"text": "<s>the tide </s> <s>灯塔 rope</s><s>a bell</s>"}) + "\n")
    with path.open("a") as file:
        file.write("not json\n")
    out = tmp_path / "packed"
    pack([path], out, PackOptions(tokenizer=tokenizer_dir, max_len=640, val_fraction=0.1, part_bytes=20_000))
    before = stats.measure_dataset(out)
    quick = stats.measure_dataset(out, is_quick=True)
    path.rename(tmp_path / "gone")
    after = stats.measure_dataset(out)
    assert (before.figures["texts_from"], after.figures["texts_from"]) == ("inputs", "shards")
    assert {name for name in OF_TEXTS if before.figures.get(name) != after.figures.get(name)} == set()
    assert after.samples == before.samples and len(after.samples) >= 24
    assert after.hashes.tolist() == before.hashes.tolist()
    assert "decoded from the shards" in data.dataset_page([after])
    assert "decoded from the shards" not in data.dataset_page([before])
    assert "由分片解码得到" in data.dataset_page([after], lang="zh")
    quick_after = stats.measure_dataset(out, is_quick=True)
    assert quick_after.figures["languages"] == quick.figures["languages"]
    assert quick_after.samples == quick.samples


def test_thousands_of_different_control_strings_leave_a_report_small(home: Path, mm: Run) -> None:
    rows = [{"text": f"the tide <|im_{'x' * 20}{number}|> and the <|im_end|> rope"} for number in range(3000)]
    (home / "data/many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ran = fine(mm("pack data/many.jsonl"))
    assert len(ran.out + ran.err) < 5_000 and "<|im_end|> (3,000)" in ran.out + ran.err
    assert len((home / "shards/many/report.html").read_bytes()) < 400_000
    assert len(fine(mm("stats shards/many")).out) < 20_000


def test_inputs_that_have_changed_are_not_read(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", "conversation", 100)
    pack([path], tmp_path / "packed", PackOptions(tokenizer=tokenizer_dir, max_len=128))
    before = stats.measure_dataset(tmp_path / "packed").figures
    path.write_bytes(path.read_bytes().replace(b"rope", b"hope"))  # the same size
    found = stats.measure_dataset(tmp_path / "packed").figures
    assert found["texts_from"] == "shards" and found["ngrams"] == before["ngrams"]


def test_an_input_of_which_no_row_was_kept_is_a_source_like_others(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", "conversation", 30)
    again = shutil.copy(path, tmp_path / "again.jsonl")
    pack([path, Path(again)], tmp_path / "packed", PackOptions(tokenizer=tokenizer_dir, max_len=128, dedup="exact"))
    for is_there in (True, False):
        found = stats.measure_dataset(tmp_path / "packed")
        assert [source["kept"] for source in found.figures["sources"]][1] == 0
        assert "again.jsonl" in data.dataset_page([found])
        if is_there:
            path.unlink()


def test_rows_of_a_template_without_roles_are_shown_whole(tmp_path: Path, tokenizer_dir: Path) -> None:
    bare = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_dir, bare)
    config = json.loads((bare / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}<|im_end|>"
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    path = tmp_path / "rows.jsonl"
    row = {"conversations": [{"role": "user", "content": "tide?"}, {"role": "assistant", "content": "<think>\nno"}]}
    path.write_text(json.dumps(row) + "\n")
    pack([path], tmp_path / "packed", PackOptions(tokenizer=bare, max_len=128))
    path.unlink()
    found = stats.measure_dataset(tmp_path / "packed")
    assert found.figures["openings"] == [] and found.figures["characters_by"]["row"]["count"] == 1
    assert data.dataset_page([found])


def test_lengths_and_strings_are_the_same_however_they_were_gathered() -> None:
    draw = random.Random(1)
    lengths = [draw.choice((draw.randint(0, 3000), draw.randint(60_000, 10**7))) for _ in range(3000)]
    strings = [f"string {draw.randint(0, 400)}" for _ in range(3000)]
    frame = pl.DataFrame({"role": ["user", "tool"] * 1500, "length": lengths})
    tallies = []
    for step in (3000, 7):
        tally = Tally()
        for begin in range(0, 3000, step):
            part = Tally()
            part.frames["texts"].append(frame[begin : begin + step])
            part.count("strings", strings[begin : begin + step])
            tally.merge(part)
        tallies.append(tally)
    one, other = tallies
    assert one.frame("texts").equals(other.frame("texts")) and one.top("strings", 500, 1) == other.top(
        "strings", 500, 1
    )
    figures = length_figures(counts_of(frame["length"]))
    assert figures and (figures["count"], figures["total"]) == (3000, sum(lengths))
    assert (figures["shortest"], figures["longest"], sum(figures["counts"])) == (min(lengths), max(lengths), 3000)
    exact = sorted(lengths)
    for name, at in (("p50", 1499), ("p90", 2699), ("p99", 2969)):
        assert exact[at] * 0.998 <= figures[name] <= exact[at]  # long ones are rounded to a thousandth
    assert {item["text"]: item["count"] for item in one.top("strings", 500, 1)} == Counter(strings)
    by_role = lengths_by(frame, "role", "length", ["tool", "system"])
    assert list(by_role) == ["tool", "user"] and by_role["user"]["total"] == sum(lengths[::2])


def test_of_many_strings_the_frequent_ones_are_kept_with_a_bound_on_what_is_missed() -> None:
    tally = Tally()
    tally.count("strings", [f"{i:06}" for i in range(NUM_STRINGS + 100) for _ in range(1 + (i < 50))])
    tally.trim()
    assert len(tally.counted("strings")) == NUM_STRINGS and tally.missed["strings"] == 1
    assert tally.top("strings", 50) == [{"text": f"{i:06}", "count": 2} for i in range(50)]


def test_near_duplicates_do_not_count_exact_ones_where_only_some_rows_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(2)
    texts = [" ".join(words(draw, 3) for _ in range(20)) for _ in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts + texts[:20] + texts[:20]))
    monkeypatch.setattr("mmdata.stats.scan.PART_BYTES", path.stat().st_size // 4)
    monkeypatch.setattr("mmdata.pack.part.BATCH_BYTES", 500)
    monkeypatch.setattr("mmdata.stats.scan.ROWS_FOR_NEAR", 40)
    found = stats.measure_file(path).figures["duplicates"]
    assert (found["rows"], found["exact"], found["near"]) == (80, 40, 0) and found["rows_compared"] < 80


def test_cut_lines_say_what_a_limit_costs() -> None:
    draw = random.Random(3)
    values = [draw.randint(1, 3000) for _ in range(500)]
    for cut in cut_lines(pl.Series("value", values).value_counts(), "conversation", [512, 2048]):
        limit = cut["max_len"]
        assert cut["longer"] == sum(v > limit for v in values)
        assert cut["tokens_beyond"] == sum(max(0, v - limit) for v in values)
        assert cut["tokens_in_longer_share"] == pytest.approx(sum(v for v in values if v > limit) / sum(values))
        assert cut["padding_share"] == pytest.approx(1 - sum(min(v, limit) for v in values) / (500 * limit))
        assert 1 - cut["padding_share"] <= cut["packed_fill"] <= 1


def test_the_reports_assets_are_packaged() -> None:
    import tomllib

    root = Path(__file__).resolve().parent.parent
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["package-data"]["mmdata.stats.report"] == ["assets/*", "templates/*"]
    names = {path.name for path in (root / "mmdata/stats/report/assets").iterdir()}
    assert names == {
        "page.css",
        "page.js",
        "uPlot.iife.min.js",
        "uPlot.min.css",
        "uPlot.LICENSE",
        "zh.json",
        "terms.json",
    }
    templates = {path.name for path in (root / "mmdata/stats/report/templates").iterdir()}
    assert templates == {"page.html", "blocks.html", "dataset_card.md"}


def test_every_reason_and_what_helps_is_translated() -> None:
    from mmdata.encode.rows import HELP

    translation = Translation("zh")
    for reason in HELP:
        for key in (reason, f"help: {reason}"):
            assert translation(as_name(reason, key)) != reason, key


def test_every_warning_is_translated() -> None:
    from mmdata.stats.figures import WARNINGS

    assert all(Translation("zh")(text) != text for text in WARNINGS.values())
