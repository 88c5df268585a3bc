"""Checking everything about a tokenizer that training relies on: `mm tokenizer check`. Takes a second or two. A finding
is ok, note (says what will happen, such as rows being left out) or error (training fails or learns something wrong).
The docstring of a function that makes findings is the rule that it checks."""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from mmdata.encode.encoder import RowEncoder
from mmdata.encode.rows import BadRow, Conversation, Message
from mmdata.encode.sequences import TokenSequence
from mmdata.encode.template import Template
from mmdata.errors import MMError, TokenizerError
from mmdata.io.records import JsonObject
from mmdata.tokenizer import encoders
from mmdata.tokenizer.hostile import hostile_strings
from mmdata.tokenizer.tokenizer import Tokenizer
from mmdata.tokenizer.vocabulary import legible, token_texts

NUM_HOSTILE = 2000
_MARK = re.compile(r"<\|[^|<>\s]{1,40}\|>|</?s>|<(?:bos|eos|pad|unk)>|\[/?INST\]")
_TAG = re.compile(r"</?(?:think|tool_call|tool_response)>")
_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of one check. `level`: ok, note or error. `found`: what was seen. `fix`: what helps; may be empty."""

    check: str
    level: str
    found: str
    fix: str = ""


def check(directory: Path, *, vocab_size: int | None = None) -> list[Finding]:
    """Run all checks on a tokenizer; one error if it cannot be loaded. vocab_size: the model's; None: no such check."""
    try:
        tokenizer = Tokenizer.load(directory)
    except TokenizerError as error:
        return [Finding("files", "error", error.message, error.fix)]
    findings = [Finding("files", "ok", f"{', '.join(tokenizer.files)}; sha256 {tokenizer.sha256[:12]}")]
    findings += _check_ids(tokenizer, vocab_size)
    for run in (
        _check_added,
        _check_special,
        _check_template,
        _check_plain,
        _check_decoding,
        _check_segments,
        _check_fast,
    ):
        findings += run(tokenizer)
    return findings


# --- ids and special tokens

_IDS_FIX = "renumber the tokens in tokenizer.json; `mm tokenizer train` and `extend` write dense ids"
_SIZE_FIX = "train the model with a --model that takes the tokenizer's size, or `mm train --resize-embeddings mean`"


def _check_ids(tokenizer: Tokenizer, vocab_size: int | None) -> Iterator[Finding]:
    """Check that the ids are 0 … n-1, one token each, and below the vocabulary size of the model, if that is given."""
    ids = sorted(tokenizer.native.get_vocab(with_added_tokens=True).values())
    twice = [a for a, b in itertools.pairwise(ids) if a == b]
    gaps = sorted(set(range(ids[-1] + 1)) - set(ids)) if ids else []
    if twice:
        yield Finding("ids", "error", f"id {twice[0]} is given to two tokens", _IDS_FIX)
    elif gaps:
        found = f"{len(ids):,} tokens, but ids up to {ids[-1]:,}: {len(gaps):,} are missing, the first is {gaps[0]:,}"
        yield Finding("ids", "error", found, _IDS_FIX)
    else:
        yield Finding("ids", "ok", f"0 to {ids[-1]:,}, each one token")
    size = tokenizer.vocab_size
    if vocab_size is not None and size > vocab_size:
        token = legible(token_texts(tokenizer)[vocab_size] or b"") or f"the token {vocab_size}"
        found = f"{token} has id {vocab_size:,}; the model has only {vocab_size:,} ids (of {size:,} here)"
        yield Finding("vocabulary size", "error", found, _SIZE_FIX)
    elif vocab_size is not None:
        yield Finding("vocabulary size", "ok", f"{size:,} ids, the model has {vocab_size:,}")


