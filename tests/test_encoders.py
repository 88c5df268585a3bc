"""Fast encoders are used only where they agree with `tokenizers`; and no dataset depends on which one was."""

import json
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import eras
import numpy as np
import pytest
import text_data
from pack_data import write_rows

from mmdata.errors import TokenizerError, UsageError
from mmdata.pack.options import PackOptions
from mmdata.pack.pipeline import pack
from mmdata.tokenizer import encoders
from mmdata.tokenizer.encoders import check, choose, find_difference, hostile_texts
from mmdata.tokenizer.tokenizer import Tokenizer


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "_checks", {})


def lying(about: str) -> Callable[[Tokenizer], Any]:
    """An encoder that gives one more token for texts with `about` in them."""

    def make(tokenizer: Tokenizer) -> Any:
        def encode(texts: Sequence[str], control: bool) -> tuple[np.ndarray, np.ndarray]:
            parts = np.split(*tokenizer.encode_batch(texts, control=control))[: len(texts)]
            parts = [np.append(p, p[:1]) if about in text else p for p, text in zip(parts, texts, strict=True)]
            return np.concatenate(parts), np.cumsum([len(part) for part in parts])

        return encode

    return make


def missing(name: str) -> str:
    if name == "fastokens":
        raise metadata.PackageNotFoundError(name)
    return "1"


@pytest.mark.parametrize("how", [{}, {"merges_newlines": True}, {"lstrip": True}])
@pytest.mark.parametrize("name", ["seed", "era3"])
def test_the_fast_encoder_gives_the_references_ids_on_all_hostile_strings(name: str, how: dict[str, bool]) -> None:
    found = check(eras.tokenizer(name, **how), ["one more"])
    assert found.is_exact and found.num_texts > encoders.NUM_HOSTILE


def test_the_hostile_strings_are_the_same_every_time_and_hold_what_breaks_encoders() -> None:
    texts = hostile_texts(("<s>", "</s>"))
    assert texts == hostile_texts(("<s>", "</s>"))
    whole = "".join(texts)
    assert all(piece in whole for piece in ("<s>", "\u0301", "\r\n", "\U0001f600", "\x00", " " * 300, "\u3000", "'ll"))
    assert len(set(texts)) > 900
    whole.encode()  # no half of a surrogate pair


def test_a_character_that_the_libraries_split_differently_gets_the_references_ids(tmp_path: Path) -> None:
    tokenizer = text_data.trained(tmp_path, pattern="digits")
    assert check(tokenizer, ["  \u180e", "a \u180e b"]).is_exact


def test_hostile_strings_are_compared_although_some_hold_that_character(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = eras.tokenizer("era3")
    native = encoders._native(tokenizer.native)

    class Wrong:
        def encode_batch_flat(self, texts: list[str], **options: bool) -> Any:
            return native.encode_batch_flat([text.replace("'ll", "") for text in texts], **options)

    monkeypatch.setattr(encoders, "_native", lambda _: Wrong())
    assert "'ll" in str(check(tokenizer).difference)


def test_an_encoder_with_other_ids_is_not_taken_and_says_on_which_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "_fastokens", lying("'ll"))
    chosen = choose(eras.tokenizer("era3"))
    assert chosen.is_reference and "'ll" in chosen.warning and "fastokens" in chosen.warning
    with pytest.raises(TokenizerError, match="other ids than tokenizers"):
        choose(eras.tokenizer("era3"), "fastokens")
    assert "'ll" in str(check(eras.tokenizer("era3")).difference)


def test_fastokens_is_loaded_anew_before_its_words_take_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, loaded = eras.tokenizer("era3"), []
    native = encoders._native(tokenizer.native)

    def load(_: Any) -> Any:
        loaded.append(1)
        return native

    load.cache_clear = lambda: loaded.append(0)  # type: ignore[attr-defined]
    monkeypatch.setattr(encoders, "_native", load)
    monkeypatch.setattr(encoders, "RENEWED", 10)
    monkeypatch.setattr(encoders, "RENEWED_PER_ID", 0)
    encode = encoders._fastokens(tokenizer)
    for text, renewals in (("eight ch", 0), ("four", 0), ("longer than ten", 1), ("", 2), ("a", 2)):
        assert np.array_equal(encode([text], False)[0], tokenizer.encode_batch([text], control=False)[0])
        assert loaded == [1, *[0, 1] * renewals], text


def test_a_native_refusal_is_a_difference_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tokenizer: Tokenizer) -> Any:
        raise ValueError("unknown pre-tokenizer")

    monkeypatch.setattr(encoders, "_fastokens", refuse)
    chosen = choose(eras.tokenizer("era3"))
    assert chosen.is_reference and "unknown pre-tokenizer" in chosen.warning


def test_without_the_extra_the_reference_encodes_and_asking_for_it_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metadata, "version", missing)
    chosen = choose(eras.tokenizer("era3"))
    assert chosen.is_reference and not chosen.warning
    with pytest.raises(UsageError) as caught:
        choose(eras.tokenizer("era3"), "fastokens")
    assert "mm-toolkit[fast]" in caught.value.fix
    with pytest.raises(UsageError, match="no such choice"):
        choose(eras.tokenizer("era3"), "nope")


def test_a_difference_is_found_wherever_it_stands() -> None:
    tokenizer = eras.tokenizer("era3")
    assert find_difference(tokenizer, lying("needle")(tokenizer), ["a", "b", "", "c"]) is None
    assert find_difference(tokenizer, lying("needle")(tokenizer), ["a", "b needle", "c"]) == "on 'b needle'"


@pytest.mark.parametrize("kind", ["document", "conversation", "pair"])
def test_a_dataset_does_not_depend_on_the_encoder(tmp_path: Path, tokenizer_dir: Path, kind: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", kind, 120)
    digests = []
    for name in ("tokenizers", "fastokens"):
        result = pack([path], tmp_path / name, PackOptions(tokenizer=tokenizer_dir, max_len=64, encoder=name))
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        (entry,) = manifest["encoders"]
        assert entry["name"].startswith(f"{name} ") and entry["parts"] == 1 and entry["given_up"] == 0
        assert entry["rows_compared"] >= 16
        assert list(result.encoders) == [entry["name"]]
        digests.append((result.digest, (tmp_path / name / "parts.jsonl").read_text()))
    assert digests[0] == digests[1]


def test_a_part_whose_rows_differ_is_packed_the_slow_way_with_a_warning(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", "document", 60)
    want = pack([path], tmp_path / "want", PackOptions(tokenizer=tokenizer_dir, encoder="tokenizers"))
    monkeypatch.setattr(encoders, "_fastokens", lying("灯塔"))
    said: list[str] = []
    got = pack([path], tmp_path / "got", PackOptions(tokenizer=tokenizer_dir), note=said.append)
    assert got.digest == want.digest
    assert any("rows.jsonl line" in line and "warning" in line for line in said)
    (entry,) = json.loads((tmp_path / "got" / "manifest.json").read_text())["encoders"]
    assert entry["given_up"] == 1 and entry["name"].startswith("tokenizers")
