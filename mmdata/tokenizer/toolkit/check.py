"""A tokenizer's directory in; everything a trainer relies on out, each as a finding that is fine, a note, or an error.

A note says what will happen (rows with tools are left out, pad is eos); an error is something that trains a wrong model
or none. Takes a second or two.
"""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdata.encode.encoder import RowEncoder
from mmdata.encode.rows import BadRow, Conversation, Message
from mmdata.encode.template import Template
from mmdata.errors import MMError, TokenizerError
from mmdata.tokenizer import encoders
from mmdata.tokenizer.tokenizer import Tokenizer
from mmdata.tokenizer.toolkit.hostile import hostile_strings
from mmdata.tokenizer.vocabulary import legible, token_texts

NUM_HOSTILE = 2000
_MARK = re.compile(r"<\|[^|<>\s]{1,40}\|>|</?s>|<(?:bos|eos|pad|unk)>|\[/?INST\]")
_TAG = re.compile(r"</?(?:think|tool_call|tool_response)>")
_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `level`: ok, note or error; `fix` says what helps where it is not ok."""

    check: str
    level: str
    found: str
    fix: str = ""


def check(directory: Path, *, vocab_size: int | None = None) -> list[Finding]:
    """Check a tokenizer; `vocab_size` is the model's, when one is meant. A directory that cannot be read is one error."""
    try:
        tokenizer = Tokenizer.load(directory)
    except TokenizerError as error:
        return [Finding("files", "error", error.message, error.fix)]
    findings = [Finding("files", "ok", f"{', '.join(tokenizer.files)}; sha256 {tokenizer.sha256[:12]}")]
    findings += _ids(tokenizer, vocab_size)
    for look in (_added, _special, _template, _plain, _decoding, _joins, _fast):
        findings += look(tokenizer)
    return findings


def _ids(tokenizer: Tokenizer, vocab_size: int | None) -> Iterator[Finding]:
    """Ids are 0 … n-1, one token each, and below the model's vocabulary size."""
    ids = sorted(tokenizer.native.get_vocab(with_added_tokens=True).values())
    twice = sorted({a for a, b in itertools.pairwise(ids) if a == b})
    gaps = sorted(set(range(ids[-1] + 1)) - set(ids)) if ids else []
    if twice:
        yield Finding("ids", "error", f"id {twice[0]} is given to two tokens", _IDS_FIX)
    elif gaps:
        found = f"{len(ids):,} tokens, but ids up to {ids[-1]:,}: {len(gaps):,} are missing, the first is {gaps[0]:,}"
        yield Finding("ids", "error", found, _IDS_FIX)
    else:
        yield Finding("ids", "ok", f"0 to {ids[-1]:,}, each one token")
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        token = _name_of(tokenizer, vocab_size)
        found = (
            f"{token} has id {vocab_size:,}; the model has only {vocab_size:,} ids (of {tokenizer.vocab_size:,} here)"
        )
        yield Finding("vocabulary size", "error", found, _SIZE_FIX)
    elif vocab_size is not None:
        yield Finding("vocabulary size", "ok", f"{tokenizer.vocab_size:,} ids, the model has {vocab_size:,}")


_IDS_FIX = "renumber the tokens in tokenizer.json; `mm tokenizer train` and `extend` write dense ids"
_SIZE_FIX = "train the model with a --model that takes the tokenizer's size, or `mm train --resize-embeddings mean`"


def _added(tokenizer: Tokenizer) -> Iterator[Finding]:
    """tokenizer_config.json and tokenizer.json give the added tokens the same ids, and their kinds."""
    config = json.loads(tokenizer.files.get("tokenizer_config.json", b"{}"))
    wrong = []
    for id, token in (config.get("added_tokens_decoder") or {}).items():
        content = token.get("content") if isinstance(token, dict) else None
        found = tokenizer.native.token_to_id(content) if isinstance(content, str) else None
        if str(found) != str(id):
            wrong.append(f"{content!r} is {id} in tokenizer_config.json and {found} in tokenizer.json")
    if wrong:
        yield Finding(
            "added tokens", "error", wrong[0], 'correct "added_tokens_decoder": transformers would add the token anew'
        )
    else:
        plain = len(tokenizer.added) - len(tokenizer.control_tokens)
        yield Finding("added tokens", "ok", f"{len(tokenizer.control_tokens)} control, {plain} plain")


def _special(tokenizer: Tokenizer) -> Iterator[Finding]:
    """bos, eos and pad are tokens, and distinct or said not to be."""
    for name in _NAMES:
        token = tokenizer.special_tokens.get(name)
        if token is not None and tokenizer.native.token_to_id(token) is None:
            yield Finding(name, "error", f"{token!r} has no id", f'name one of its tokens as "{name}"')
    marks = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    said = ", ".join(f"{name} {'none' if id is None else id}" for name, id in marks.items())
    given = [id for id in marks.values() if id is not None]
    if tokenizer.bos_id == tokenizer.eos_id:
        yield Finding("bos, eos, pad", "note", f"{said}: bos is eos, so a document's begin looks like its end")
    elif len(set(given)) < len(given):
        yield Finding("bos, eos, pad", "note", f"{said}: pad is another mark; mm pads nothing, other trainers mask it")
    elif len(given) < len(marks):
        yield Finding("bos, eos, pad", "note", f"{said}: documents are packed without what is missing")
    else:
        yield Finding("bos, eos, pad", "ok", f"{said}, distinct")


