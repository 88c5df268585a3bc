"""What the first rank of a training run records besides metrics: events, sample answers, and an up-to-date report.html.

Sample answers (RUN/samples.jsonl) show what the model writes for fixed prompts at each validation. They are greedy and
touch no random state, so a run with them trains exactly as one without. Samples and reports together take at most SHARE
of the run's time, except after the last validation.
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
SHARE = 0.01  # of the run's time
FIRST_COST_S = 0.1  # assumed for the first samples and report
NEW_TOKENS = 40
BEGINNINGS = ("The sun", "Once upon a time", "人工智能", "在一个")  # to be continued, for pretraining
QUESTIONS = ("Who are you?", "What is 3 + 4?", "你好，请介绍一下你自己。", "为什么天空是蓝色的？")


def sample_answers(model: Model, tokenizer: Tokenizer, stage: str, step: int) -> list[Sample]:
    """The model's text for each fixed prompt: continued in pretraining, answered in sft and dpo."""
    is_plain = stage == "pretrain"
    prompts, template = (BEGINNINGS, None) if is_plain else (QUESTIONS, Template(tokenizer))
    prompt_ids = [prompt_of(tokenizer, template, text) for text in prompts]
    rows = Engine(model, tokenizer).answer(prompt_ids, Sampling(max_new_tokens=NEW_TOKENS))
    return [Sample(step, prompt, row.text) for prompt, row in zip(prompts, rows, strict=True)]


class Reporter:
    """Writes events.jsonl, samples.jsonl and report.html of a run. Samples and report wait for the next validation where
    they would exceed SHARE of the time so far."""

    def __init__(self, run_dir: Path, *, first_step: int, with_report: bool, with_samples: bool):
        self._dir = run_dir
        self._with_report, self._with_samples = with_report, with_samples
        self._reader = history.RunReader()
        self._begun = time.monotonic()
        self._spent = 0.0
        self._cost = FIRST_COST_S
        for name in (history.SAMPLES, history.EVENTS):
            history.cut_after(run_dir / name, first_step)

    def event(self, step: int, event: str, note: str = "") -> None:
        """Record an event such as "save" or "halved"."""
        history.append(self._dir / history.EVENTS, [Event(step, event, note)])

    def validated(self, step: int, model: Model, tokenizer: Tokenizer, stage: str, *, is_last: bool) -> None:
        """After a validation: sample answers and rewrite the report. A prompt that cannot be answered, such as with a
        template without user turns, ends the samples and not the run."""
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
        """Write RUN/report.html, if it is wanted; it appears whole or not at all."""
        if self._with_report:
            write_text(self._dir / REPORT, run_page({"chains": [history.chain(self._dir, self._reader)]}))
