"""Writes what the first rank records besides metrics: events, sample answers, and a current report.html.

Sample answers (RUN/samples.jsonl) are generated after validations for the same few prompts, taken from the validation
rows, greedily and without changing any random state, so a run trains the same without samples. They and reports take at
most a share of SHARE of the run's time, without the samples after the last validation.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import numpy as np

from mmdata.encode.reference import common_length
from mmdata.encode.rows import Message
from mmdata.encode.template import Template
from mmdata.errors import MMError
from mmdata.io.files import write_text
from mmdata.shards.dataset import Dataset, PackView, PairView
from mmdata.tokenizer.tokenizer import Tokenizer
from mmtrain.inference.chat import prompt_of
from mmtrain.inference.engine import Engine
from mmtrain.inference.settings import Sampling
from mmtrain.log import history
from mmtrain.log.history import Event, Sample
from mmtrain.log.report import run_page
from mmtrain.model.model import Model

REPORT = "report.html"
SHARE = 0.01  # the largest share of the run's time that samples and reports may take
FIRST_COST_S = 0.1  # assumed duration of the first samples and report, in seconds
NEW_TOKENS = 40  # the most tokens of a sample answer
NUM_PROMPTS = 4
LONGEST_PROMPT = 200  # characters of a question
NUM_BEGINNING = 6  # tokens of a text that is to be continued
NUM_SEARCHED = 64  # samples of each dataset, and prompts in them, from which NUM_PROMPTS different ones are taken
# Texts to be continued and questions, for datasets without validation rows of which the prompts could be taken.
BEGINNINGS = ("The sun", "Once upon a time", "人工智能", "在一个")
QUESTIONS = ("Who are you?", "What is 3 + 4?", "你好，请介绍一下你自己。", "为什么天空是蓝色的？")


def prompts_of(datasets: Iterable[Dataset], tokenizer: Tokenizer, stage: str) -> list[str]:
    """Return NUM_PROMPTS different prompts: beginnings of validation documents for the stage pretrain, otherwise the
    questions of validation rows that begin with one; BEGINNINGS or QUESTIONS where there are too few of them."""
    is_plain = stage == "pretrain"
    samples = chain.from_iterable(islice(dataset.split("val").samples(), NUM_SEARCHED) for dataset in datasets)
    try:
        found = _beginnings(samples, tokenizer) if is_plain else _questions(samples, tokenizer)
        fitting = (text for text in found if text.strip() and len(text) <= LONGEST_PROMPT)
        texts = list(islice(fitting, NUM_SEARCHED))
    except MMError:  # the chat template cannot render a user message
        texts = []
    return list(dict.fromkeys([*texts, *(BEGINNINGS if is_plain else QUESTIONS)]))[:NUM_PROMPTS]


def _beginnings(samples: Iterable[PackView], tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the first NUM_BEGINNING tokens of each document, as text."""
    for pack in samples:
        for begin, length in zip(np.cumsum(pack.doc_len) - pack.doc_len, pack.doc_len, strict=True):
            ids = pack.ids[begin : begin + min(NUM_BEGINNING, length)]
            yield tokenizer.decode(ids.tolist(), skip_control=True).rstrip("\ufffd")


def _questions(samples: Iterable[PackView | PairView], tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the first question of each conversation and pair whose prompt is this question alone."""
    template = Template(tokenizer)
    one, other = (template.prompt_ids(tokenizer, [Message("user", text)]) for text in ("a", "b"))
    num_before = common_length(np.array(one), np.array(other))
    num_after = common_length(np.array(one[::-1]), np.array(other[::-1]))
    for ids in chain.from_iterable(map(_prompts, samples)):
        text = tokenizer.decode(ids[num_before : len(ids) - num_after])
        if ids == template.prompt_ids(tokenizer, [Message("user", text)]):
            yield text


def _prompts(sample: PackView | PairView) -> Iterator[list[int]]:
    """Yield the ids before the first trained token of each sequence of a pack, or the prompt of a pair."""
    if isinstance(sample, PairView):
        yield sample.prompt.tolist()
        return
    ends = np.cumsum(sample.doc_len)
    first_trained = sample.span[::2]
    for begin, end in zip(ends - sample.doc_len, ends, strict=True):
        trained = first_trained[(first_trained >= begin) & (first_trained < end)]
        yield sample.ids[begin : trained[0] if len(trained) else begin].tolist()


def sample_answers(model: Model, tokenizer: Tokenizer, stage: str, step: int, prompts: Sequence[str]) -> list[Sample]:
    """Return the text that the model generates for each prompt, recorded with `step`: its continuation in the stage
    pretrain, the answer to it in other stages."""
    template = None if stage == "pretrain" else Template(tokenizer)
    prompt_ids = [prompt_of(tokenizer, template, text) for text in prompts]
    rows = Engine(model, tokenizer).answer(prompt_ids, Sampling(max_new_tokens=NEW_TOKENS))
    return [Sample(step, prompt, row.text) for prompt, row in zip(prompts, rows, strict=True)]


class Reporter:
    """Writes events.jsonl, samples.jsonl and report.html (`with_report`) of a run. first_step: steps done before this
    session; later records are removed. prompts: of the sample answers; none are generated without any."""

    def __init__(self, run_dir: Path, *, first_step: int, with_report: bool, prompts: Sequence[str]):
        self._dir = run_dir
        self._with_report, self._prompts = with_report, prompts
        self._reader = history.RunReader()
        self._begun = time.monotonic()
        self._spent = 0.0  # seconds that all samples and reports took
        self._cost = FIRST_COST_S  # seconds that the last ones took
        for name in (history.SAMPLES, history.EVENTS):
            history.cut_after(run_dir / name, first_step)

    def event(self, step: int, event: str, note: str = "") -> None:
        """Append an event, such as "save" or "halved", to events.jsonl. note: a text that describes it further."""
        history.append(self._dir / history.EVENTS, [Event(step, event, note)])

    def validated(self, step: int, model: Model, tokenizer: Tokenizer, stage: str, *, is_last: bool) -> None:
        """After a validation, generate sample answers and rewrite the report, unless this would take more than SHARE of
        the time so far. After the run's last one (`is_last`) samples are always generated and the report is left to
        `write`. If a prompt cannot be answered, as by a chat template without user messages, an event is recorded and
        samples end."""
        begun = time.monotonic()
        if not is_last and self._spent + self._cost > SHARE * (begun - self._begun):
            return
        if self._prompts:
            try:
                samples = sample_answers(model, tokenizer, stage, step, self._prompts)
                history.append(self._dir / history.SAMPLES, samples)
            except MMError as error:
                self.event(step, "no samples", error.message)
                self._prompts = ()
        if not is_last:  # the last report is written when the run has ended
            self.write()
        self._cost = time.monotonic() - begun
        self._spent += self._cost

    def write(self) -> None:
        """Write RUN/report.html atomically, if the run was started with a report."""
        if self._with_report:
            write_text(self._dir / REPORT, run_page({"chains": [history.chain(self._dir, self._reader)]}))