# --- the template

_ASK, _TELL = Message("user", "Qq first"), Message("assistant", "Aa answer")
_TOOL = {"name": "ff", "description": "Dd does", "parameters": {"type": "object", "properties": {}}}
# What rows may hold: messages with what must be seen of them, tools, and whether a model cannot do without it.
_PROBES: tuple[tuple[str, tuple[Message, ...], tuple[dict[str, Any], ...], tuple[str, ...], bool], ...] = (
    ("user, assistant", (_ASK, _TELL, Message("user", "Qq more"), _TELL), (), ("Qq first", "Qq more", "Aa answer"), True),
    ("system", (Message("system", "Ss rule"), _ASK, _TELL), (), ("Ss rule", "Qq first"), True),
    ("tool", (_ASK, _TELL, Message("tool", "Tt result"), _TELL), (), ("Tt result",), False),
    ("tools", (_ASK, _TELL), (_TOOL,), ("Dd does",), False),
    (
        "tool calls",
        (_ASK, Message("assistant", "", None, ({"name": "ff", "arguments": {"a": "Cc given"}},)), Message("tool", "Tt"), _TELL),
        (_TOOL,),
        ("Cc given",),
        False,
    ),
    ("reasoning", (_ASK, Message("assistant", "Aa answer", "Rr because")), (), ("Rr because",), False),
)  # fmt: skip


def _template(tokenizer: Tokenizer) -> Iterator[Finding]:
    """The template shows every role, writes tokens that exist, and ends answers with eos."""
    try:
        template = Template(tokenizer)
    except MMError as error:
        yield Finding("template", "error", error.message, error.fix)
        return
    kind = "its own" if tokenizer.chat_template else "none: the built-in ChatML"
    yield Finding("template", "ok", f"{kind}; era {template.era}")
    rendered = []
    for name, messages, tools, texts, is_needed in _PROBES:
        problem = ""
        try:
            text = "".join(part.text for part in template.segments(Conversation(messages, tools)))
            rendered.append(text)
            lost = next((part for part in texts if part not in text), "")
            problem = f"{lost!r} is not written: rows are packed without it" if lost else ""
        except BadRow as bad:
            problem = f"{bad}: rows with it are left out"
        if not problem:
            yield Finding(f"template: {name}", "ok", "written whole")
        elif is_needed:
            yield Finding(f"template: {name}", "error", problem, _TEMPLATE_FIX)
        else:
            yield Finding(f"template: {name}", "note", problem, _TEMPLATE_FIX)
    yield from _marks(tokenizer, rendered)
    yield from _end_of_turn(tokenizer, template)


_TEMPLATE_FIX = 'use another "chat_template"; `mm tokenizer train --template minimind3` writes one for all roles'


def _marks(tokenizer: Tokenizer, rendered: Sequence[str]) -> Iterator[Finding]:
    """Marks that the template writes are single tokens: control ones where they guard turns."""
    written = sorted({mark for text in rendered for mark in _MARK.findall(text)})
    unknown = [mark for mark in written if mark not in tokenizer.control_tokens]
    if unknown:
        id = tokenizer.native.token_to_id(unknown[0])
        found = (
            f"the template writes {unknown[0]}, which is {'no token' if id is None else f'id {id}, but not special'}"
        )
        yield Finding(
            "template: marks",
            "error",
            found,
            'add it to "added_tokens" as special, or use the template of this vocabulary',
        )
    else:
        yield Finding("template: marks", "ok", f"{', '.join(written) or 'none'}: control tokens")
    tags = sorted({tag for text in rendered for tag in _TAG.findall(text)})
    torn = [tag for tag in tags if tokenizer.native.token_to_id(tag) is None]
    if torn:
        pieces = len(tokenizer.encode_batch([torn[0]])[0])
        yield Finding(
            "template: tags", "note", f"{', '.join(torn)} are not tokens of their own ({torn[0]} is {pieces} tokens)",
            f"`mm tokenizer extend {tokenizer.dir} --add '{torn[0]}'` before training; works as it is",
        )  # fmt: skip


def _end_of_turn(tokenizer: Tokenizer, template: Template) -> Iterator[Finding]:
    """An answer's trained part holds eos, or a model never learns to stop."""
    trained = [part for part in template.segments(Conversation((_ASK, _TELL))) if part.is_trained]
    after = [part.text for part in trained if "Aa answer" not in part.text]
    if tokenizer.eos_token in after:
        yield Finding("template: end of turn", "ok", f"answers end with {tokenizer.eos_token}, trained")
    else:
        found = f"after an answer the template writes {''.join(after)!r}, without the eos token {tokenizer.eos_token}"
        yield Finding("template: end of turn", "error", found, 'name the token that ends a turn as "eos_token"')


