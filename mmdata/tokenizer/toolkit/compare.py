"""Two tokenizers and the same text in; how they differ out, and in a sentence whether a model trained with the one may
read what was packed with the other."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmdata.tokenizer.tokenizer import Tokenizer
from mmdata.tokenizer.toolkit.sample import Corpus
from mmdata.tokenizer.vocabulary import Relation, legible, relate, token_texts

NUM_SHOWN = 12
_MOST_WORDS = 200_000  # different words compared, the commonest
# Words as either pattern cuts them, or smaller: what is split differently is shown word by word.
_WORD = re.compile(r" ?[A-Za-z]+| ?\d+|[\u3400-\u9fff]{1,8}|\s+| ?[^\sA-Za-z\d\u3400-\u9fff]+")


def compare(a: Tokenizer, b: Tokenizer, corpus: Corpus) -> dict[str, Any]:
    """Figures of both on the same text, and the verdict; plain and ready for JSON."""
    relation = relate(a, b)
    words: Counter[str] = Counter()
    tokens = [0, 0]
    num_texts = alike = 0
    for _, texts in corpus.groups():
        for text in texts:
            words.update(_WORD.findall(text))
        encoded = [_pieces(each, texts) for each in (a, b)]
        tokens = [have + sum(map(len, found)) for have, found in zip(tokens, encoded, strict=True)]
        alike += sum(one == other for one, other in zip(*encoded, strict=True))
        num_texts += len(texts)
    different, total, examples = _differing_words(a, b, words)
    may_read, sentence = verdict(a, b, relation)
    return {
        "a": str(a.dir),
        "b": str(b.dir),
        "vocab_size": [relation.size_a, relation.size_b],
        "shared_tokens": relation.num_shared,
        "same_ids": relation.same_ids,
        "first_differing_ids": [_sides(a, b, id) for id in (relation.differing or relation.placed)[:3]],
        "text_bytes": corpus.drawn_bytes,
        "tokens": tokens,
        "bytes_per_token": [corpus.drawn_bytes / max(count, 1) for count in tokens],
        "texts": num_texts,
        "texts_split_alike": alike,
        "words_split_differently": different / max(total, 1),
        "examples": examples,
        "control_tokens": {"only_a": _only(a, b), "only_b": _only(b, a)},
        "same_template": a.chat_template == b.chat_template,
        "may_read": may_read,
        "answer": sentence,
    }


def verdict(a: Tokenizer, b: Tokenizer, relation: Relation) -> tuple[bool, str]:
    """Whether a model trained with A may read shards of B, and why in one sentence."""
    names = f"a model trained with {a.dir} may"
    again = f"pack the data again: mm pack FILE --tokenizer {a.dir}"
    if a.sha256 == b.sha256:
        return True, f"Yes: {names} read shards of {b.dir}; both are the same file."
    if relation.b_is_readable:
        but = "" if relation.is_split_alike else ", though it has seen text split differently"
        return True, f"Yes: {names} read shards of {b.dir}; every id is the same token in both{but}."
    if relation.b_extends_a:
        more = len(relation.new_ids)
        return False, (
            f"Not as it is: {b.dir} keeps every id of {a.dir} and has {more:,} more; {names} read its shards once it has "
            "rows for them: mm train STAGE --init RUN --resize-embeddings mean"
        )
    if not relation.differing:
        return (
            False,
            f"No: {b.dir} has ids up to {relation.size_b - 1:,}, the model none past {relation.size_a - 1:,}; {again}",
        )
    control = {*a.control_tokens.values(), *b.control_tokens.values()}
    if set(relation.differing) <= control and relation.size_a == relation.size_b:
        some = ", ".join(f"{one} is {other}" for one, other in (_names(a, b, id) for id in relation.differing[:3]))
        return False, (
            f"Not as it is: text has the same ids in both, but {len(relation.differing)} control tokens are named "
            f"differently ({some}), and templates write them by name; use the files of one of them for both"
        )
    return False, (
        f"No: {len(relation.differing):,} of {min(relation.size_a, relation.size_b):,} ids are different tokens, so the model "
        f"would read other text than was written; {again}"
    )


def _pieces(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Each text's split: the bytes of its tokens, one after another."""
    flat, ends = tokenizer.encode_batch(texts)
    sizes = tokenizer.token_bytes()[flat]
    return [part.tolist() for part in np.split(sizes, ends[:-1])] if len(ends) else []


def _differing_words(a: Tokenizer, b: Tokenizer, words: Counter[str]) -> tuple[int, int, list[dict[str, Any]]]:
    """Occurrences of words that are split differently, of how many, and the commonest of them with both splits."""
    common = words.most_common(_MOST_WORDS)
    splits = [_pieces(each, [word for word, _ in common]) for each in (a, b)]
    differing = [
        (word, count, one, other) for (word, count), one, other in zip(common, *splits, strict=True) if one != other
    ]
    shown = [
        {"text": legible(word.encode()), "count": count, "a": _cut(word, one), "b": _cut(word, other)}
        for word, count, one, other in differing[:NUM_SHOWN]
    ]
    return sum(count for _, count, _, _ in differing), sum(count for _, count in common), shown


def _cut(word: str, sizes: Sequence[int]) -> list[str]:
    data, pieces, begin = word.encode(), [], 0
    for size in sizes:
        pieces.append(legible(data[begin : begin + size]))
        begin += size
    return pieces


def _only(a: Tokenizer, b: Tokenizer) -> list[str]:
    return [token for token in a.control_tokens if token not in b.control_tokens]


def _names(a: Tokenizer, b: Tokenizer, id: int) -> tuple[str, str]:
    one, other = (legible(token_texts(each)[id] or b"") for each in (a, b))
    return one, other


def _sides(a: Tokenizer, b: Tokenizer, id: int) -> dict[str, Any]:
    one, other = _names(a, b, id)
    return {"id": id, "a": one, "b": other}
