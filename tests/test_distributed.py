"""Several ranks train like one, whatever the cut; and when one fails, all end and its error is heard first."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from train_data import Data, run_json
from waiting import LONG_S, wait_until

from mmdata.errors import UsageError
from mmdata.shards.dataset import open_dataset
from mmtrain import checkpoint, distributed
from mmtrain.config import TrainOptions
from mmtrain.distributed import GradientSum, World, choose_device, launch
from mmtrain.train import optim
from mmtrain.train.loop import train
from mmtrain.train.plan import make_plan
from mmtrain.train.run import facts_of

# One rank: train as the first argument says; on the rank of the second argument raise at step 3.
RANK = """
import sys, torch
from pathlib import PosixPath
from mmdata.errors import MMError
from mmtrain import distributed
from mmtrain.train import loop
from mmtrain.config import TrainOptions
torch.set_num_threads(1)
distributed.BEAT_S = 0.05 if sys.argv[2] == "freeze" else 100
missed_beats, distributed.MISSED_BEATS = distributed.MISSED_BEATS, 10**6  # no slow rank is given up before one freezes
distributed.BLOCKED_S = 0.5
distributed.CHUNK_BYTES = 2000  # 22 chunks of the tiny model's gradient
make_plan = loop.make_plan
def plan(options, world):
    from dataclasses import replace
    is_other = world.rank == 1 and sys.argv[2] == "other"
    if world.rank == 1 and sys.argv[2] == "older":
        options = replace(options, out=options.out.with_name("older"))
    return make_plan(replace(options, lr=0.5, data=options.data * 2) if is_other else options, world)
loop.make_plan = plan
def end_when_blocked():
    # Send this process SIGTERM once its main thread stays at one place of mmtrain.distributed, waiting for rank 1.
    import os, signal, threading, time
    before, times = None, 0
    while times < 20:
        time.sleep(0.02)
        frame = sys._current_frames()[threading.main_thread().ident]
        times = times + 1 if before == (frame.f_code, frame.f_lasti) and frame.f_code.co_filename == distributed.__file__ else 0
        before = frame.f_code, frame.f_lasti
    os.kill(os.getpid(), signal.SIGTERM)
run_step = loop._run_step
def step(run, step, stop):
    if step == 3 and sys.argv[2] == str(run.world.rank):
        raise MMError("the injected error")
    if step == 3 and sys.argv[2] == "sigterm" and run.world.rank == run.world.size - 1:
        import os, signal
        os.kill(os.getpid(), signal.SIGTERM)
    if step == 3 and sys.argv[2] in ("freeze", "frozen and SIGTERM"):
        import os, signal, threading
        run.writer.wait()
        if run.world.rank == 1:
            (run.plan.out / "frozen").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        elif sys.argv[2] == "freeze" and run.world.is_first:
            import time
            while not (run.plan.out / "frozen").exists():
                time.sleep(0.01)
            distributed.MISSED_BEATS = missed_beats
        elif sys.argv[2] == "frozen and SIGTERM":
            threading.Thread(target=end_when_blocked, daemon=True).start()
    if step == 3 and sys.argv[2] == "killed" and run.world.rank == 1:
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
    if step == 3 and sys.argv[2] == "stop" and run.world.is_first:
        (run.plan.out / loop.STOP_FILE).touch()
    return run_step(run, step, stop)
loop._run_step = step
add_up = loop._add_up
def poisoned(run, micros):
    calls.append(1)
    is_nan = len(calls) == 3 and sys.argv[2] == "nan" and run.world.rank == run.world.size - 1
    hook = next(run.model.parameters()).register_hook(lambda grad: grad * float("nan") if is_nan else grad)
    sums = add_up(run, micros)
    hook.remove()
    with (run.plan.out / f"seen-{run.world.rank}.txt").open("a") as file:
        file.writelines(f"{sample}\\n" for micro in micros for sample in micro.samples)
    return sums
calls = []
loop._add_up = poisoned
try:
    loop.train(eval(sys.argv[1]))
except MMError as error:
    sys.stderr.write(f"error on rank {distributed.rank()}: {error.message}\\n")
    sys.exit(error.exit_code)