def _check_added(tokenizer: Tokenizer) -> Iterator[Finding]:
    """Check that tokenizer_config.json and tokenizer.json give the added tokens the same ids."""
    config = json.loads(tokenizer.files.get("tokenizer_config.json", b"{}"))
    wrong = []
    for id, token in (config.get("added_tokens_decoder") or {}).items():
        content = token.get("content") if isinstance(token, dict) else None
        native_id = tokenizer.native.token_to_id(content) if isinstance(content, str) else None
        if str(native_id) != str(id):
            wrong.append(f"{content!r} is {id} in tokenizer_config.json and {native_id} in tokenizer.json")
    if wrong:
        fix = 'correct "added_tokens_decoder": transformers would add the token anew'
        yield Finding("added tokens", "error", wrong[0], fix)
    else:
        plain = len(tokenizer.added) - len(tokenizer.control_tokens)
        yield Finding("added tokens", "ok", f"{len(tokenizer.control_tokens)} control, {plain} plain")


def _check_special(tokenizer: Tokenizer) -> Iterator[Finding]:
    """Check that the special tokens that are named have ids, and that bos, eos and pad exist and differ."""
    for name in _NAMES:
        token = tokenizer.special_tokens.get(name)
        if token is not None and tokenizer.native.token_to_id(token) is None:
            yield Finding(name, "error", f"{token!r} has no id", f'name one of its tokens as "{name}"')
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    listed = ", ".join(f"{name} {'none' if id is None else id}" for name, id in ids.items())
    present = [id for id in ids.values() if id is not None]
    level, rest = "note", ": documents are packed without what is missing"
    if tokenizer.bos_id == tokenizer.eos_id:
        rest = ": bos is eos, so a document's begin looks like its end"
    elif len(set(present)) < len(present):
        rest = ": pad is another mark; mm pads nothing, other trainers mask it"
    elif len(present) == len(ids):
        level, rest = "ok", ", distinct"
    yield Finding("bos, eos, pad", level, listed + rest)


# --- the chat template


@dataclass(frozen=True, slots=True)
class _Probe:
    """A test conversation, which must be written whole. `is_needed`: failing is an error, not a note."""

    name: str
    messages: tuple[Message, ...]
    tools: tuple[JsonObject, ...] = ()
    is_needed: bool = False


_USER, _ASSISTANT = Message("user", "Qq first"), Message("assistant", "Aa answer")
_TOOL = {"name": "ff", "description": "Dd does", "parameters": {"type": "object", "properties": {}}}
_CALL = Message("assistant", "", None, ({"name": "ff", "arguments": {"a": "Cc given"}},))
_TWO_TURNS = (_USER, _ASSISTANT, Message("user", "Qq more"), _ASSISTANT)
_PROBES = (
    _Probe("user, assistant", _TWO_TURNS, is_needed=True),
    _Probe("system", (Message("system", "Ss rule"), _USER, _ASSISTANT), is_needed=True),
    _Probe("tool", (_USER, _ASSISTANT, Message("tool", "Tt result"), _ASSISTANT)),
    _Probe("tools", (_USER, _ASSISTANT), (_TOOL,)),
    _Probe("tool calls", (_USER, _CALL, Message("tool", "Tt"), _ASSISTANT), (_TOOL,)),
    _Probe("reasoning", (_USER, Message("assistant", "Aa answer", "Rr because"))),
)
_TEMPLATE_FIX = 'use another "chat_template"; `mm tokenizer train --template minimind3` writes one for all roles'


def _check_template(tokenizer: Tokenizer) -> Iterator[Finding]:
    """Check that the chat template can be used, writes the content of every role, and uses control tokens correctly."""
    try:
        template = Template(tokenizer)
    except MMError as error:
        yield Finding("template", "error", error.message, error.fix)
        return
    kind = "its own" if tokenizer.chat_template else "none: the built-in ChatML"
    yield Finding("template", "ok", f"{kind}; era {template.era}")
    rendered = []
    for probe in _PROBES:
        problem = ""
        try:
            row = Conversation(probe.messages, probe.tools)
            if losses := template.losses(row):
                raise BadRow(*losses[0])
            rendered.append("".join(part.text for part in template.segments(row)))
        except BadRow as bad:
            problem = f"{bad}: rows with it are left out"
        if problem:
            level = "error" if probe.is_needed else "note"
            yield Finding(f"template: {probe.name}", level, problem, _TEMPLATE_FIX)
        else:
            yield Finding(f"template: {probe.name}", "ok", "written whole")
    yield from _check_marks(tokenizer, rendered)
    yield from _check_end_of_turn(tokenizer, template)


def _check_marks(tokenizer: Tokenizer, rendered: Sequence[str]) -> Iterator[Finding]:
    """Check that special-token strings in rendered probes are control tokens, and tags such as <think> one token."""
    written = sorted({mark for text in rendered for mark in _MARK.findall(text)})
    unknown = [mark for mark in written if mark not in tokenizer.control_tokens]
    if unknown:
        id = tokenizer.native.token_to_id(unknown[0])
        what = "no token" if id is None else f"id {id}, but not special"
        found = f"the template writes {unknown[0]}, which is {what}"
        fix = 'add it to "added_tokens" as special, or use the template of this vocabulary'
        yield Finding("template: marks", "error", found, fix)
    else:
        yield Finding("template: marks", "ok", f"{', '.join(written) or 'none'}: control tokens")
    tags = sorted({tag for text in rendered for tag in _TAG.findall(text)})
    torn = [tag for tag in tags if tokenizer.native.token_to_id(tag) is None]
    if torn:
        num_tokens = len(tokenizer.encode_batch([torn[0]])[0])
        found = f"{', '.join(torn)} are not tokens of their own ({torn[0]} is {num_tokens} tokens)"
        fix = f"`mm tokenizer extend {tokenizer.dir} --add '{torn[0]}'` before training; works as it is"
        yield Finding("template: tags", "note", found, fix)


def _check_end_of_turn(tokenizer: Tokenizer, template: Template) -> Iterator[Finding]:
    """Check that the template writes a token or a text after an answer; without it a model never learns to stop."""
    ends = " or ".join(map(repr, template.ends))
    if not ends:
        found = "after an answer the template writes nothing: a model would never stop"
        fix = f"`mm pack --end-of-turn '{tokenizer.eos_token}'` appends a token to each answer"
        yield Finding("template: end of turn", "error", found, fix)
    elif tokenizer.eos_token in template.ends:
        yield Finding("template: end of turn", "ok", f"answers end with {ends}, trained")
    else:
        found = f"answers end with {ends}, trained, and documents with the eos token {tokenizer.eos_token!r}"
        yield Finding("template: end of turn", "note", f"{found}: both stop generation")
    if template.missing_prompt:
        found = f"prompts do not end with {template.missing_prompt!r}, which the template writes before answers"
        yield Finding("template: prompt", "note", found, "nothing to do: `mm pack` adds it to the dataset's template")


# --- text to ids and back


def _check_plain(tokenizer: Tokenizer) -> Iterator[Finding]:
    """Check that a control token's text, written by a user, is never encoded as a control id."""
    ids, _ = tokenizer.encode_batch([f"a{token}b" for token in tokenizer.control_tokens])
    bad = sorted(set(tokenizer.control_tokens.values()) & set(ids.tolist()))
    if bad:
        found = f"become control id {bad[0]}"
        yield Finding("control strings in text", "error", found, "report it: text must stay text")
    else:
        yield Finding("control strings in text", "ok", "stay plain text")


def _check_decoding(tokenizer: Tokenizer) -> Iterator[Finding]:
    """Check that ids decode to their text, at once and token by token. Also count tokens that no text is encoded as."""
    strings = list(hostile_strings(NUM_HOSTILE, tokens=list(tokenizer.control_tokens)))
    flat, ends = tokenizer.encode_batch(strings)
    ids = [flat[begin:end].tolist() for begin, end in itertools.pairwise([0, *ends.tolist()])]
    pairs = [(text, tokenizer.decode(own)) for text, own in zip(strings, ids, strict=True)]
    wrong = [pair for pair in pairs if pair[0] != pair[1]]
    if wrong:
        text, decoded = min(wrong, key=lambda pair: len(pair[0]))
        found = f"{len(wrong):,} of {len(strings):,} hostile strings come back changed, such as {text!r} as {decoded!r}"
        fix = "use a byte-level tokenizer; a normalizer or unknown token changes text"
        yield Finding("decoding", "error", found, fix)
        if num_lost := tokenizer.count_lost_bytes(strings):
            share = num_lost / sum(len(text.encode()) for text in strings)
            found = f"{share:.0%} of the bytes of the hostile strings; `mm pack` counts them and refuses more than 1%"
            yield Finding("unknown characters", "note", found, fix)
        return
    texts = token_texts(tokenizer)
    for text, own in zip(strings, ids, strict=True):
        if b"".join(texts[id] or b"" for id in own) != text.encode():
            found = f"{text!r} is not its tokens' bytes joined, so it cannot be streamed token by token"
            yield Finding("decoding", "error", found, "use a byte-level decoder")
            return
    yield Finding("decoding", "ok", f"{len(strings):,} hostile strings come back exactly")
    dead = [id for id in range(tokenizer.vocab_size) if not _is_reachable(tokenizer, id)]
    if dead:
        some = ", ".join(legible(texts[id] or b"") or f"id {id}" for id in dead[:8])
        found = f"{len(dead):,} token{'s' * (len(dead) != 1)} that no text becomes: {some}"
        yield Finding("dead tokens", "note", found, "they only take room")


def _is_reachable(tokenizer: Tokenizer, id: int) -> bool:
    """Return whether some text is encoded as this token: its own characters must be merged to it. True if added."""
    token = tokenizer.native.id_to_token(id)
    if id in tokenizer.added or token is None:
        return token is not None
    return any(piece.id == id for piece in tokenizer.native.model.tokenize(token))


def _check_segments(tokenizer: Tokenizer) -> Iterator[Finding]:
    """Check that rows encoded in pieces between control tokens, as `mm pack` does, get the ids of the whole text. If
    they cannot (see `Tokenizer.is_exact`), rows are encoded more slowly: a note."""
    if not tokenizer.is_exact:
        found = "rewrites text or eats spaces: rows are encoded whole, by offsets, which is slower"
        yield Finding("segments", "note", found)
        return
    rows = [Conversation(probe.messages, probe.tools) for probe in _PROBES]
    try:
        encoder = RowEncoder(tokenizer, max_len=2**20, is_reference=True)
        encoded = encoder.encode(rows)
        sequences = iter(encoded.sequences)
        for row in (row for i, row in enumerate(rows) if i not in encoded.bad):
            whole = "".join(part.text for part in encoder.segments(row)[0])
            ids = cast(TokenSequence, next(sequences)).ids.tolist()
            if ids != tokenizer.encode_batch([whole], control=True)[0].tolist():
                found = "encoded between control tokens they differ from the whole"
                yield Finding("segments", "error", found, "report it with the tokenizer")
                return
    except MMError:
        return  # the template's finding says why
    found = "encoded between control tokens, as rows are packed, ids equal the whole rendering's"
    yield Finding("segments", "ok", found)


def _check_fast(tokenizer: Tokenizer) -> Iterator[Finding]:
    """Check that the fast encoder gives the ids of the `tokenizers` library; if not, `mm pack` uses the library."""
    result = encoders.check(tokenizer)
    if result.version is None:
        yield Finding("fast encoder", "note", f"{result.name} is not installed", "pip install 'mm-toolkit[fast]'")
    elif result.difference is not None:
        found = f"{result.name} {result.version} differs: {result.difference}"
        yield Finding("fast encoder", "note", found, "nothing to do: `mm pack` then takes the `tokenizers` library")
    else:
        found = f"{result.name} {result.version}: the same ids on {result.num_texts:,} strings"
        yield Finding("fast encoder", "ok", found)
