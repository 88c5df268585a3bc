"""How two tokenizers, A and B, split the same text, and whether a model of one can use data packed with the other."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmdata.tokenizer.tokenizer import Tokenizer
from mmdata.tokenizer.toolkit.sample import TextSample
from mmdata.tokenizer.vocabulary import Relation, legible, relate, token_bytes, token_texts

NUM_SHOWN = 12
_MAX_WORDS = 200_000  # only the most frequent words are compared, this many different ones
# Differences are counted and shown by word. These words are never larger than those that the pre-tokenizers cut.
_WORD = re.compile(r" ?[A-Za-z]+| ?\d+|[\u3400-\u9fff]{1,8}|\s+| ?[^\sA-Za-z\d\u3400-\u9fff]+")


@dataclass(frozen=True, slots=True)
class IdPair:
    """An id, and the token that it is in A and in B, in readable form."""

    id: int
    a: str
    b: str


@dataclass(frozen=True, slots=True)
class WordSplit:
    """A word that A and B split differently: its number of occurrences in the text, and its tokens in A and in B."""

    text: str
    count: int
    a: list[str]
    b: list[str]


@dataclass(frozen=True, slots=True)
class Comparison:
    """All figures of A and B, by the keys of `mm tokenizer compare --json`. Pairs are A's value, then B's. `may_read`:
    a model trained with A may read shards packed with B; `answer`: why."""

    a: str
    b: str
    vocab_size: tuple[int, int]
    shared_tokens: int  # tokens that both have, with the same id or not
    same_ids: int  # ids that are the same token in both
    first_differing_ids: list[IdPair]
    text_bytes: int
    tokens: list[int]
    bytes_per_token: list[float]
    texts: int  # number of texts compared
    texts_split_alike: int
    words_split_differently: float  # share of the occurrences of the words compared
    examples: list[WordSplit]
    control_tokens: dict[str, list[str]]  # keys "only_a" and "only_b": those that the other does not have
    same_template: bool
    may_read: bool
    answer: str


def compare(a: Tokenizer, b: Tokenizer, sample: TextSample) -> Comparison:
    """Compare two vocabularies id by id, and how both tokenizers split the texts of the sample."""
    relation = relate(a, b)
    words: Counter[str] = Counter()
    tokens = [0, 0]
    num_texts = num_alike = 0
    for _, texts in sample.groups():
        for text in texts:
            words.update(_WORD.findall(text))
        splits = [_token_sizes(each, texts) for each in (a, b)]
        tokens = [total + sum(map(len, split)) for total, split in zip(tokens, splits, strict=True)]
        num_alike += sum(one == other for one, other in zip(*splits, strict=True))
        num_texts += len(texts)
    num_different, examples = _differing_words(a, b, words)
    num_words = sum(count for _, count in words.most_common(_MAX_WORDS))
    may_read, answer = verdict(a, b, relation)
    return Comparison(
        a=str(a.dir),
        b=str(b.dir),
        vocab_size=(relation.size_a, relation.size_b),
        shared_tokens=relation.num_shared,
        same_ids=relation.same_ids,
        first_differing_ids=[_id_pair(a, b, id) for id in (relation.differing or relation.placed)[:3]],
        text_bytes=sample.drawn_bytes,
        tokens=tokens,
        bytes_per_token=[sample.drawn_bytes / max(count, 1) for count in tokens],
        texts=num_texts,
        texts_split_alike=num_alike,
        words_split_differently=num_different / max(num_words, 1),
        examples=examples,
        control_tokens={
            "only_a": [token for token in a.control_tokens if token not in b.control_tokens],
            "only_b": [token for token in b.control_tokens if token not in a.control_tokens],
        },
        same_template=a.chat_template == b.chat_template,
        may_read=may_read,
        answer=answer,
    )


def verdict(a: Tokenizer, b: Tokenizer, relation: Relation) -> tuple[bool, str]:
    """Return whether a model trained with A may read shards packed with B, and why. relation: of `relate(a, b)`."""
    names = f"a model trained with {a.dir} may"
    again = f"pack the data again: mm pack FILE --tokenizer {a.dir}"
    if a.sha256 == b.sha256:
        return True, f"Yes: {names} read shards of {b.dir}; both are the same file."
    if relation.b_is_readable:
        but = "" if relation.is_split_alike else ", though it has seen text split differently"
        return True, f"Yes: {names} read shards of {b.dir}; every id is the same token in both{but}."
    if relation.b_extends_a:
        return False, (
            f"Not as it is: {b.dir} keeps every id of {a.dir} and has {len(relation.new_ids):,} more; {names} read its "
            "shards once it has rows for them: mm train STAGE --init RUN --resize-embeddings mean"
        )
    if not relation.differing:
        last_a, last_b = relation.size_a - 1, relation.size_b - 1
        return False, f"No: {b.dir} has ids up to {last_b:,}, the model none past {last_a:,}; {again}"
    control = {*a.control_tokens.values(), *b.control_tokens.values()}
    if set(relation.differing) <= control and relation.size_a == relation.size_b:
        pairs = [_id_pair(a, b, id) for id in relation.differing[:3]]
        return False, (
            f"Not as it is: text has the same ids in both, but {len(relation.differing)} control tokens are named "
            f"differently ({', '.join(f'{pair.a} is {pair.b}' for pair in pairs)}), and templates write them by name; "
            "use the files of one of them for both"
        )
    return False, (
        f"No: {len(relation.differing):,} of {min(relation.size_a, relation.size_b):,} ids are different tokens, so the "
        f"model would read other text than was written; {again}"
    )


def _token_sizes(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Return the bytes of each token of each text; tokenizers split a text alike if these lists are equal."""
    flat, ends = tokenizer.encode_batch(texts)
    sizes = token_bytes(tokenizer)[flat]
    return [part.tolist() for part in np.split(sizes, ends[:-1])] if len(ends) else []


def _differing_words(a: Tokenizer, b: Tokenizer, words: Counter[str]) -> tuple[int, list[WordSplit]]:
    """Return how many occurrences of words are split differently, and the NUM_SHOWN most frequent of these words.
    words: occurrences by word, of which the _MAX_WORDS most frequent are compared."""
    common = words.most_common(_MAX_WORDS)
    splits = [_token_sizes(each, [word for word, _ in common]) for each in (a, b)]
    differing = [
        (word, count, one, other) for (word, count), one, other in zip(common, *splits, strict=True) if one != other
    ]
    examples = [
        WordSplit(legible(word.encode()), count, _cut(word, one), _cut(word, other))
        for word, count, one, other in differing[:NUM_SHOWN]
    ]
    return sum(count for _, count, _, _ in differing), examples


def _cut(word: str, sizes: Sequence[int]) -> list[str]:
    """Return the word cut into pieces of these numbers of bytes, in readable form."""
    data, ends = word.encode(), np.cumsum(sizes).tolist()
    return [legible(data[end - size : end]) for size, end in zip(sizes, ends, strict=True)]


def _id_pair(a: Tokenizer, b: Tokenizer, id: int) -> IdPair:
    return IdPair(id, *(legible(token_texts(each)[id] or b"") for each in (a, b)))