# --- text


def _plain(tokenizer: Tokenizer) -> Iterator[Finding]:
    """What a user writes never becomes a control id."""
    texts = [f"a{token}b" for token in tokenizer.control_tokens]
    ids, _ = tokenizer.encode_batch(texts)
    control = set(tokenizer.control_tokens.values())
    bad = sorted(control & set(ids.tolist()))
    if bad:
        yield Finding(
            "control strings in text", "error", f"become control id {bad[0]}", "report it: text must stay text"
        )
    else:
        yield Finding("control strings in text", "ok", "stay plain text")


def _decoding(tokenizer: Tokenizer) -> Iterator[Finding]:
    """Ids give the text back, all at once and streamed."""
    strings = list(hostile_strings(NUM_HOSTILE, control=list(tokenizer.control_tokens)))
    flat, ends = tokenizer.encode_batch(strings)
    wrong, begin = [], 0
    for text, end in zip(strings, ends.tolist(), strict=True):
        if tokenizer.decode(flat[begin:end]) != text:
            wrong.append((text, tokenizer.decode(flat[begin:end])))
        begin = end
    if wrong:
        text, back = min(wrong, key=lambda pair: len(pair[0]))
        found = f"{len(wrong):,} of {len(strings):,} hostile strings come back changed, such as {text!r} as {back!r}"
        yield Finding(
            "decoding", "error", found, "use a byte-level tokenizer; a normalizer or unknown token changes text"
        )
        return
    texts, begin = token_texts(tokenizer), 0
    for text, end in zip(strings, ends.tolist(), strict=True):
        if b"".join(texts[id] or b"" for id in flat[begin:end]) != text.encode():
            found = f"{text!r} is not its tokens' bytes joined, so it cannot be streamed token by token"
            yield Finding("decoding", "error", found, "use a byte-level decoder")
            return
        begin = end
    unreachable = [id for id in range(tokenizer.vocab_size) if not _is_reachable(tokenizer, id)]
    yield Finding("decoding", "ok", f"{len(strings):,} hostile strings come back exactly")
    if unreachable:
        some = ", ".join(legible(texts[id] or b"") or f"id {id}" for id in unreachable[:8])
        yield Finding(
            "dead tokens", "note", f"{len(unreachable):,} tokens that no text becomes: {some}", "they only take room"
        )


def _is_reachable(tokenizer: Tokenizer, id: int) -> bool:
    """Whether the token is what its own characters are merged to."""
    token = tokenizer.native.id_to_token(id)
    if id in tokenizer.added:
        return True
    if token is None:
        return False
    return any(piece.id == id for piece in tokenizer.native.model.tokenize(token))


def _joins(tokenizer: Tokenizer) -> Iterator[Finding]:
    """Encoding between control tokens gives the ids of the whole rendering, which is how rows are packed."""
    if not tokenizer.is_exact:
        yield Finding(
            "segments", "note", "rewrites text or eats spaces: rows are encoded whole, by offsets, which is slower"
        )
        return
    try:
        encoder = RowEncoder(tokenizer, max_len=2**20)
        rows = [Conversation(messages, tools) for _, messages, tools, _, _ in _PROBES]
        encoded = [item for item in encoder.encode(rows) if not isinstance(item, BadRow)]
        joint = [
            tokenizer.encode_batch(["".join(part.text for part in encoder.segments(row)[0])], control=True)[0].tolist()
            for row, item in zip(rows, encoder.encode(rows), strict=True)
            if not isinstance(item, BadRow)
        ]
        apart = [item.sequences[0].ids.tolist() for item in encoded]  # type: ignore[index]
    except MMError:
        return  # the template's finding says why
    if apart != joint:
        yield Finding(
            "segments",
            "error",
            "encoded between control tokens they differ from the whole",
            "report it with the tokenizer",
        )
    else:
        yield Finding(
            "segments", "ok", "encoded between control tokens, as rows are packed, ids equal the whole rendering's"
        )


def _fast(tokenizer: Tokenizer) -> Iterator[Finding]:
    """The fast encoder gives the library's own ids; where it does not, `mm pack` takes the library's."""
    found = encoders.check(tokenizer)
    if found.version is None:
        yield Finding("fast encoder", "note", f"{found.name} is not installed", "pip install 'mm-toolkit[fast]'")
    elif found.difference is not None:
        what = f"{found.name} {found.version} differs: {found.difference}"
        yield Finding("fast encoder", "note", what, "nothing to do: `mm pack` then takes the `tokenizers` library")
    else:
        yield Finding(
            "fast encoder", "ok", f"{found.name} {found.version}: the same ids on {found.num_texts:,} strings"
        )


def _name_of(tokenizer: Tokenizer, id: int) -> str:
    return legible((token_texts(tokenizer)[id] if id < tokenizer.vocab_size else None) or b"") or f"the token {id}"
