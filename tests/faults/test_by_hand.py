"""Inputs as a hostile person makes them, given to the commands: each ends with one error that names what is wrong, or as if nothing
were there, in bounded time and memory."""

import gzip
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Run, fine, refused
from pack_data import make_old

SECONDS = 60  # far more than any takes
BYTES = 2**30  # which a command may add to the largest memory so far
DEEP = "[" * 100_000 + "]" * 100_000
Make = Callable[[], object]


def row(text: str) -> str:
    """A jsonl line of a conversation."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]
    return json.dumps({"conversations": turns}) + "\n"


def put(path: str, content: str | bytes) -> Make:
    """Write a file, in place of what is there."""

    def make() -> None:
        gone(path)()
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))

    return make


def gone(path: str) -> Make:
    def make() -> None:
        if Path(path).is_dir() and not Path(path).is_symlink():
            shutil.rmtree(path)
        Path(path).unlink(missing_ok=True)

    return make


def link(path: str, to: str) -> Make:
    return lambda: (gone(path)(), Path(path).parent.mkdir(exist_ok=True), Path(path).symlink_to(to))


def fifo(path: str) -> Make:
    return lambda: (gone(path)(), os.mkfifo(path))


def directory(path: str) -> Make:
    return lambda: (gone(path)(), Path(path).mkdir())


def sparse(path: str, num_bytes: int) -> Make:
    return lambda: (put(path, b"")(), os.truncate(path, num_bytes))


def edit(path: str, change: Callable[[Any], object]) -> Make:
    """Change a JSON file, without its hash of itself. The change returns what takes its place, or None."""

    def make() -> None:
        value = json.loads(Path(path).read_bytes())
        value.pop("record_sha256", None)
        changed = change(value)
        Path(path).write_text(json.dumps(value if changed is None else changed))

    return make


def old(directory: str, change: Callable[[Any], object]) -> Make:
    """Change the manifest of a dataset that becomes one of an older version, which has the shards in it and no hash."""
    return lambda: make_old(Path(directory), change)


def assign(*keys: Any) -> Callable[[Any], None]:
    """A change: the last of the keys is the new value of what the others lead to."""
    *path, last, new = keys

    def change(value: Any) -> None:
        for key in path:
            value = value[key]
        value[last] = new

    return change


MANIFEST, STATE, RUN = "shards/sft/manifest.json", "runs/sft/checkpoints/step-{}/state.json", "runs/sft/run.json"
VOCABULARY, CONFIG = "data/tokenizer/tokenizer.json", "data/tokenizer/tokenizer_config.json"
PACK, TRAIN = (
    "pack data/sft_512.jsonl --out OUT --no-report --workers 1",
    "train sft --data shards/sft --init runs/pretrain --steps 1",
)
RESUME = "train sft --out runs/sft --resume"
CHECK = "tokenizer check data/tokenizer"
CHAT = "chat runs/sft --prompt one --max-new-tokens 2"


def template(text: str) -> Make:
    return edit(CONFIG, assign("chat_template", text))


def recipe(text: str) -> Make:
    return put("r.toml", text)


def with_record(*keys: Any) -> Make:
    """A recipe whose record is of a hostile hand."""
    return lambda: (
        recipe('[pack]\nfiles = ["data/sft_512.jsonl"]\n')(),
        put("courses/r/course.json", json.dumps(keys[0]))(),
    )


# Name -> (the command, what is made before it, words of the error; without words it may also end as if nothing were there).
CASES: dict[str, tuple[str, Make, str]] = {
    # rows
    "a pipe as rows": (PACK, fifo("data/sft_512.jsonl"), "sft_512.jsonl"),
    "a device as rows": ("validate data/zero.jsonl", link("data/zero.jsonl", "/dev/zero"), "zero.jsonl"),
    "rows that are a loop of links": ("stats data/a.jsonl", link("data/a.jsonl", "a.jsonl"), "a.jsonl"),
    "a directory as rows": ("show data/sft_512.jsonl", directory("data/sft_512.jsonl"), ""),
    "rows nested 100,000 deep": ("validate data/a.jsonl", put("data/a.jsonl", DEEP + "\n" + row("x")), ""),
    "a value nested 100,000 deep": (
        "pack data/a.jsonl --out OUT --max-bad 100%",
        put("data/a.jsonl", row("x") + '{"conversations": ' + DEEP + "}\n"),
        "",
    ),
    "a number of 5,000 digits": ("validate data/a.jsonl", put("data/a.jsonl", f'{{"text": {"9" * 5000}}}\n' + row("x")), ""),
    "one line of zeros, 3 GB": ("validate data/a.jsonl", sparse("data/a.jsonl", 3 * 10**9), "a.jsonl"),
    "one line of zeros, 3 GB, selected": ("select data/a.jsonl --out o.jsonl", sparse("data/a.jsonl", 3 * 10**9), "a.jsonl"),
    "a JSON array of zeros, 3 GB": ("stats data/a.json", sparse("data/a.json", 3 * 10**9), "a.json"),
    "gzip of 300 MB without a newline": (
        "validate data/a.jsonl.gz",
        lambda: put("data/a.jsonl.gz", gzip.compress(b"\0" * 300_000_000, 1))(),
        "a.jsonl.gz",
    ),
    "a column 10,000 wide": (
        "stats data/a.csv",
        put("data/a.csv", ",".join(f"c{i}" for i in range(10_000)) + "\n" + "x," * 9_999 + "x\n"),
        "",
    ),
    "half a pair of surrogates": (PACK, put("data/sft_512.jsonl", '{"text": "\\ud800"}\n' + row("x")), ""),
    "parquet in name only": ("show data/a.parquet", put("data/a.parquet", b"PAR1" + b"\xff" * 64 + b"PAR1"), "a.parquet"),
    # conditions
    "a condition that fills memory": (
        """select data/sft_512.jsonl --out o.jsonl --where "length(repeat('x', 100000000000)) > 1" """,
        lambda: None,
        "where",
    ),
    "a condition that counts to 10**12": (
        'select data/sft_512.jsonl --out o.jsonl --where "len(range(1000000000000)) > 1"',
        lambda: None,
        "where",
    ),
    "a condition that reads a file": (
        """select data/sft_512.jsonl --out o.jsonl --where "(select count(*) from read_csv('/etc/passwd')) > 1" """,
        lambda: None,
        "where",
    ),
    "output to a directory": ("select data/sft_512.jsonl --out o.jsonl", directory("o.jsonl"), "o.jsonl"),
    "output below a file": ("select data/sft_512.jsonl --out a/o.jsonl", put("a", "x"), "a"),
    # datasets
    "a manifest nested 100,000 deep": ("stats shards/sft", put(MANIFEST, DEEP), "manifest.json"),
    "a manifest that is null": ("show shards/sft", put(MANIFEST, "null"), "manifest.json"),
    "a manifest in UTF-16": (TRAIN, put(MANIFEST, "{}".encode("utf-16")), "manifest.json"),
    "a manifest as directory": ("verify shards/sft", directory(MANIFEST), "manifest.json"),
    "a manifest as pipe": ("stats shards/sft", fifo(MANIFEST), "manifest.json"),
    "a manifest with an endless number": ("stats shards/sft", put(MANIFEST, f'{{"samples": {"9" * 6000}}}'), "manifest.json"),
    "a shard outside its dataset": ("show shards/sft", old("shards/sft", assign("shards", 0, "path", "../../data/sft_512.jsonl")), "is not inside"),
    "a shard with an absolute path": (TRAIN, old("shards/sft", assign("shards", 0, "path", "/etc/passwd")), "is not inside"),
    "a shard as pipe": (TRAIN, lambda: fifo(str(next(Path("shards/sft/train").rglob("*.arrow"))))(), ".arrow"),
    "a shard as device": ("eval runs/sft --data shards/sft", lambda: link(str(next(Path("shards/sft").rglob("*.arrow"))), "/dev/zero")(), ".arrow"),
    "a vocabulary of 2**62 tokens": (TRAIN, edit(MANIFEST, assign("tokenizer", "vocab_size", 2**62)), "vocab_size"),
    "another dataset's sources": (
        "show shards/sft --index 0",
        lambda: shutil.copy("shards/dpo/sources/part-00000.arrow", "shards/sft/sources/part-00000.arrow"),
        "part-00000.arrow",
    ),
    "remembered hashes of a device": ("show shards/sft --index 0", link("shards/sft/.verified.json", "/dev/zero"), ""),
    "remembered hashes as directory": ("show shards/sft --index 0", directory("shards/sft/.verified.json"), ""),
    "a dataset without its tokenizer": ("show shards/sft", gone("shards/sft/tokenizer"), "tokenizer"),
    # runs
    "a state of another file": ("eval runs/sft --data shards/sft", lambda: link(newest("state.json"), "/etc/passwd")(), "state.json"),
    "weights of one byte": (CHAT, lambda: put(newest("model.safetensors"), b"\0")(), "model.safetensors"),
    "weights with a header of 2**60 bytes": (
        "export runs/sft --out OUT",
        lambda: put(newest("model.safetensors"), (2**60).to_bytes(8, "little") + b"{}")(),
        "model.safetensors",
    ),
    "weights of zeros, 9 GB": ("serve runs/sft --port 0", lambda: sparse(newest("model.safetensors"), 9 * 10**9)(), "model.safetensors"),
    "checkpoints as a file": (CHAT, put("runs/sft/checkpoints", "x"), "runs/sft"),
    "checkpoints of odd names": (
        CHAT,
        lambda: [Path(f"runs/sft/checkpoints/step-{n}").mkdir() for n in ("9" * 200, "x", "-1", "٣", "1e9", "²")],
        "",
    ),
    "a state in a checkpoint of an odd name": ("lineage runs/sft", put("runs/sft/checkpoints/step-²/state.json", "{}"), ""),
    "a checkpoint that is a loop": (CHAT, link("runs/sft/checkpoints/step-99", "step-99"), ""),
    "a stop request as directory": (RESUME, directory("runs/sft/STOP"), ""),
    "metrics as pipe": ("report runs/sft", fifo("runs/sft/metrics.jsonl"), "metrics.jsonl"),
    "metrics as directory": (RESUME, directory("runs/sft/metrics.jsonl"), ""),
    "metrics of zeros, 3 GB": ("report runs/sft", sparse("runs/sft/metrics.jsonl", 3 * 10**9), "metrics.jsonl"),
    "metrics far apart": (
        "report runs/sft --html r.html",
        put(
            "runs/sft/metrics.jsonl",
            "".join(
                f'{{"step": {n}, "loss": {loss}, "tokens": 9, "trained_tokens": 9, "tokens_per_s": 1.0}}\n'
                for n, loss in ((1, 1e308), (2, -1e308), (2**53, 1e-300), (2**62, "NaN"), (3, "Infinity"))
            ),
        ),
        "",
    ),
    "samples nested deep": ("report runs/sft --html r.html", put("runs/sft/samples.jsonl", DEEP + "\n{}\n"), ""),
    "events of other types": ("report runs/sft", put("runs/sft/events.jsonl", '{"step": "x"}\n[]\n{"step": -1, "what": []}\n'), ""),
    "a run that started from itself": ("lineage runs/sft", edit(RUN, assign("init", {"dir": "runs/sft", "sha256": "0"})), ""),
    "a run from two that began with each other": (
        "lineage runs/sft --check",
        lambda: [
            edit(f"runs/{one}/run.json", assign("init", {"dir": f"runs/{other}", "sha256": "0"}))()
            for one, other in (("sft", "dpo"), ("dpo", "sft"))
        ],
        "",
    ),
    "a run from a device": ("lineage runs/sft", edit(RUN, assign("init", {"dir": "/dev/zero", "sha256": "0"})), ""),
    "a run from a name with NUL": ("lineage runs/sft", edit(RUN, assign("init", {"dir": "a\0b", "sha256": "0"})), "run.json"),
    "a run of 2**62 layers": (CHAT, lambda: edit(newest("state.json"), assign("model", "num_layers", 2**62))(), "state.json"),
    "a learning rate that is a list": ("report runs/sft", edit(RUN, assign("settings", "lr", [])), "run.json"),
    "a run's tokenizer as pipe": (CHAT, fifo("runs/sft/tokenizer/tokenizer.json"), "tokenizer.json"),
    "a run's template without end": (
        CHAT,
        edit("runs/sft/tokenizer/tokenizer_config.json", assign("chat_template", "{% for i in range(10**12) %}{% endfor %}")),
        "template",
    ),
    "questions as pipe": ("eval runs/sft --questions q.jsonl", fifo("q.jsonl"), "q.jsonl"),
    "questions nested deep": ("eval runs/sft --questions q.jsonl", put("q.jsonl", DEEP + "\n"), "q.jsonl"),
    "an answer of a hostile pattern": (
        "eval runs/sft --max-new-tokens 2 --questions q.jsonl",
        put("q.jsonl", json.dumps({"question": "a" * 3000, "answer": "(a*)*b", "regex": "(a*)*b"}) + "\n"),
        "",
    ),
    "an export over a file": ("export runs/sft --out OUT", put("OUT", "x"), "OUT"),
    "an export to a loop of links": ("export runs/sft --out OUT", link("OUT", "OUT"), "OUT"),
    # tokenizers
    "a vocabulary nested deep": (CHECK, put(VOCABULARY, DEEP), "tokenizer.json"),
    "an id of 2**31": (CHECK, edit(VOCABULARY, lambda v: v["model"]["vocab"].update({"zzz": 2**31})), "largest id is"),
    "an added token of id 4e9": (CHECK, edit(VOCABULARY, lambda v: v["added_tokens"][0].update(id=4 * 10**9)), ""),
    "texts filled up to 10**9 tokens": (
        PACK,
        edit(
            VOCABULARY,
            assign(
                "padding",
                {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"},
            ),
        ),
        "",
    ),
    "texts cut at one token": (
        PACK,
        edit(VOCABULARY, assign("truncation", {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0})),
        "",
    ),
    "a normalizer that makes every character longer": (
        CHECK,
        edit(VOCABULARY, assign("normalizer", {"type": "Replace", "pattern": {"Regex": ""}, "content": "x" * 10_000})),
        "cannot encode",
    ),
    "a pattern of exponential time": (
        CHECK,
        edit(VOCABULARY, assign("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated", "invert": False})),
        "cannot encode",
    ),
    "a pattern that is none": (
        CHECK,
        edit(VOCABULARY, assign("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False})),
        "tokenizer.json",
    ),
    "settings that are a list": (CHECK, put(CONFIG, "[]"), "tokenizer_config.json"),
    "settings that are a device": (CHECK, link(CONFIG, "/dev/zero"), "tokenizer_config.json"),
    "a template of a number": (CHECK, edit(CONFIG, assign("chat_template", 5)), ""),
    "a template that centres": (CHECK, template("{{ 'x'|center(10**12) }}"), "template"),
    "a template that slices": (PACK, template("{% for m in messages|slice(10**12) %}{% endfor %}"), "template"),
    "a template with NUL": (CHECK, template("\0{{ messages }}"), "template"),
    "a template that calls itself": (PACK, template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"), "template"),
    "a template of 5 MB": (CHECK, template("{{ messages[0].content }}" * 200_000), "characters, more than"),
    "a template nested deep": (CHECK, template("{% if 1 %}" * 3000 + "{% endif %}" * 3000), "template"),
    "a template of deep brackets": (CHECK, template("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}"), "template"),
    "a template that reaches for classes": (PACK, template("{{ ''.__class__.__mro__[1].__subclasses__() }}"), "template"),
    # recipes and mm.toml
    "a recipe as pipe": ("run r.toml", fifo("r.toml"), "r.toml"),
    "a recipe nested deep": ("run r.toml --dry-run", recipe(f"x = {DEEP}\n"), "r.toml"),
    "a recipe in UTF-16": ("run r.toml", put("r.toml", "[pack]".encode("utf-16")), "r.toml"),
    "a recipe of a device": ("run r.toml", link("r.toml", "/dev/zero"), "r.toml"),
    "a recipe that costs NaN": ("run r.toml --dry-run", recipe("price_per_hour = nan\n[pack]\n"), ""),
    "a record of a recipe that is null": ("run r.toml", with_record(None), "course.json"),
    "a record of a recipe with process 1": (
        "run r.toml",
        with_record({"recipe": "r", "steps": {"pack": {"key": "0", "process": [1, 0.0], "argv": ["pack"]}}}),
        "",
    ),
    "a record of a recipe with process -1": (
        "run r.toml",
        with_record({"recipe": "r", "steps": {"pack": {"key": "0", "process": [-1, 0.0], "argv": ["pack"]}}}),
        "course.json",
    ),
    "defaults nested deep": ("show data/sft_512.jsonl", put("mm.toml", f"x = {DEEP}\n"), "mm.toml"),
    "defaults of other types": ("show data/sft_512.jsonl", put("mm.toml", "show = 5\n"), "mm.toml"),
}  # fmt: skip


def newest(name: str) -> str:
    """A file of the newest checkpoint of runs/sft."""
    return str(max(Path("runs/sft/checkpoints").glob("step-*"), key=lambda path: int(path.name[5:])) / name)


@pytest.fixture
def place(home: Path, data: Any, runs: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with datasets and runs."""
    for name in ("sft", "dpo"):
        shutil.copytree(getattr(data, name), home / "shards" / name)
    shutil.copytree(runs, home / "runs")
    return home


# One of each kind that was once not refused.
QUICK = {
    "checkpoints of odd names",
    "a state in a checkpoint of an odd name",
    "metrics as pipe",
    "samples nested deep",
    "questions as pipe",
    "an id of 2**31",
    "a normalizer that makes every character longer",
    "a template of 5 MB",
    "a template nested deep",
    "a record of a recipe with process -1",
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES])
def test_hostile(name: str, place: Path, mm: Run) -> None:
    line, make, words = CASES[name]
    make()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def too_long(*_: object) -> None:
        raise AssertionError(f"{line} takes more than {SECONDS} s")

    old = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        ran = mm(line)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    assert "Traceback" not in ran.err and "AssertionError" not in ran.err
    if words:
        refused(ran, words)
    elif ran.code:
        refused(ran)
    else:
        fine(ran)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES
