"""Writes what the first rank records besides metrics: events, sample answers, and a current report.html.

Sample answers (RUN/samples.jsonl) are the texts that the model generates for fixed prompts after validations. Decoding
is greedy and does not change the state of any random number generator, so a run trains the same without samples.
Samples and reports take at most a share of SHARE of the run's time, without the samples after the last validation.
"""

import time
from pathlib import Path

from mmdata.encode.template import Template
from mmdata.errors import MMError
from mmdata.io.files import write_text
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
BEGINNINGS = ("The sun", "Once upon a time", "人工智能", "在一个")  # texts to be continued, for the stage pretrain
QUESTIONS = ("Who are you?", "What is 3 + 4?", "你好，请介绍一下你自己。", "为什么天空是蓝色的？")


def sample_answers(model: Model, tokenizer: Tokenizer, stage: str, step: int) -> list[Sample]:
    """Return the text that the model generates for each fixed prompt, recorded with `step`: the continuation of
    BEGINNINGS in the stage pretrain, the answer to QUESTIONS in other stages."""
    is_plain = stage == "pretrain"
    prompts, template = (BEGINNINGS, None) if is_plain else (QUESTIONS, Template(tokenizer))
    prompt_ids = [prompt_of(tokenizer, template, text) for text in prompts]
    rows = Engine(model, tokenizer).answer(prompt_ids, Sampling(max_new_tokens=NEW_TOKENS))
    return [Sample(step, prompt, row.text) for prompt, row in zip(prompts, rows, strict=True)]


class Reporter:
    """Writes events.jsonl, samples.jsonl and report.html of a run.
    first_step: steps done before this session; records of later steps are removed from the two jsonl files.
    with_report, with_samples: whether to write these at all."""

    def __init__(self, run_dir: Path, *, first_step: int, with_report: bool, with_samples: bool):
        self._dir = run_dir
        self._with_report, self._with_samples = with_report, with_samples
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
        """Generate sample answers and rewrite the report after a validation, unless this would take more than SHARE of
        the time so far. After the last validation of the run (`is_last`) samples are always generated and the report is
        left to a later `write`. If a prompt cannot be answered, for example because the chat template cannot render a
        user message, an event is recorded and the run continues without samples."""
        begun = time.monotonic()
        if not is_last and self._spent + self._cost > SHARE * (begun - self._begun):
            return
        if self._with_samples:
            try:
                history.append(self._dir / history.SAMPLES, sample_answers(model, tokenizer, stage, step))
            except MMError as error:
                self.event(step, "no samples", error.message)
                self._with_samples = False
        if not is_last:  # the last report is written when the run has ended
            self.write()
        self._cost = time.monotonic() - begun
        self._spent += self._cost

    def write(self) -> None:
        """Write RUN/report.html atomically, if the run was started with a report."""
        if self._with_report:
            write_text(self._dir / REPORT, run_page({"chains": [history.chain(self._dir, self._reader)]}))
