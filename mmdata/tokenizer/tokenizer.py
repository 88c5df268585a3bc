"""Loading a tokenizer, turning text into ids and back, and training small BPE tokenizers for the demo and tests. A
special-token string in a text (such as "<|im_end|>") is encoded as ordinary text unless control tokens are asked for,
so what a user writes never becomes a control id."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from mmdata.errors import TokenizerError
from mmdata.io.files import read_bytes, refuse_pointer
from mmdata.io.records import JsonObject
from mmdata.tokenizer import chat_template as templates
from mmdata.tokenizer.chat_template import CHATML, DEFAULT, FOLDER

_FILES = ("tokenizer.json", "tokenizer_config.json", templates.FILE, "generation_config.json")
_KEEPING = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Prepend", "ByteLevel"}  # normalizers that drop no characters
_AGAIN = "copy or download it again"  # fix of a damaged file
_MOST_IDS = 2**24  # lists of this length fit in memory; published vocabularies have at most 300,000


class Tokenizer:
    """A `tokenizers.Tokenizer` (`native`) with its special ids, control tokens, chat templates and hashes.

    `files`: contents by path of tokenizer.json and, if they exist, tokenizer_config.json, generation_config.json,
    chat_template.jinja and additional_chat_templates/. `chat_templates`: by name; `chat_template`: the one for
    conversations without tools. `eos_ids`: the eos token's id, then those in generation_config.json. `added`: tokens
    matched as a whole, by id. `control_tokens`: the special ones among them, text -> id, which only templates write.
    `vocab_size`: the largest id plus 1. None: no such token or template.
    """

    def __init__(self, dir: Path, files: dict[str, bytes]) -> None:
        """Make a tokenizer of the contents of `files`. dir: for messages. Raises TokenizerError if a file is malformed
        or no eos token is named."""
        self.dir = dir
        self.files = files
        self.sha256 = hashlib.sha256(files["tokenizer.json"]).hexdigest()
        self._config = config = _read_json(dir, files, "tokenizer_config.json")
        self.special_tokens = {
            name: token
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
            if (token := _token_text(config.get(name)))
        }
        named = *self.special_tokens.values(), *_extra_tokens(config)
        try:
            self.native, self.vocab_size = _parsed(files["tokenizer.json"], named)
        except BaseException as error:  # the native library raises bare Exception, and panics as a BaseException
            if isinstance(error, KeyboardInterrupt):
                raise
            refuse_pointer(dir / "tokenizer.json", files["tokenizer.json"], TokenizerError)
            raise TokenizerError(f"{dir / 'tokenizer.json'} is not a tokenizer: {error}", _AGAIN) from error
        self.added = self.native.get_added_tokens_decoder()
        self.control_tokens = {token.content: id for id, token in sorted(self.added.items()) if token.special}
        self.bos_token = self.special_tokens.get("bos_token", "")
        self.eos_token = self.special_tokens.get("eos_token", "")
        self.bos_id, self.eos_id, self.pad_id = (
            self.native.token_to_id(self.special_tokens[name]) if name in self.special_tokens else None
            for name in ("bos_token", "eos_token", "pad_token")
        )
        if self.eos_id is None:
            problem = f"its eos token {self.eos_token!r} has no id" if self.eos_token else "it names no eos token"
            raise TokenizerError(
                f"tokenizer {dir}: {problem}", 'name one of its tokens as "eos_token" in tokenizer_config.json'
            )
        more = _read_json(dir, files, "generation_config.json").get("eos_token_id")
        more = [id for id in (more if isinstance(more, list) else [more]) if type(id) is int]
        self.eos_ids = [*dict.fromkeys(id for id in [self.eos_id, *more] if 0 <= id < self.vocab_size)]
        self.chat_templates = templates.templates_in(config, files)
        self.chat_template = self.chat_templates.get(DEFAULT)
        named = json.dumps(self.chat_templates) if self.chat_templates.keys() - {DEFAULT} else self.chat_template
        self.template_sha256 = hashlib.sha256((named or CHATML).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and (self.dir, self.files) == (other.dir, other.files)

    def __hash__(self) -> int:
        return hash((self.sha256, self.template_sha256))

    @classmethod
    def load(cls, dir: Path) -> "Tokenizer":
        """Read a tokenizer from a directory. Raises TokenizerError for a missing, unreadable or unusable file."""
        files = {}
        for name in (*_FILES, *(f"{FOLDER}/{path.name}" for path in sorted((Path(dir) / FOLDER).glob("*.jinja")))):
            try:
                files[name] = read_bytes(Path(dir) / name)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise TokenizerError(
                    f"{Path(dir) / name}: {error.strerror}", "give the directory that holds tokenizer.json"
                ) from error
        if "tokenizer.json" not in files:
            problem = "has no tokenizer.json" if Path(dir).is_dir() else "is not a directory"
            raise TokenizerError(
                f"tokenizer {dir} {problem}",
                "give a directory with tokenizer.json and tokenizer_config.json as --tokenizer",
            )
        return cls(Path(dir), files)

    @property
    def asks_for_date(self) -> bool:
        """Whether a chat template writes the current date."""
        return any(map(templates.asks_for_date, self.chat_templates.values()))

    def amended(self, *, end_of_turn: str = "", date: str = "", generation_prompt: str = "") -> "Tokenizer":
        """Return this tokenizer with chat templates that write the token `end_of_turn` after each answer, `date`
        (YYYY-MM-DD, else UsageError) as the current date, and `generation_prompt` at the end of prompts, unless they do
        already. Raises TokenizerError if a template cannot be changed."""

        def change(text: str) -> str:
            text = templates.with_end_of_turn(text, end_of_turn) if end_of_turn else text
            text = templates.with_generation_prompt(text, generation_prompt) if generation_prompt else text
            return templates.with_date(text, date) if date else text

        is_same = all(change(text) == text for text in self.chat_templates.values())
        return self if is_same else Tokenizer(self.dir, templates.changed(self._config, self.files, change))

    @property
    def _definition(self) -> JsonObject:
        """The content of tokenizer.json, without the vocabulary and the merges."""
        return _definition_in(self.files["tokenizer.json"])

    @property
    def decoder(self) -> str:
        """The type of the decoder in tokenizer.json, such as ByteLevel; empty if it has none."""
        return (self._definition.get("decoder") or {}).get("type", "")

    @cached_property
    def is_exact(self) -> bool:
        """Whether the pieces of text between control tokens, encoded alone, get the same ids as all at once: True for
        byte-level tokenizers that do not strip spaces next to added tokens, and find these before they normalize
        text (to NFC, as Qwen's do) or do not normalize it."""
        is_plain = not any(token.lstrip or token.rstrip or token.single_word for token in self.added.values())
        is_composed = {one["type"] for one in self._normalizers} == {"NFC"}
        is_normal = is_composed and not any(token.normalized for token in self.added.values())
        return is_plain and (is_normal or self.keeps_text) and self.decoder == "ByteLevel"

    @property
    def keeps_text(self) -> bool:
        """Whether text is not normalized."""
        return not self._normalizers

    def num_bytes(self, id: int) -> int:
        """Return the number of UTF-8 bytes that a token of a byte-level tokenizer stands for."""
        return len(self.added[id].content.encode()) if id in self.added else len(self.native.id_to_token(id) or "")

    @property
    def _normalizers(self) -> list[JsonObject]:
        """The normalizers of tokenizer.json, those of a sequence one by one."""
        normalizer = self._definition.get("normalizer") or {}
        return normalizer.get("normalizers", [normalizer] * bool(normalizer))

    @cached_property
    def unknown_id(self) -> int | None:
        """The id that the tokenizer's model gives to characters that it does not know; None if it has none."""
        model = self._definition["model"]
        id = model.get("unk_id")
        return self.native.token_to_id(model.get("unk_token") or "") if id is None else id

    @cached_property
    def may_lose_text(self) -> bool:
        """Whether characters may be dropped or become the unknown token: not with a token for each byte and a
        normalizer that drops no characters."""
        for one in self._normalizers:
            replaces_space = one.get("pattern") == {"String": " "} and one.get("content")
            if one["type"] not in _KEEPING and not replaces_space:
                return True
        if self.decoder == "ByteLevel":
            return not self._knows_all(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        falls_back = self._definition["model"].get("byte_fallback")
        return not (falls_back and self._knows_all(f"<0x{n:02X}>" for n in range(256)))

    def _knows_all(self, tokens: Iterable[str]) -> bool:
        return all(self.native.token_to_id(token) is not None for token in tokens)

    def count_lost_bytes(self, texts: Sequence[str], *, control: bool = False) -> int:
        """Return the UTF-8 bytes of the texts, without white space, that no or the unknown token stands for; see
        `encode_batch`."""
        if not self.may_lose_text:
            return 0
        self.native.encode_special_tokens = not control
        num_bytes = 0
        for text, encoding in zip(texts, self.native.encode_batch(list(texts), add_special_tokens=False), strict=True):
            is_lost = np.ones(len(text), bool)
            for id, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
                is_lost[begin:end] &= id == self.unknown_id
            num_bytes += sum(len(text[i].encode()) for i in np.flatnonzero(is_lost).tolist() if not text[i].isspace())
        return num_bytes

    @property
    def added_texts(self) -> list[str]:
        """The text of every added token in the order of ids: control tokens and others such as <think>."""
        return [token.content for _, token in sorted(self.added.items())]

    def encode_batch(self, texts: Sequence[str], *, control: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of all texts end to end (uint32) and the end of each text's ids (int64), in one native call.
        control: whether special-token strings become control ids; otherwise they are encoded as ordinary text."""
        self.native.encode_special_tokens = not control
        with self.refusing_panics():
            encodings = self.native.encode_batch_fast(list(texts), add_special_tokens=False)
        lists = [encoding.ids for encoding in encodings]
        ends = np.cumsum(np.fromiter(map(len, lists), dtype=np.int64, count=len(lists)))
        total = int(ends[-1]) if lists else 0
        return np.fromiter(chain.from_iterable(lists), dtype=np.uint32, count=total), ends

    def encode_with_offsets(self, text: str, *, control: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids (uint32 [T]) and the characters [begin, end) of each (int64 [T, 2]); see `encode_batch`."""
        self.native.encode_special_tokens = not control
        with self.refusing_panics():
            encoding = self.native.encode(text, add_special_tokens=False)
        return np.array(encoding.ids, dtype=np.uint32), np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)

    def decode(self, ids: Iterable[int], *, skip_control: bool = False) -> str:
        """Return the text of some ids; invalid UTF-8 becomes U+FFFD. skip_control: leave out control tokens."""
        return self.native.decode([int(id) for id in ids], skip_special_tokens=skip_control)

    @contextmanager
    def refusing_panics(self) -> Iterator[None]:
        """Raise TokenizerError for a panic of the native tokenizer, such as of a pattern that takes too long."""
        try:
            yield
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # no Exception, and in no module that can be imported
                raise
            problem = str(error).partition("\n")[0]
            raise TokenizerError(f"tokenizer {self.dir} cannot encode a text: {problem}", _AGAIN) from error

    def save(self, dir: Path) -> None:
        """Write the files that the tokenizer was loaded from, byte for byte, to `dir`. Creates `dir` if missing."""
        for name, content in self.files.items():
            (dir / name).parent.mkdir(parents=True, exist_ok=True)
            (dir / name).write_bytes(content)


def train_bpe(
    texts: Iterable[str],
    *,
    vocab_size: int,
    control_tokens: Sequence[str],
    chat_template: str,
    out_dir: Path,
    split_digits: bool = True,
) -> Tokenizer:
    """Train a byte-level BPE tokenizer, write it to `out_dir` and return it. The same texts give the same files.
    control_tokens: at least three, with the ids 0, 1, 2 …; the first is pad and unk, the second bos, the third eos.
    split_digits: whether every digit is a token of its own."""
    assert len(control_tokens) >= 3, "pad, bos and eos"
    native = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    native.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, byte_level]) if split_digits else byte_level
    native.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(control_tokens),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    native.train_from_iterator(texts, trainer)
    pad, bos, eos = control_tokens[:3]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "unk_token": pad,
        "additional_special_tokens": list(control_tokens[3:]),
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
        "chat_template": chat_template,
    }
    files = {
        "tokenizer.json": native.to_str(pretty=False).encode(),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2).encode(),
    }
    tokenizer = Tokenizer(out_dir, files)
    tokenizer.save(out_dir)
    return tokenizer