import pathlib
threads = [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
assert not any("gloo" in name for name in threads), threads  # left behind, they sometimes abort the process at its end
"""


def config_of(stage: str, data: Data, out: Path, **settings: Any) -> TrainOptions:
    base: dict[str, Any] = {"steps": 6, "lr": 2e-3, "device": "cpu", "val_every": 3, "save_every": 2, "quiet": True}
    base |= {"report": False, "samples": False}
    base |= {"batch_tokens": 128 * 23, "micro_tokens": 512, "runs_dir": out.parent}  # the second step holds one pack
    return TrainOptions(stage, (getattr(data, stage),), out, **(base | settings))


def run_ranks(config: TrainOptions, num_ranks: int = 2, inject: str = "") -> subprocess.CompletedProcess:
    """`launch` in a process of its own, so that its output can be read."""
    argv = [*warm.command(), "-c", RANK, repr(config), inject]
    grace = 0.2 if "fr" in inject else 20
    code = f"import sys\nfrom mmtrain import distributed as d\nd.GRACE_S = {grace}\nsys.exit(d.launch({num_ranks}, {argv!r}))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*warm.command(), "-c", code], capture_output=True, text=True, check=False, env=environment, timeout=LONG_S
    )


def lines(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_s", "memory_bytes")} for line in found]


def assert_alike(one: Path, other: Path, tolerance: float = 1e-6) -> None:
    for a, b in zip(lines(one), lines(other), strict=True):
        norms = [line.pop("grad_norm", 0.0) for line in (a, b)]  # of float32 gradients, summed in another order
        assert norms[0] == pytest.approx(norms[1], rel=4 * tolerance), (a, b)
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance), (a, b)
    weights, others = (checkpoint.load_model(run)[0].state_dict() for run in (one, other))
    for name, values in weights.items():
        assert (values - others[name]).norm() < 10 * tolerance * values.norm(), name


def test_two_ranks_train_like_one(data: Data, tmp_path: Path) -> None:
    one, two = (config_of("pretrain", data, tmp_path / name, model="tiny") for name in ("one", "two"))
    train(one)
    done = run_ranks(two)
    assert done.returncode == 0, done.stderr
    assert_alike(one.out, two.out)


@pytest.mark.slow
def test_two_ranks_train_like_one_with_muon(data: Data, tmp_path: Path) -> None:
    """Orthogonalising lifts the smallest singular values, and what rounding put there, up to 480 times: hence 1e-4."""
    one, two = (config_of("pretrain", data, tmp_path / name, model="tiny", optimizer="muon") for name in ("one", "two"))
    train(one)
    done = run_ranks(two)
    assert done.returncode == 0, done.stderr
    assert_alike(one.out, two.out, 1e-4)


@pytest.mark.parametrize("num_ranks", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3))])
def test_a_nan_on_one_rank_skips_the_step_on_all(num_ranks: int, data: Data, tmp_path: Path) -> None:
    run = config_of("pretrain", data, tmp_path / "run", model="tiny", val_every=0)
    done = run_ranks(run, num_ranks, inject="nan")
    assert done.returncode == 0, done.stderr
    assert [line["skipped"] for line in lines(run.out) if "skipped" in line] == [0, 0, 1, 1, 1, 1]
    assert [line["grad_norm"] for line in lines(run.out) if "grad_norm" in line][2] is None
    weights = checkpoint.load_model(run.out)[0].state_dict()
    assert all(bool(value.isfinite().all()) for value in weights.values())


@pytest.mark.slow
def test_three_ranks_train_like_one(data: Data, tmp_path: Path) -> None:
    one, three = (config_of("pretrain", data, tmp_path / name, model="tiny") for name in ("one", "three"))
    train(one)
    done = run_ranks(replace(three, micro_tokens=256), 3)
    assert done.returncode == 0, done.stderr
    assert_alike(one.out, three.out)


def test_two_ranks_prefer_like_one_and_resume_alone(data: Data, tmp_path: Path) -> None:
    train(config_of("sft", data, tmp_path / "sft", model="tiny"))
    one, two = (config_of("dpo", data, tmp_path / name, lr=2e-4, batch_tokens=1024) for name in ("one", "two"))
    train(one)
    done = run_ranks(two, inject="sigterm")
    assert done.returncode == 0, done.stderr
    assert run_json(two.out)["status"] == "interrupted" and checkpoint.find(two.out).step == 4
    train(TrainOptions("dpo", (), two.out, resume=True, device="cpu", quiet=True))
    assert_alike(one.out, two.out, 1e-5)


@pytest.mark.parametrize(
    ("stage", "before", "after", "how"),
    [
        ("sft", 2, 1, "stop"),
        ("pretrain", 2, 3, "sigterm"),
        pytest.param("pretrain", 1, 2, "sigterm", marks=pytest.mark.slow),
        pytest.param("sft", 1, 2, "stop", marks=pytest.mark.slow),
        pytest.param("pretrain", 2, 1, "sigterm", marks=pytest.mark.slow),
        pytest.param("sft", 2, 3, "stop", marks=pytest.mark.slow),
    ],
)
def test_stopped_and_resumed_at_another_world_size_equals_undisturbed_and_sees_every_sample_once(
    stage: str, before: int, after: int, how: str, data: Data, tmp_path: Path
) -> None:
    """Stopped by a signal to the last rank, or by the STOP file: either saves and ends every rank with exit code 0."""
    options: dict[str, Any] = {"model": "tiny", "steps": None, "epochs": 1, "batch_tokens": 512, "micro_tokens": 256}
    whole, broken = (config_of(stage, data, tmp_path / name, **options) for name in ("whole", "broken"))
    train(whole)
    done = run_ranks(broken, before, inject=how)
    assert done.returncode == 0, done.stderr
    assert run_json(broken.out)["status"] == "interrupted" and checkpoint.find(broken.out).step == 4
    done = run_ranks(replace(broken, resume=True), after)
    assert done.returncode == 0, done.stderr
    facts = run_json(broken.out)
    assert (facts["status"], facts["resumed"][0]["world_size"]) == ("finished", after)
    assert not (broken.out / "STOP").exists()
    assert_alike(whole.out, broken.out)
    seen = [int(line) for path in broken.out.glob("seen-*.txt") for line in path.read_text().splitlines()]
    assert sorted(seen) == list(range(open_dataset(getattr(data, stage)).split("train").num_samples()))


def test_a_failing_rank_ends_the_others_with_its_error_first(data: Data, tmp_path: Path) -> None:
    config = config_of("pretrain", data, tmp_path / "run", model="tiny")
    done = run_ranks(config, inject="1")
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error on rank")]
    assert errors[0] == "error on rank 1: the injected error"
    assert all("another rank stopped" in line and "; last checkpoint: " in line for line in errors[1:])


@pytest.mark.parametrize(
    ("inject", "code", "problem"),
    [
        ("freeze", 1, "rank 0: rank 1 has not answered"),
        ("frozen and SIGTERM", 143, "rank 0: ended by a signal while waiting for other ranks"),
    ],
)
def test_a_frozen_rank_ends_the_run_with_its_last_checkpoint_named(
    inject: str, code: int, problem: str, data: Data, tmp_path: Path
) -> None:
    config = config_of("pretrain", data, tmp_path / "run", model="tiny")
    done = run_ranks(config, inject=inject)
    assert done.returncode == code, done.stderr
    error, fix = done.stderr.splitlines()[:2]
    assert problem in error and f"last checkpoint: {config.out / 'checkpoints' / 'step-3'}" in error
    assert "--resume" in fix and run_json(config.out)["status"] == "failed"


def test_ranks_that_do_not_start_from_the_same_are_named_before_the_first_step(data: Data, tmp_path: Path) -> None:
    config = config_of("pretrain", data, tmp_path / "run", model="tiny")
    done = run_ranks(config, 3, "other")
    assert done.returncode == 1 and done.stderr.count("error on rank") == 1
    assert "rank 1 has other data, settings (lr 0.5 instead of " in done.stderr, done.stderr
    assert "than rank 0" in done.stderr and not config.out.exists()


def test_differences_between_ranks_are_named_with_both_values() -> None:
    usual = {"data": "a" * 64, "step": "6", "settings": {"lr": "0.1", "seed": "1", **{f"s{n}": "0" for n in range(9)}}}
    other = {**usual, "step": "0", "settings": {**usual["settings"], "lr": "0.2"}}  # type: ignore[dict-item]
    assert list(distributed.differences(other, usual)) == ["step (0 instead of 6)", "settings (lr 0.2 instead of 0.1)"]
    other |= {"data": "b" * 64, "settings": dict.fromkeys(usual["settings"], "7")}
    newer = {**usual, "settings": {**usual["settings"], "t": "2"}}  # type: ignore[dict-item]
    assert list(distributed.differences(newer, usual)) == ["settings (t 2 instead of None)"]
    data, _, settings = distributed.differences(other, usual)
    assert data == "data" and settings.endswith("s3 7 instead of 0 and 5 more)")


def test_facts_of_a_run_have_its_step_weights_and_code(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(0, 1, choose_device("cpu"))
    config = config_of("pretrain", data, tmp_path / "run", model="tiny")
    train(config)
    newest = facts_of(make_plan(replace(config, resume=True), world))
    shutil.rmtree(config.out / "checkpoints" / "step-6")
    older = facts_of(make_plan(replace(config, resume=True), world))
    assert {name for name in newest if newest[name] != older[name]} == {"step", "weights"}
    monkeypatch.setattr("torch.__version__", "0")
    other = facts_of(make_plan(replace(config, resume=True), world))
    assert {name for name in other if other[name] != older[name]} == {"code"}


def test_an_error_all_ranks_meet_is_said_once(data: Data, tmp_path: Path) -> None:
    done = run_ranks(config_of("dpo", data, tmp_path / "run", init=tmp_path / "none"))
    assert done.returncode == 1 and done.stderr.count("error on rank") == 1
    assert "no such directory" in done.stderr


def test_launch_gives_the_exit_code_of_the_first_failure_and_ends_the_rest() -> None:
    code = "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(7)\ntime.sleep(0.5)"
    assert launch(3, [sys.executable, "-c", code]) == 7
    assert launch(1, [sys.executable, "-c", "import os\nos.kill(os.getpid(), 9)"]) == 128 + signal.SIGKILL


def test_launch_hands_signals_on_once(tmp_path: Path) -> None:
    code = (
        "import pathlib, signal, sys, time\ncount = []\nsignal.signal(signal.SIGTERM, lambda *_: count.append(1))\n"
        f"pathlib.Path({str(tmp_path)!r}, 'ready').touch()\n"
        "while not count: time.sleep(0.02)\ntime.sleep(0.2)\nsys.exit(10 + len(count))"
    )
    program = (
        f"import sys\nfrom mmtrain.distributed import launch\nsys.exit(launch(1, [sys.executable, '-c', {code!r}]))"
    )
    process = subprocess.Popen([*warm.command(), "-c", program])
    wait_until((tmp_path / "ready").exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=LONG_S) == 11


def test_devices_are_named_plainly() -> None:
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(UsageError, match="--device tpu is unknown"):
        choose_device("tpu")


def test_alone_an_agreement_is_the_error_itself() -> None:
    world = World(0, 1, choose_device("cpu"))
    world.agree(None)
    with pytest.raises(UsageError):
        world.agree(UsageError("mine"))


TORCHRUN = "from torch.distributed.run import main; main()"


class Nodes:
    """Two torchrun groups of one rank each on this machine, as on two machines: they meet at a port."""

    def __init__(self, config: TrainOptions, inject: str, place: Path) -> None:
        script = place / "rank.py"
        script.write_text(RANK)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        python = warm.command()
        options = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port)]
        command = ["--no-python", *python, script, repr(config), inject]
        self.groups = [
            subprocess.Popen(
                [*python, "-c", TORCHRUN, *options, "--node-rank", rank, *command],
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in ("0", "1")
        ]

    def end(self, node: int) -> tuple[int, str]:
        """Exit code and stderr of a node's group."""
        errors = self.groups[node].communicate(timeout=LONG_S)[1]
        return self.groups[node].returncode, errors


@pytest.fixture
def start_nodes(tmp_path: Path) -> Iterator[Callable[[TrainOptions, str], Nodes]]:
    """Starts nodes, which are killed when the test ends."""
    started: list[Nodes] = []

    def start(config: TrainOptions, inject: str = "") -> Nodes:
        started.append(Nodes(config, inject, tmp_path))
        return started[-1]

    yield start
    for group in (group for nodes in started for group in nodes.groups):
        group.kill()


@pytest.mark.slow
def test_two_nodes_of_torchrun_train_like_one_process(
    data: Data, tmp_path: Path, start_nodes: Callable[..., Nodes]
) -> None:
    one, two = (config_of("pretrain", data, tmp_path / name, model="tiny") for name in ("one", "nodes"))
    train(one)
    nodes = start_nodes(two)
    assert [nodes.end(node)[0] for node in (0, 1)] == [0, 0]
    assert run_json(two.out)["world_size"] == 2
    assert_alike(one.out, two.out)


@pytest.mark.slow
def test_a_node_of_torchrun_that_is_killed_ends_the_other_and_the_run_goes_on(
    data: Data, tmp_path: Path, start_nodes: Callable[..., Nodes]
) -> None:
    one, two = (config_of("pretrain", data, tmp_path / name, model="tiny") for name in ("one", "nodes"))
    train(one)
    nodes = start_nodes(two, "killed")
    codes, errors = zip(*(nodes.end(node) for node in (0, 1)), strict=True)
    assert 0 not in codes and "error on rank 0: rank 0: another rank stopped" in errors[0] and "step-3" in errors[0], (
        errors
    )
    assert run_json(two.out)["status"] == "failed" and checkpoint.find(two.out).step == 3
    train(replace(two, resume=True))
    assert_alike(one.out, two.out)


@pytest.mark.slow
def test_a_node_of_torchrun_that_freezes_ends_the_other_with_the_last_checkpoint_named(
    data: Data, tmp_path: Path, start_nodes: Callable[..., Nodes]
) -> None:
    config = config_of("pretrain", data, tmp_path / "run", model="tiny")
    nodes = start_nodes(config, "freeze")
    code, errors = nodes.end(0)
    os.kill(int((config.out / "frozen").read_text()), signal.SIGKILL)
    assert nodes.end(1)[0] != 0 and code != 0
    assert "rank 0: rank 1 has not answered" in errors and f"last checkpoint: {config.out}" in errors, errors
    assert run_json(config.out)["status"] == "failed" and checkpoint.find(config.out).step == 3


@pytest.mark.slow
def test_a_node_of_torchrun_with_an_older_checkpoint_is_named_before_the_first_step(
    data: Data, tmp_path: Path, start_nodes: Callable[..., Nodes]
) -> None:
    config = config_of("pretrain", data, tmp_path / "run", model="tiny")
    train(config)
    shutil.copytree(config.out, tmp_path / "older")
    shutil.rmtree(tmp_path / "older" / "checkpoints" / "step-6")
    before = {path: path.read_bytes() for path in config.out.rglob("*") if path.is_file()}
    nodes = start_nodes(replace(config, resume=True), "older")
    codes, errors = zip(*(nodes.end(node) for node in (0, 1)), strict=True)
    assert 0 not in codes
    for error in errors:  # each node prints it
        assert "rank 1 has other step (4 instead of 6), weights than rank 0" in error, errors
    assert {path: path.read_bytes() for path in config.out.rglob("*") if path.is_file()} == before


class Twice(World):
    """Two ranks of which the other has the same gradient: a sum doubles it. Notes what is started and waited for."""

    def start_sum(self, tensor: torch.Tensor) -> Callable[[], None]:
        started.append((len(tensor), bool(tensor.isfinite().all())))
        return lambda: [tensor.mul_(2)].clear()


started: list[tuple[int, bool]] = []


def test_chunks_of_the_gradient_are_summed_as_soon_as_they_are_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "CHUNK_BYTES", 100)
    started.clear()
    layers = [torch.nn.Linear(5, 5) for _ in range(4)]
    model = torch.nn.Sequential(*layers)
    gradient = optim.flat_gradient(model)
    summing = GradientSum(Twice(0, 2, torch.device("cpu")), gradient, list(model.parameters()))
    at_first, fails_at = [], [0]

    def noted(grad: torch.Tensor) -> None:
        at_first.append(len(started))

    def fails(grad: torch.Tensor) -> None:
        fails_at[0] -= 1
        if fails_at[0] == 0:
            raise MemoryError

    layers[0].weight.register_hook(noted)
    layers[1].weight.register_hook(fails)

    def passes() -> None:
        gradient.zero_()
        for number in range(3):
            loss = (number + model(torch.ones(1, 5))).square().sum()
            if number == 2:
                summing.start()
            loss.backward()

    def step(*failures: int) -> list[tuple[int, bool]]:
        """Memory runs out in these micro-batches of the first, second … try."""
        started.clear()
        for failure in failures:
            fails_at[0] = failure
            with pytest.raises(MemoryError):
                passes()
            summing.run_again()
        passes()
        summing.finish()
        return started.copy()

    for number in range(3):
        (number + model(torch.ones(1, 5))).square().sum().backward()
    expected = 2 * gradient
    in_order = [(30, True)] * 4
    for failures in ((), (1,), (3,), (2, 3, 1, 3), ()):
        assert step(*failures) == in_order and torch.equal(gradient, expected), failures
        assert at_first[-1] == (3 if 3 not in failures else 2), "before the backward pass reached the first layer"
    gradient.zero_()  # a rank without micro-batches
    started.clear()
    summing.finish()
    assert started == in_order and not gradient.any()
