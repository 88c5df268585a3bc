"""Executes the steps of a recipe: each as a process of its own, recorded in course.json, skipped if its inputs and outputs
are those of the record, resumed if it was interrupted."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmdata.commands.terminal import say, without_option
from mmdata.errors import CheckpointError, DatasetError, UsageError
from mmtrain.commands.project.recipe import Recipe, Step

if TYPE_CHECKING:
    from mmtrain.records import CourseRecord, StepRecord

COURSE = "course.json"
PROGRAM = Path(__file__).parents[3] / "cli.py"
DONE, RUNNING, INTERRUPTED, FAILED = "done", "running", "interrupted", "failed"
ALONE: Mapping[str, str | None] = dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))  # no rank
WAIT_S = 0.5  # between looks at the record, on ranks that wait for the first one
Launch = Callable[..., "Ended"]


@dataclass(frozen=True)
class Ended:
    """How a command ended. code: its exit code. out, err: what it wrote to stdout and stderr, if they were captured."""

    code: int
    out: str = ""
    err: str = ""


def launch(
    argv: Sequence[str],
    directory: Path,
    *,
    stdin: str = "",
    is_captured: bool = False,
    is_quiet: bool = False,
    changes: Mapping[str, str | None] | None = None,
    on_start: Callable[[int], None] = lambda _: None,
) -> Ended:
    """Execute `mm ARGV` in a process of its own in a directory and wait for it. Its output goes to stderr, unless it is
    captured. is_quiet: capture what it prints to stderr too. changes: to the environment; None removes a variable. on_start:
    called with the process's id. SIGINT and SIGTERM are passed on, and raised as KeyboardInterrupt when it has ended."""
    environment = {name: value for name, value in {**os.environ, **(changes or {})}.items() if value is not None}
    processes: list[subprocess.Popen[str]] = []
    signals: list[int] = []

    def pass_on(number: int, _frame: object) -> None:
        signals.append(number)
        for process in processes:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        process = subprocess.Popen(
            [sys.executable, str(PROGRAM), *argv],
            cwd=directory,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if is_captured else sys.stderr,
            stderr=subprocess.PIPE if is_quiet else None,
            start_new_session=True,  # Ctrl-C would reach it twice
            encoding="utf-8",
            errors="replace",
        )
        processes.append(process)
        if signals:  # before the process was there to get them
            process.send_signal(signals[-1])
        on_start(process.pid)
        out, err = process.communicate(stdin)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if signals:
        raise KeyboardInterrupt
    return Ended(process.returncode if process.returncode >= 0 else 128 - process.returncode, out or "", err or "")


