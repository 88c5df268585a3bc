"""Fixtures shared by the tests. What costs time to build is built once a session, also where pytest-xdist runs several workers."""

import gc
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import shlex
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from command_line import Ran, Run
from filelock import FileLock
from hypothesis import is_hypothesis_test, settings
from hypothesis.internal.conjecture import providers

if TYPE_CHECKING:  # the controller of the workers builds nothing and starts faster without them
    from fakehub import FakeHub
    from selenium.webdriver.remote.webdriver import WebDriver
    from train_data import Data

    from mmdata.pack.pipeline import PackResult

SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_BYTES = 2**31  # free space in memory that temporary files of the tests may take; they use a tenth of it
Build = Callable[[str, Callable[[Path], object]], Path]


def pytest_configure(config: pytest.Config) -> None:
    """Use one thread a worker, keep temporary files in memory where there is room, and choose how many examples are drawn."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells start what runs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > SHARED_MEMORY_BYTES:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(SHARED_MEMORY))
    for name, number in (("quick", 20), ("full", 100)):
        settings.register_profile(name, max_examples=number, deadline=None, derandomize=True, database=None)
    settings.load_profile("quick" if "not slow" in config.option.markexpr else "full")
    if (
        settings.get_current_profile_name() == "quick"
    ):  # does not read the constants of every loaded module to draw them
        providers._get_local_constants = lambda: providers._local_constants


def pytest_collection_finish() -> None:
    """Leave what is loaded by now out of every later garbage collection, and collect less often: a tenth of the time."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Make property tests slow tests as well where slow tests run: there they draw all their examples."""
    if is_hypothesis_test(getattr(item, "obj", None)) and settings.get_current_profile_name() == "full":
        item.add_marker("slow")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was skipped and why, a line for each reason."""
    reports = terminalreporter.stats.get("skipped", [])
    for reason, number in Counter(report.longrepr[2] for report in reports).items():
        terminalreporter.write_line(f"{number} {reason[0].lower()}{reason[1:]}")


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    """Keep torch, when a test has imported it, on one thread."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """A function that returns the directory of a name, filled by `build` in the first test of any worker that asks for it.

    Tests share the directory and must not change what is in it.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of all workers

    def directory(name: str, build: Callable[[Path], object]) -> Path:
        out = root / "shared" / name
        out.parent.mkdir(exist_ok=True)
        with FileLock(f"{out}.lock"):
            if not out.with_name(f"{name}.done").exists():
                shutil.rmtree(out, ignore_errors=True)
                out.mkdir()
                build(out)
                out.with_name(f"{name}.done").touch()
        return out

    return directory


# --- packing


@pytest.fixture(scope="session")
def tokenizer_dir(built_once: Build) -> Path:
    """A tokenizer of 400 tokens with the plain ChatML template."""
    import pack_data

    return built_once("tokenizer", pack_data.train_tokenizer)


@pytest.fixture(scope="session")
def packed(built_once: Build, tokenizer_dir: Path) -> "dict[str, PackResult]":
    """For each kind 300 rows in several parts, packed with buckets 512 and 640 (and documents long enough for both)."""
    import pack_data

    root = built_once("packed", lambda out: pack_data.pack_all(out, tokenizer_dir))
    return pickle.loads((root / "results.pickle").read_bytes())


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker processes are forks of one that has imported what they need, and have the environment of its start."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_pipeline", "mmdata.pack.part"])
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        multiprocessing.forkserver.ensure_running()
    monkeypatch.setattr("multiprocessing.get_context", lambda method: context)


# --- training


@pytest.fixture(scope="session")
def data(built_once: Build) -> "Data":
    """Small packed datasets of all three row kinds."""
    import train_data

    return train_data.of(built_once("train_data", train_data.make))


@pytest.fixture(scope="session")
def runs(built_once: Build, data: "Data") -> Path:
    """A directory of runs: pretrain, sft and dpo, each from the one before."""
    from train_runs import three_stages

    return built_once("runs", lambda out: three_stages(data, out))


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow models under the names of the known ones, for tests that train with the defaults."""
    from mmtrain.shapes import MODEL_SHAPES

    for name, shape in MODEL_SHAPES.items():
        narrow = replace(shape, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=2, ffn_size=64)
        monkeypatch.setitem(MODEL_SHAPES, name, narrow)


# --- downloads


@pytest.fixture
def hub(data: "Data", monkeypatch: pytest.MonkeyPatch) -> "Iterator[FakeHub]":
    """A hub with the files of the catalog, each with rows of its stage, and both of its dpo.jsonl in the history."""
    from fakehub import Bytes, FakeHub
    from huggingface_hub.utils import close_session

    from mmdata.hub import catalog

    dataset = catalog.DATASET_REPO["hf"]

    sources = {"pretrain": "pretrain", "sft": "sft", "lora": "sft", "dpo": "dpo"}
    known = [known for known in catalog.FILES if known.stage in sources]
    contents = {
        each.key: b"".join(
            (data.tokenizer.parent / f"{sources[each.stage]}.jsonl").read_bytes().splitlines(keepends=True)[: 60 + n]
        )
        for n, each in enumerate(known)
    }
    sizes = {
        each.key: replace(each, num_bytes=len(content), about_bytes=None, sha256=Bytes(content).sha256, revisions={})
        for each, content in zip(known, contents.values(), strict=True)
    }
    monkeypatch.setattr(catalog, "FILES", tuple(sizes.get(each.key, each) for each in catalog.FILES))
    with FakeHub() as hub:
        hub.put(dataset, {each.path: contents[each.key] for each in known}, commit=catalog.OLD["hf"])
        hub.put(dataset, {each.path: contents[each.key] for each in known if each.key != "dpo_v1"})
        for name in ("minimind-2", "minimind-3"):
            tokenizer = catalog.TOKENIZERS.get(name)
            assert tokenizer
            files: dict[str, bytes | Bytes] = {path.name: path.read_bytes() for path in data.tokenizer.iterdir()}
            hub.put(tokenizer.repo["hf"], files, kind="models", commit=tokenizer.revision or "")
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        yield hub
        close_session()


# --- browsers


@pytest.fixture(scope="module")
def chromium() -> "Iterator[WebDriver]":
    """Headless Chromium that logs its console and every request; without one its tests are skipped."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("the browser tests need chromium and chromedriver: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--lang=en"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


# --- the command line


@pytest.fixture
def home(data: "Data", tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory as a user has one, as the current directory: data/*.jsonl and data/tokenizer."""
    source = data.tokenizer.parent
    shutil.copytree(data.tokenizer, tmp_path / "data" / "tokenizer")
    for stage, name in (("pretrain", "pretrain_hq"), ("sft", "sft_512"), ("dpo", "dpo")):
        shutil.copy(source / f"{stage}.jsonl", tmp_path / "data" / f"{name}.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def mm(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process, through the same entry as the `mm` script."""
    import cli

    def run(line: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["mm", *shlex.split(line)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        written = capfd.readouterr()
        return Ran(int(ended.value.code or 0), written.out, written.err)

    return run
