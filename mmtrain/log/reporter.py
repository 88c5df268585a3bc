"""What a training run tells of itself while it trains: events, what the model says, and a report that stays fresh.

Only the first rank has a Keeper. Reports and samples take at most SHARE of the run's time, but for the last ones.
"""

import json
import time
from pathlib import Path

from mmdata.errors import MMError
from mmdata.tokenizer.tokenizer import Tokenizer
from mmtrain.inference import speak
from mmtrain.log import history
from mmtrain.log.report import run_page, write
from mmtrain.model.model import Model

FILE = "report.html"
SHARE = 0.01  # of a run's time that report and samples may take
FIRST_COST_S = 0.1  # what the first one is taken to cost


class Keeper:
    """Is told events and validations. What would take more than SHARE of the time so far waits for the next validation."""

    def __init__(self, run_dir: Path, *, first_step: int, with_report: bool, with_samples: bool):
        self._dir = run_dir
        self._with_report, self._with_samples = with_report, with_samples
        self._reader = history.Reader()
        self._begun = time.monotonic()
        self._spent = 0.0
        self._cost = FIRST_COST_S
        speak.cut_after(run_dir, first_step)

    def event(self, step: int, what: str, note: str = "") -> None:
        """Something besides a step: "save", "halved", …"""
        with (self._dir / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "event": what, "note": note}, ensure_ascii=False) + "\n")

    def validated(self, step: int, model: Model, tokenizer: Tokenizer, stage: str, *, is_last: bool) -> None:
        """After a validation: let the model speak, and write the report anew. What keeps either from it is no reason to
        end a run; the report then lacks it."""
        begun = time.monotonic()
        if not is_last and self._spent + self._cost > SHARE * (begun - self._begun):
            return
        if self._with_samples:
            try:
                speak.keep(self._dir, step, speak.say(model, tokenizer, stage))
            except MMError as error:
                self.event(step, "no samples", error.message)
                self._with_samples = False
        if not is_last:  # then it is written when the run has ended
            self.write()
        self._cost = time.monotonic() - begun
        self._spent += self._cost

    def write(self) -> None:
        """Write RUN/report.html, where it is wanted; it appears whole or not at all."""
        if not self._with_report:
            return
        write(self._dir / FILE, run_page({"chains": [history.chain(self._dir, self._reader)]}))