@dataclass
class Runner:
    """Executes a recipe in the directory `root`, with the record in `out`. nproc: ranks of training steps.
    defaults: of options in mm.toml, by command. launch: starts a command."""

    recipe: Recipe
    root: Path
    out: Path
    nproc: int = 1
    defaults: Mapping[str, Any] = field(default_factory=dict)
    launch: Launch = field(default_factory=lambda: launch)
    rank: int = field(default_factory=lambda: int(os.environ.get("RANK", "0")))

    def __post_init__(self) -> None:
        self.record = self.read()

    def read(self) -> "CourseRecord":
        """Return the record of earlier runs of the recipe; an empty one if there is none."""
        from mmdata.io.records import read_record
        from mmtrain.records import CourseRecord

        path = self.out / COURSE
        if not path.exists():
            return CourseRecord(recipe=self.recipe.name)
        return read_record(path, CourseRecord, UsageError, f"remove {path}; finished steps are then done again")

    def write(self) -> None:
        """Write the record, on the first rank."""
        from mmdata.io.records import write_record

        if self.rank == 0:
            write_record(self.out / COURSE, self.record)

    # --- what is done already

    def key(self, step: Step) -> str:
        """Return the hash of a step's words and of the content of what it reads."""
        found = {text: self.fingerprint(self.root / text) for text in step.inputs if (self.root / text).exists()}
        defaults = {step.command[0]: self.defaults[step.command[0]]} if step.command[0] in self.defaults else {}
        return hashlib.sha256(json.dumps([step.argv, step.stdin, found, defaults], default=str).encode()).hexdigest()

    def outputs(self, step: Step) -> dict[str, str]:
        """Return the fingerprint of each path that the step writes; empty for what is missing."""
        return {path: self.fingerprint(self.root / path) for path in step.outputs}

    def is_done(self, step: Step) -> bool:
        """Whether the step was finished with these words and inputs, and its outputs are still those it wrote."""
        known = self.record.steps.get(step.name)
        if known is None or known.status != DONE or known.key != self.key(step):
            return False
        return known.outputs == self.outputs(step)

    def fingerprint(self, path: Path) -> str:
        """Return a hash of what is at a path: the digest of a packed dataset, the hash of a run's newest weights, the
        sha256 of a file (remembered with its size and time), those of a directory's files; empty if nothing is there."""
        from mmdata.io.files import sha256_of
        from mmdata.shards.manifest import MANIFEST, read_manifest
        from mmtrain.records import RUN, newest_state

        if (path / MANIFEST).exists():
            with suppress(DatasetError):
                return read_manifest(path).dataset_digest
            return ""
        if (path / RUN).exists():
            state = newest_state(path)
            return state.weights_sha256 if state else ""
        if path.is_dir():
            files = {each.name: self.fingerprint(each) for each in sorted(path.iterdir()) if each.is_file()}
            return hashlib.sha256(json.dumps(files).encode()).hexdigest() if files else ""
        if not path.is_file():
            return ""
        stat = path.stat()
        name, now = os.path.abspath(path), (stat.st_size, stat.st_mtime_ns)
        known = self.record.files.get(name)
        if known is None or known[:2] != now:
            known = self.record.files[name] = (*now, sha256_of(path))
        return known[2]

    # --- execution

    def run(self, steps: Iterable[Step]) -> int:
        """Execute the steps that are not done yet, in order; `mm fetch` always, as it looks at every file itself. Return
        0, or the exit code of the one that failed. Raise KeyboardInterrupt if one was interrupted."""
        if self.rank == 0:
            self._stop_orphans()
        for number, step in enumerate(steps, 1):
            if self.is_done(step) and (self.rank or step.command != ("fetch",)):
                say(f"{step.name}: done before")
            elif self.rank and step.command != ("train",):
                self._wait_for(step)
            elif code := self._execute(step, number):
                if step.name == step.base:
                    return code
                say(f"note: {step.name} failed; the report goes without it")
        return 0

    def _wait_for(self, step: Step) -> None:
        """Wait until the first rank has done a step, or failed in one that ends nothing; torchrun ends this process if that
        one fails in another."""
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # on another node
            say(f"{step.name}: rank 0 does it; every machine must see its record, {self.out / COURSE}")
        while not self.is_done(step):
            known = self.record.steps.get(step.name)
            if step.name != step.base and known is not None and known.status == FAILED:
                return
            time.sleep(WAIT_S)
            self.record = self.read()

    def _execute(self, step: Step, number: int) -> int:
        """Execute one step and record it; return its exit code."""
        from mmtrain.records import StepRecord

        key, before = self.key(step), self.record.steps.get(step.name)
        argv = self._resuming(step, before if before and before.key == key else None)
        record = StepRecord(key=key, argv=list(step.argv), begun=time.time())
        if before and before.key == key and before.status != DONE:
            record.seconds, record.attempts = before.seconds, before.attempts + 1
        self.record.steps[step.name] = record
        self.write()
        say(f"-- {step.name}: mm {' '.join(argv)}")
        environment = ALONE
        if step.command == ("train",):
            environment = self._ranks(number)
            argv += ["--nproc", str(self.nproc)] if self.nproc > 1 else []
        begun = time.monotonic()

        def close(status: str) -> None:
            record.status, record.process = status, None
            record.seconds += time.monotonic() - begun
            record.outputs, record.bytes = self.outputs(step), sum(map(self._size, step.places))
            self.write()

        try:
            ended = self.launch(
                argv,
                self.root,
                stdin=step.stdin,
                is_captured=step.is_captured,
                changes=environment,
                on_start=lambda pid: self._started(record, pid),
            )
        except KeyboardInterrupt:
            close(INTERRUPTED)
            raise
        record.printed = ended.out
        if ended.code == 0 and step.command == ("train",) and not self._is_finished(step):
            close(INTERRUPTED)
            raise KeyboardInterrupt
        close(FAILED if ended.code else DONE)
        return ended.code

    def _started(self, record: "StepRecord", pid: int) -> None:
        """Record the process of a step, so that a later run can end it if this one is killed."""
        import psutil

        with suppress(psutil.NoSuchProcess):
            record.process = (pid, psutil.Process(pid).create_time())
            self.write()

    def _stop_orphans(self) -> None:
        """End the process of a step whose `mm run` was killed, and wait until it has saved."""
        import psutil

        for name, record in self.record.steps.items():
            with suppress(psutil.Error, TypeError):
                process = psutil.Process(record.process[0])  # type: ignore[index]
                # Not by the time it was created: that changes when the clock is set.
                is_it = process.cmdline()[1:3] == [str(PROGRAM), *record.argv[:1]]
                if is_it and Path(process.cwd()) == self.root.resolve():
                    say(f"{name}: still running from an mm run that was killed; ending it")
                    process.terminate()
                    process.wait()

    def _resuming(self, step: Step, interrupted: "StepRecord | None") -> list[str]:
        """Return the words that execute a step: for a training step whose run is there, those that resume it. A run
        without a checkpoint is begun again; one of other settings or data is moved aside. Raise CheckpointError for a
        run that the recipe did not make."""
        argv = list(step.argv)
        if step.command != ("train",):
            return argv
        run = self.root / step.outputs[0]
        if interrupted and any(run.glob("checkpoints/step-*")):
            return resuming(argv)
        if self.rank or not (run / "run.json").exists():
            return argv
        if interrupted:
            shutil.rmtree(run)
        elif step.name in self.record.steps:
            aside = next(path for n in range(1, 10**6) if not (path := run.with_name(f"{run.name}.{n}")).exists())
            shutil.move(run, aside)
            say(f"{step.name}: the run of other settings or data is kept as {aside}")
        else:
            fix = f'rename it, or [{step.name}] out = "runs/OTHER"'
            raise CheckpointError(f"{run} holds a run that this recipe did not make", fix)
        return argv

    def _is_finished(self, step: Step) -> bool:
        from mmtrain.records import read_run

        return self.rank > 0 or read_run(self.root / step.outputs[0]).status == "finished"

    def _ranks(self, number: int) -> dict[str, str | None]:
        """Return the changes to the environment of a training step: under torchrun a port of its own, since the store
        of the ranks is used once."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return {}
        port = int(os.environ.get("MASTER_PORT", "29500")) + number
        return {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}

    def _size(self, path: str) -> int:
        place = self.root / path
        files = place.rglob("*") if place.is_dir() else [place]
        return sum(file.stat().st_size for file in files if file.is_file())


def resuming(argv: Sequence[str]) -> list[str]:
    """Return the words of `mm train` that resume the run which others began."""
    return [*without_option(argv, "--init", "--resize-embeddings"), "--resume"]


def parsed_output(record: "StepRecord | None") -> Any:
    """Return what a captured step printed: a JSON value, or a list of the values of JSON lines; None if there is none."""
    if record is None or record.status != DONE:
        return None
    with suppress(ValueError):
        return json.loads(record.printed)
    return [json.loads(line) for line in record.printed.splitlines() if line.startswith("{")]