@lru_cache(maxsize=2)
def _parsed(content: bytes, named: tuple[str, ...]) -> tuple[tokenizers.Tokenizer, int]:
    """Return the native tokenizer of a tokenizer.json and its `vocab_size`. Cached, because large ones take a second.
    named: texts that become special tokens if the tokenizer knows them."""
    native = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    native.no_padding()
    native.no_truncation()
    native.post_processor = None  # it would add tokens and trim offsets; templates write special tokens
    native.add_special_tokens([token for token in named if native.token_to_id(token) is not None])
    size = max(native.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if size > _MOST_IDS:
        raise ValueError(f"its largest id is {size - 1:,}, expected below {_MOST_IDS:,}")
    return native, size


@lru_cache(maxsize=2)
def _definition_in(content: bytes) -> JsonObject:
    """Return the content of a tokenizer.json, without the vocabulary and the merges."""
    definition = json.loads(content)
    definition["model"] = {k: v for k, v in definition["model"].items() if k not in ("vocab", "merges")}
    return definition


def _read_json(dir: Path, files: dict[str, bytes], name: str) -> JsonObject:
    """Return the content of a JSON file, empty for a missing one. Raises TokenizerError if it is not a JSON object."""
    try:
        config = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{dir / name} is not JSON: {error}", _AGAIN) from error
    if not isinstance(config, dict):
        raise TokenizerError(f"{dir / name} is not a JSON object", _AGAIN)
    return config


def _token_text(token: Any) -> str:
    """Return the text of a special token, given as a string or as an object with `content`; empty for anything else."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def _extra_tokens(config: JsonObject) -> list[str]:
    """Return the texts of `additional_special_tokens`, or else `extra_special_tokens`, of tokenizer_config.json."""
    extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    return [_token_text(token) for token in (extra.values() if isinstance(extra, dict) else extra)]
