"""Every check passes on whole tokenizers and fails, with what was found and what helps, on one broken in its way."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import endings
import eras
import pytest
import text_data

from mmdata.encode.encoder import EncodedRows, RowEncoder
from mmdata.tokenizer import encoders
from mmdata.tokenizer.tokenizer import Tokenizer
from mmdata.tokenizer.toolkit.check import NUM_HOSTILE, Finding, check
from mmdata.tokenizer.vocabulary import token_texts

Parts = dict[str, Any]


@pytest.fixture(autouse=True)
def fewer_strings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the hostile strings where one fault is looked for; what `train` writes must pass them all."""
    if "what_train_writes" not in request.node.name:
        monkeypatch.setattr("mmdata.tokenizer.toolkit.check.NUM_HOSTILE", NUM_HOSTILE // 10)
        monkeypatch.setattr(encoders, "NUM_HOSTILE", encoders.NUM_HOSTILE // 10)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return text_data.trained(tmp_path).dir


def edited(directory: Path, out: Path, change: Callable[[Parts, Parts], None]) -> Path:
    """A copy with tokenizer.json and tokenizer_config.json changed."""
    shutil.copytree(directory, out)
    parts, config = (json.loads((out / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json"))
    change(parts, config)
    (out / "tokenizer.json").write_text(json.dumps(parts))
    (out / "tokenizer_config.json").write_text(json.dumps(config))
    return out


def levels(findings: list[Finding], level: str) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings if finding.level == level}


@pytest.mark.parametrize("template", ["chatml", "minimind2", "minimind3"])
def test_what_train_writes_passes_every_check(tmp_path: Path, template: str) -> None:
    findings = check(text_data.trained(tmp_path, template=template).dir, vocab_size=6400)
    assert levels(findings, "error") == {}
    assert {"ids", "vocabulary size", "added tokens", "bos, eos, pad", "template", "decoding", "segments"} <= levels(
        findings, "ok"
    ).keys()
    if template == "minimind3":
        assert levels(findings, "note") == {}


def test_a_directory_without_a_tokenizer_is_one_error(tmp_path: Path) -> None:
    (finding,) = check(tmp_path)
    assert (finding.check, finding.level) == ("files", "error") and finding.fix


def _gap(parts: Parts, config: Parts) -> None:
    parts["model"]["vocab"]["zz"] = 9999


def _twice(parts: Parts, config: Parts) -> None:
    parts["model"]["vocab"]["zz"] = 300


def _wrong_id(parts: Parts, config: Parts) -> None:
    config["added_tokens_decoder"]["99"] = config["added_tokens_decoder"].pop("25")


def _no_pad(parts: Parts, config: Parts) -> None:
    config["pad_token"] = "<nope>"


def _no_unk(parts: Parts, config: Parts) -> None:
    config["unk_token"] = "<nope>"


def _no_bos_token(parts: Parts, config: Parts) -> None:
    config["bos_token"] = "<nope>"


def _merged_to_control(parts: Parts, config: Parts) -> None:
    """A merge that writes a control token's id: what a user types becomes it."""
    added = parts["added_tokens"]
    added.append(added[0] | {"id": parts["model"]["vocab"]["Th"], "content": "Th"})
    config["added_tokens_decoder"][str(added[-1]["id"])] = {key: added[-1][key] for key in added[-1] if key != "id"}


def _no_end(parts: Parts, config: Parts) -> None:
    config["chat_template"] = "{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' + m.content }}{% endfor %}"


def _other_eos(parts: Parts, config: Parts) -> None:
    config["eos_token"] = "<|endoftext|>"


def _syntax(parts: Parts, config: Parts) -> None:
    config["chat_template"] = "{% for"


def _no_system(parts: Parts, config: Parts) -> None:
    config["chat_template"] = (
        "{% for m in messages %}{% if m.role != 'system' %}"
        "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    )


def _unknown_mark(parts: Parts, config: Parts) -> None:
    config["chat_template"] = (
        "{% for m in messages %}{{ '<|turn|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    )


def _plain_mark(parts: Parts, config: Parts) -> None:
    """A mark that is in the vocabulary, but that text may become: <|buffer1|> is not special."""
    config["chat_template"] = (
        "{% for m in messages %}{{ '<|buffer1|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    )


def _lower(parts: Parts, config: Parts) -> None:
    parts["normalizer"] = {"type": "Lowercase"}


def _no_byte(parts: Parts, config: Parts) -> None:
    """A byte without a token: text that holds it is lost."""
    vocab = parts["model"]["vocab"]
    byte = next(token for token, id in vocab.items() if id == 36 + 200)
    vocab["xx-not-a-byte"] = vocab.pop(byte)
    parts["model"]["merges"] = [m for m in parts["model"]["merges"] if byte not in "".join(m)]


@pytest.mark.parametrize(
    ("change", "name", "words"),
    [
        (_gap, "ids", "421 tokens, but ids up to 9,999: 9,579 are missing, the first is 420"),
        (_twice, "ids", "id 300 is given to two tokens"),
        (_wrong_id, "added tokens", "'<think>' is 99 in tokenizer_config.json and 25 in tokenizer.json"),
        (_no_pad, "pad_token", "'<nope>' has no id"),
        (_no_unk, "unk_token", "'<nope>' has no id"),
        (_no_bos_token, "bos_token", "'<nope>' has no id"),
        (_merged_to_control, "control strings in text", "become control id"),
        (_no_end, "template: end of turn", "writes nothing"),
        (_syntax, "template", "its chat template cannot be used"),
        (_no_system, "template: system", "message 1 (system)"),
        (_unknown_mark, "template: marks", "<|turn|>, which is no token"),
        (_plain_mark, "template: marks", "<|buffer1|>, which is id 27, but not special"),
        (_lower, "decoding", "come back changed, such as"),
        (_no_byte, "decoding", "come back changed, such as"),
    ],
)  # fmt: skip
def test_each_check_fails_on_what_it_is_for(
    whole: Path, tmp_path: Path, change: Callable[[Parts, Parts], None], name: str, words: str
) -> None:
    findings = check(edited(whole, tmp_path / "edited", change))
    errors = levels(findings, "error")
    assert name in errors, findings
    assert words in errors[name].found and errors[name].fix


def test_an_eos_token_that_ends_no_answer_is_a_note(whole: Path, tmp_path: Path) -> None:
    found = levels(check(edited(whole, tmp_path / "edited", _other_eos)), "note")["template: end of turn"].found
    assert found.startswith("answers end with '<|im_end|>', trained, and documents with the eos token '<|endoftext|>'")


def test_ids_past_the_models_vocabulary_are_named(whole: Path) -> None:
    found = levels(check(whole, vocab_size=400), "error")["vocabulary size"]
    assert "has id 400; the model has only 400 ids (of 420 here)" in found.found and "--resize-embeddings" in found.fix


def _pad_is_eos(parts: Parts, config: Parts) -> None:
    config["pad_token"] = "<|im_end|>"


def _bos_is_eos(parts: Parts, config: Parts) -> None:
    config["bos_token"] = "<|im_end|>"


def _no_bos(parts: Parts, config: Parts) -> None:
    del config["bos_token"]


@pytest.mark.parametrize(
    ("change", "words"),
    [(_pad_is_eos, "pad is another mark"), (_bos_is_eos, "bos is eos"), (_no_bos, "bos none")],
)
def test_marks_that_are_not_distinct_are_said(
    whole: Path, tmp_path: Path, change: Callable[[Parts, Parts], None], words: str
) -> None:
    findings = check(edited(whole, tmp_path / "edited", change))
    assert words in levels(findings, "note")["bos, eos, pad"].found
    assert "bos, eos, pad" not in levels(findings, "error")


def _dead(parts: Parts, config: Parts) -> None:
    parts["model"]["vocab"]["qqqq"] = 420


def test_a_token_no_text_becomes_is_a_note(whole: Path, tmp_path: Path) -> None:
    found = levels(check(edited(whole, tmp_path / "edited", _dead)), "note")["dead tokens"]
    assert found.found == "1 token that no text becomes: qqqq"


def test_what_a_template_leaves_out_is_a_note_with_the_consequence() -> None:
    notes = levels(check(eras.directory("seed")), "note")
    lost = "content lost: message 3 (tool): 'Tt result': rows with it are left out"
    assert lost in notes["template: tool"].found
    assert notes["template: reasoning"].found.startswith("reasoning lost: message 2 (assistant): 'Rr because'")
    assert all(notes[name].fix for name in ("template: tool", "template: tools", "template: reasoning"))


def test_a_tokenizer_that_eats_spaces_is_packed_whole_and_says_so() -> None:
    assert "by offsets" in levels(check(eras.directory("chatml", lstrip=True)), "note")["segments"].found


def test_a_tokenizer_that_merges_newlines_passes() -> None:
    findings = check(eras.directory("chatml", merges_newlines=True))
    assert "segments" in levels(findings, "ok") and levels(findings, "error") == {}


def test_other_ids_between_control_tokens_than_of_the_whole_are_an_error(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = RowEncoder.encode

    def shifted(self: RowEncoder, rows: list[Any]) -> EncodedRows:
        encoded = encode(self, rows)
        encoded.sequences.ids[-1] += 1
        return encoded

    monkeypatch.setattr(RowEncoder, "encode", shifted)
    assert "differ from the whole" in levels(check(whole), "error")["segments"].found


def test_tokens_that_are_not_the_texts_bytes_are_an_error(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder may give text back from all ids that it cannot give token by token, as chat streams it."""
    texts = token_texts(Tokenizer.load(whole))
    monkeypatch.setattr(
        "mmdata.tokenizer.toolkit.check.token_texts",
        lambda tokenizer: [None if text == b"a" else text for text in texts],
    )
    assert "cannot be streamed token by token" in levels(check(whole), "error")["decoding"].found


def test_tags_that_are_torn_are_a_note(tmp_path: Path) -> None:
    found = levels(check(text_data.trained(tmp_path, template="minimind2").dir), "note")["template: tags"]
    assert "<tool_call>" in found.found and "mm tokenizer extend" in found.fix


@pytest.mark.parametrize(
    ("version", "difference", "level", "said"),
    [
        (None, None, "note", "not installed"),
        ("9", "other ids for 'x'", "note", "other ids for 'x'"),
        ("9", None, "ok", "the same ids on 7 strings"),
    ],
)
def test_the_fast_encoder_is_held_to_the_library(
    whole: Path, monkeypatch: pytest.MonkeyPatch, version: str | None, difference: str | None, level: str, said: str
) -> None:
    found = encoders.EncoderCheck("fastokens", version, 7, difference)
    monkeypatch.setattr(encoders, "check", lambda tokenizer: found)
    finding = levels(check(whole), level)["fast encoder"]
    assert said in finding.found and bool(finding.fix) == (level != "ok")


def test_a_template_without_generation_prompt_is_a_note() -> None:
    found = levels(check(endings.directory("no_generation_prompt")), "note")["template: prompt"].found
    assert found.startswith("prompts do not end with '<|im_start|>assistant\\n'")
