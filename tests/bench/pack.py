"""MB/s of jsonl of `mm pack` end to end, against the encoder alone and what else people use; padding, memory, `--plan`.

    python tests/bench/pack.py --rows DIR --tokenizer DIR [--minimind CHECKOUT] [--megabytes 200] [--slice 12] [--memory]
    python tests/bench/pack.py --rows DIR --tokenizer DIR --kinds sft pretrain dpo --by-turns CHECKOUT [--rounds 3]
    python tests/bench/pack.py --rows DIR --tokenizer DIR --megabytes 60 --formats [--rounds 3]
    python tests/bench/pack.py --rows DIR --tokenizer DIR --megabytes 4 --templates tests/fixtures/published --by-turns CHECKOUT

With --by-turns, `mm pack` of this checkout and of another run in turns on the same file, --rounds times each, with one
worker and with two; the table shows the median rate of both and their ratio. With --templates, the turns of the sft rows, without
tools and reasoning, are packed with the tokenizer and each chat template of a folder, with one worker. With --formats, the same rows are packed as jsonl, parquet
(zstd), a pretty JSON array and, where they are flat, csv, in turns; rates are of MB of jsonl.

DIR holds real rows: every sft*.jsonl, pretrain*.jsonl or dpo*.jsonl in it is repeated up to --megabytes, in another order
each time and never twice the same: of the Chinese characters 12 % are drawn anew from all of the files' characters, of the words
8 % from their words and 3 % get another letter, all digits are drawn anew. So an encoder that remembers words or texts
finds what it would find in a real file of this size, not repetitions.

`mm pack` runs as a user runs it: a process of its own from start to exit, hashing the input, 2 workers, proof included.
Peers run on the first --slice MB of the same file with the same tokenizer, in a virtual environment that is made beside
(--peers), and which sees this one's packages: datasets.map (num_proc=2) with transformers' template and MiniMind's mask,
MiniMind's own Dataset (one core), datatrove's DocumentTokenizer (2 tasks), and Megatron's preprocess_data as a structure:
a pool of 2 that loads, encodes and appends eod line by line, one writer of a flat binary. What cannot be made is said.
"""

import argparse
import itertools
import json
import os
import random
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CJK, WORD = r"[\u4e00-\u9fff]", r"[A-Za-z]{3,}"
VARIED = re.compile(rf"</?[a-z_]+>|<\|\w+\|>|{CJK}|{WORD}|\d")  # marks and tags stay as they are
MAX_LEN = 1024


# --- the rows


def write_corpus(sources: list[Path], out: Path, num_bytes: int) -> None:
    """Rows of `sources`, varied, until there are so many bytes."""
    rows = [json.loads(line) for path in sources for line in path.read_text(encoding="utf-8").splitlines()]
    said = " ".join(text for row in rows for text in texts(row))
    characters, words = re.findall(CJK, said), re.findall(WORD, said)
    draw = random.Random(0).random

    def varied(match: re.Match[str]) -> str:
        found, chance = match.group(), draw()
        if found[0] == "<":
            return found
        if found.isdigit():
            return str(int(draw() * 10))
        if found[0] >= "\u4e00":
            return characters[int(draw() * len(characters))] if chance < 0.12 else found
        if chance < 0.08:
            return words[int(draw() * len(words))]
        at = int(draw() * len(found))
        return f"{found[:at]}{'aeioutnsrl'[int(draw() * 10)]}{found[at + 1 :]}" if chance < 0.11 else found

    order = random.Random(1)
    with out.open("w", encoding="utf-8") as file:
        while True:
            for row in order.sample(rows, len(rows)):
                once: dict[str, str] = {}  # a pair's two sides keep the messages they share
                for text in texts(row):
                    once[text] = once.get(text) or VARIED.sub(varied, text)
                file.write(json.dumps(with_texts(row, once), ensure_ascii=False) + "\n")
            if file.tell() >= num_bytes:
                return


SIDES = ("conversations", "chosen", "rejected")


def texts(row: dict[str, Any]) -> list[str]:
    """The document, or the contents of all messages."""
    return [row["text"]] if "text" in row else [m["content"] for side in SIDES for m in row.get(side, ())]


def with_texts(row: dict[str, Any], by: dict[str, str]) -> dict[str, Any]:
    """The row with its texts replaced."""
    if "text" in row:
        return row | {"text": by[row["text"]]}
    return row | {side: [m | {"content": by[m["content"]]} for m in row[side]] for side in SIDES if side in row}


def cut_slice(path: Path, num_bytes: int) -> Path:
    """The first lines of a file, about so many bytes."""
    out = path.with_suffix(".slice.jsonl")
    with path.open("rb") as source, out.open("wb") as file:
        while file.tell() < num_bytes and (line := source.readline()):
            file.write(line)
    return out


# --- mm


def tree_pss(pid: int) -> int:
    """Bytes resident in a process and its children; a page that n processes share counts 1/n in each."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        own = int(re.findall(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)[0]) * 1024
        return own + sum(tree_pss(int(child)) for child in children.read_text().split())
    except (OSError, IndexError):
        return 0


def pack(
    path: Path, out: Path, tokenizer: Path, workers: int, checkout: Path = ROOT
) -> tuple[float, int, dict[str, Any]]:
    """Wall seconds from start to exit, peak memory of all processes, and the figures it printed."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-c", "import cli; cli.main()", "pack", str(path), "--out", str(out)]
    command += [
        "--tokenizer",
        str(tokenizer),
        "--max-len",
        str(MAX_LEN),
        "--workers",
        str(workers),
        "--no-report",
        "--json",
    ]
    environment = os.environ | {"PYTHONPATH": str(checkout)} | ({"RAYON_NUM_THREADS": "1"} if workers == 1 else {})
    with tempfile.TemporaryFile() as said:  # a pipe that nobody reads would fill up
        start, peak = time.monotonic(), 0
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.DEVNULL, env=environment, cwd=checkout)
        while process.poll() is None:
            peak = max(peak, tree_pss(process.pid))
            time.sleep(0.1)
        seconds = time.monotonic() - start
        assert process.returncode == 0, "mm pack failed"
        said.seek(0)
        return seconds, peak, json.loads(said.read())[0]


def raw_encoder(path: Path, tokenizer: Path) -> float:
    """CPU seconds of the encoder that mm takes, alone on one thread, on strings made ready before, the caches cold."""
    code = (
        "import sys, time, json; from pathlib import Path; sys.path.insert(0, sys.argv[3])\n"
        "from mmdata.tokenizer.tokenizer import Tokenizer; from mmdata.tokenizer.encoders import choose\n"
        "rows = [json.loads(line) for line in open(sys.argv[1], encoding='utf-8')]\n"
        "texts = [r.get('text') or ''.join(f\"<|im_start|>{m['role']}\\n{m['content']}<|im_end|>\\n\" for m in r['conversations']) for r in rows]\n"
        "encode = choose(Tokenizer.load(Path(sys.argv[2]))).encode\n"
        "start = time.process_time()\n"
        "for i in range(0, len(texts), 1000): encode(texts[i:i+1000], True)\n"
        "print(time.process_time() - start)\n"
    )
    environment = os.environ | {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", code, str(path), str(tokenizer), str(ROOT)]
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def padding(out: Path) -> tuple[float, float]:
    """Share of positions without a token: of all train packs, and of the worst part with a whole part's bytes."""
    shards = [s for s in json.loads((out / "manifest.json").read_bytes())["shards"] if s["split"] == "train"]

    def share(of: list[dict[str, Any]]) -> float:
        return 1 - sum(s["tokens"] for s in of) / max(1, sum(s["samples"] * s["bucket"] for s in of))

    parts = {s["part"] for s in shards}
    whole = sorted(parts)[:-1] or sorted(parts)
    return share(shards), max(share([s for s in shards if s["part"] == part]) for part in whole)


# --- peers: run by the peers' own interpreter as `pack.py --peer NAME FILE TOKENIZER SCRATCH CHECKOUT`


def mask_of(ids: list[int], header: list[int], end: list[int]) -> list[int]:
    """MiniMind's rule, token by token: from after the assistant's header through the end of turn."""
    mask, i = [0] * len(ids), 0
    while i < len(ids):
        if ids[i : i + len(header)] != header:
            i += 1
            continue
        i += len(header)
        while i < len(ids) and ids[i : i + len(end)] != end:
            mask[i] = 1
            i += 1
        for at in range(i, min(i + len(end), len(ids))):
            mask[at] = 1
        i += len(end)
    return mask


_loaded: dict[str, Any] = {}


def loaded(tokenizer: str) -> Any:
    if tokenizer not in _loaded:
        from transformers import AutoTokenizer

        _loaded[tokenizer] = AutoTokenizer.from_pretrained(tokenizer)
    return _loaded[tokenizer]


def map_batch(batch: dict[str, list[Any]], tokenizer: str) -> dict[str, list[Any]]:
    native = loaded(tokenizer)
    if "text" in batch:
        ids = native(batch["text"], add_special_tokens=False).input_ids
        return {"input_ids": ids, "loss_mask": [[1] * len(row) for row in ids]}
    header, end = (native(t, add_special_tokens=False).input_ids for t in ("<|im_start|>assistant\n", "<|im_end|>\n"))
    written = []
    for row in batch["conversations"]:
        messages = [{key: value for key, value in m.items() if value is not None} for m in row]
        tools = next((json.loads(m["tools"]) for m in messages if m.get("tools")), None)
        for m in messages:
            if m.get("tool_calls"):
                m["tool_calls"] = json.loads(m["tool_calls"])
        written.append(native.apply_chat_template(messages, tools=tools or None, tokenize=False))
    ids = native(written, add_special_tokens=False).input_ids
    return {"input_ids": ids, "loss_mask": [mask_of(row, header, end) for row in ids]}


def peer_map(path: str, tokenizer: str, scratch: str, _: str) -> None:
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.load_dataset("json", data_files=path, split="train", cache_dir=scratch)
    options: dict[str, Any] = {"fn_kwargs": {"tokenizer": tokenizer}, "remove_columns": rows.column_names}
    rows.map(map_batch, batched=True, num_proc=2, load_from_cache_file=False, **options)


def peer_minimind(path: str, tokenizer: str, scratch: str, checkout: str) -> None:
    os.environ["HF_DATASETS_CACHE"] = scratch
    sys.path.insert(0, checkout)
    from dataset import lm_dataset  # pyright: ignore[reportMissingImports]

    kind = lm_dataset.PretrainDataset if "pretrain" in Path(path).name else lm_dataset.SFTDataset
    rows = kind(path, loaded(tokenizer), max_length=MAX_LEN)
    start = time.monotonic()
    for i in range(len(rows)):
        rows[i]
    print(time.monotonic() - start)  # without loading the file, which is done once


def peer_datatrove(path: str, tokenizer: str, scratch: str, _: str) -> None:
    from datatrove.executor import LocalPipelineExecutor  # pyright: ignore[reportMissingImports]
    from datatrove.pipeline.readers import JsonlReader  # pyright: ignore[reportMissingImports]
    from datatrove.pipeline.tokens import DocumentTokenizer  # pyright: ignore[reportMissingImports]

    halves = Path(scratch) / "in"
    halves.mkdir()
    lines = Path(path).read_bytes().splitlines(keepends=True)
    for n in range(2):
        (halves / f"{n}.jsonl").write_bytes(b"".join(lines[n::2]))
    step = DocumentTokenizer(
        output_folder=f"{scratch}/out", tokenizer_name_or_path=f"{tokenizer}/tokenizer.json", eos_token="<|im_end|>"
    )
    start = time.monotonic()
    LocalPipelineExecutor([JsonlReader(str(halves)), step], tasks=2, workers=2, logging_dir=f"{scratch}/log").run()
    print(time.monotonic() - start)


def megatron_line(line: bytes) -> tuple[list[int], int]:
    ids = loaded(_loaded["path"])(json.loads(line)["text"], add_special_tokens=False).input_ids
    return [*ids, 2], len(line)


def megatron_start(tokenizer: str) -> None:
    _loaded["path"] = tokenizer
    loaded(tokenizer)


def peer_megatron(path: str, tokenizer: str, scratch: str, _: str) -> None:
    import multiprocessing

    import numpy as np

    with multiprocessing.Pool(2, megatron_start, (tokenizer,)) as pool, open(path, "rb") as lines:
        with open(f"{scratch}/out.bin", "wb") as out:
            sizes = []
            for ids, _size in pool.imap(megatron_line, lines, 32):
                out.write(np.array(ids, np.uint16).tobytes())
                sizes.append(len(ids))
        np.save(f"{scratch}/out.idx.npy", np.array(sizes, np.int32))


PEERS: dict[str, Callable[[str, str, str, str], None]] = {
    "datasets.map, num_proc=2": peer_map,
    "MiniMind's Dataset, one core": peer_minimind,
    "datatrove DocumentTokenizer, 2 tasks": peer_datatrove,
    "Megatron preprocess_data, 2 workers": peer_megatron,
}


def peers_python(venv: Path) -> Path:
    """The interpreter of the peers' environment, made if it is not there; it sees this one's packages too."""
    python = venv / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        (own,) = (p for p in sys.path if p.endswith("site-packages"))
        (site,) = venv.glob("lib/python*/site-packages")
        (site / "mm.pth").write_text(own + "\n")
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "datasets", "datatrove", "orjson"], check=True)
    return python


def run_peer(name: str, python: Path, path: Path, tokenizer: Path, checkout: Path | None) -> float | str:
    """MB/s, or what is missing."""
    if "MiniMind" in name and not checkout:
        return "not run: give --minimind CHECKOUT"
    with tempfile.TemporaryDirectory() as scratch:
        command = [str(python), __file__, "--peer", name, str(path), str(tokenizer), scratch, str(checkout)]
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        start = time.monotonic()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        seconds = time.monotonic() - start
    if done.returncode:
        return "failed: " + (done.stderr.strip().splitlines() or ["no reason"])[-1][:200]
    if said := re.findall(r"^\d+\.\d+$", done.stdout, re.MULTILINE):
        seconds = float(said[-1])
    return path.stat().st_size / 1e6 / seconds


# --- the tables


def measure(name: str, path: Path, options: argparse.Namespace, root: Path) -> Iterator[tuple[str, str]]:
    megabytes = path.stat().st_size / 1e6
    out = root / name
    if not options.only_peers:
        foreseen = plan(path, options.tokenizer)
        seconds, peak, figures = pack(path, out, options.tokenizer, 2)
        rate = megabytes / seconds
        total, worst = padding(out)
        yield f"`mm pack`, {name}, {megabytes:.0f} MB, 2 workers", f"{rate:.1f} MB/s; peak {peak / 1e6:.0f} MB"
        yield f"padding, {name}", f"{100 * total:.3f} %, worst whole part {100 * worst:.3f} %"
        size = sum(f.stat().st_size for f in out.rglob("*.arrow"))
        real = {
            "tokens": figures["tokens"],
            "loss_tokens": figures["loss_tokens"],
            "disk_bytes": size,
            "seconds": seconds,
        }
        told = ", ".join(f"{key} {100 * (foreseen[key] / value - 1):+.1f} %" for key, value in real.items())
        yield f"`--plan` against this pack, {name}", f"{told}; padding {100 * foreseen['padding']:.2f} %"
        piece = cut_slice(path, 100_000_000)
        alone = piece.stat().st_size / 1e6 / raw_encoder(piece, options.tokenizer)
        seconds, _, _ = pack(piece, out, options.tokenizer, 1)
        one = piece.stat().st_size / 1e6 / seconds
        yield f"encoder alone, one thread, {name}", f"{alone:.1f} MB/s"
        yield f"`mm pack`, 1 worker, one thread, {name}", f"{one:.1f} MB/s, {100 * one / alone:.0f} % of the encoder"
        shutil.rmtree(out)
    else:
        rate = options.only_peers
    python = peers_python(options.peers)
    for peer in PEERS:
        if name == "sft" and ("datatrove" in peer or "Megatron" in peer):
            continue
        found = run_peer(peer, python, cut_slice(path, int(options.slice * 1e6)), options.tokenizer, options.minimind)
        cores = 2 if "one core" in peer else 1
        ratio = f"{found:.2f} MB/s; mm {rate / cores / found:.0f} times" if isinstance(found, float) else found
        yield f"{peer}, {name}", ratio + (" (per core)" if cores == 2 and isinstance(found, float) else "")


def plan(path: Path, tokenizer: Path) -> dict[str, Any]:
    """What `mm pack --plan` says of this length limit."""
    command = [sys.executable, "-c", "import cli; cli.main()", "pack", str(path), "--tokenizer", str(tokenizer)]
    done = subprocess.run(
        [*command, "--plan", "--json", "--workers", "2"],
        capture_output=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    return next(o for o in json.loads(done.stdout)[0]["outlooks"] if o["max_len"] == MAX_LEN)


def by_turns(name: str, path: Path, options: argparse.Namespace, root: Path) -> Iterator[tuple[str, str]]:
    """Median rates of this checkout and of another one, run in turns, and whether both wrote the same dataset.

    The rate by CPU time (of all processes) hardly depends on what else the machine does; that by wall time does.
    """
    megabytes, out = path.stat().st_size / 1e6, root / name
    for workers in (1, 2):
        spent: dict[Path, list[tuple[float, float]]] = {ROOT: [], options.by_turns: []}  # wall and CPU seconds
        digests = set()
        for _ in range(options.rounds):
            for checkout, of in spent.items():
                before = children_cpu_s()
                wall_s = pack(path, out, options.tokenizer, workers, checkout)[0]
                of.append((wall_s, children_cpu_s() - before))
                digests.add(json.loads((out / "manifest.json").read_bytes())["dataset_digest"])
        same = "the same dataset" if len(digests) == 1 else "OTHER DATASETS"
        for n, clock in enumerate(("wall", "CPU")):
            here, there = (megabytes / statistics.median(times[n] for times in of) for of in spent.values())
            what = f"`mm pack`, {name}, {megabytes:.0f} MB, {workers} worker{'s' * (workers > 1)}, by {clock} time"
            yield what, f"{here:.2f} MB/s, other checkout {there:.2f} MB/s: {here / there:.2f} times; {same}"
    shutil.rmtree(out)


MARK = re.compile(r"<\|\w+\|>|<｜[^<｜]+｜>|\[/?[A-Z_]{4,}\]|\[gMASK\]|<(?:start|end)_of_turn>|<sop>|</?s>")


def with_template(tokenizer: Path, template: str, out: Path) -> Path:
    """The tokenizer with another chat template, of which the tokens that it writes are special."""
    shutil.copytree(tokenizer, out, copy_function=shutil.copyfile)
    data, config = (json.loads((out / f"tokenizer{name}.json").read_bytes()) for name in ("", "_config"))
    known = {token["content"] for token in data["added_tokens"]}
    free = 1 + max([*data["model"]["vocab"].values(), *(token["id"] for token in data["added_tokens"])])
    names = dict.fromkeys([*MARK.findall(template), "<|system|>", "<|user|>", "<|assistant|>", "<s>", "</s>"])
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    new = [{"id": free + n, "content": name, **flags, "special": True} for n, name in enumerate(names.keys() - known)]
    data["added_tokens"] += new
    config |= {"chat_template": template, "bos_token": "<s>", "eos_token": "</s>"}
    for name, content in (("", data), ("_config", config)):
        (out / f"tokenizer{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return out


def plain_turns(sources: list[Path], out: Path) -> Path:
    """The turns of rows, a user's message and an answer each, without anything else."""
    with out.open("w", encoding="utf-8") as file:
        for line in (line for path in sources for line in path.read_text(encoding="utf-8").splitlines()):
            said = [{"role": m["role"], "content": m["content"]} for m in json.loads(line)["conversations"]]
            pairs = [pair for pair in itertools.pairwise(said) if [m["role"] for m in pair] == ["user", "assistant"]]
            messages = [m for pair in pairs for m in pair if all(m["content"].strip() for m in pair)]
            if messages:
                file.write(json.dumps({"conversations": messages}, ensure_ascii=False) + "\n")
    return out


def templates(name: str, path: Path, options: argparse.Namespace, root: Path) -> Iterator[tuple[str, str]]:
    """CPU seconds of `mm pack` with each template, here and in another checkout, by turns."""
    megabytes = path.stat().st_size / 1e6
    for template in sorted(options.templates.glob("*.jinja")):
        tokenizer = with_template(options.tokenizer, template.read_text(encoding="utf-8"), root / template.stem)
        spent: dict[Path, list[float]] = {ROOT: [], options.by_turns or ROOT: []}
        digests = set()
        for _ in range(options.rounds):
            for checkout, of in spent.items():
                before = children_cpu_s()
                try:
                    pack(path, root / "out", tokenizer, 1, checkout)
                except AssertionError:  # a template that ends no answer
                    continue
                of.append(children_cpu_s() - before)
                digests.add(json.loads((root / "out" / "manifest.json").read_bytes())["dataset_digest"])
        if all(spent.values()):
            here, there = (statistics.median(of) for of in (spent[ROOT], spent[options.by_turns or ROOT]))
            figures = f"{here:.1f} s CPU, {megabytes / here:.2f} MB/s; other checkout {there:.1f} s, {megabytes / there:.2f} MB/s"
            same = "the same dataset" if len(digests) == 1 else "OTHER DATASETS"
            yield (
                f"`mm pack`, {name}, {megabytes:.1f} MB, {template.stem}",
                f"{figures}: {there / here:.1f} times; {same}",
            )


def formats(name: str, path: Path, options: argparse.Namespace, root: Path) -> Iterator[tuple[str, str]]:
    """The same rows in several formats by turns: rate, share of jsonl's, and peak memory."""
    import csv

    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    paths = {"jsonl": path, "parquet": root / f"{name}.parquet", "JSON array": root / f"{name}.json"}
    pq.write_table(pa.Table.from_pylist(rows), paths["parquet"], compression="zstd", row_group_size=10_000)
    paths["JSON array"].write_text(json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8")
    if all(isinstance(value, str) for value in rows[0].values()):
        paths["csv"] = root / f"{name}.csv"
        with paths["csv"].open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    megabytes = path.stat().st_size / 1e6
    for workers in (1, 2):
        spent: dict[str, list[tuple[float, float, int]]] = {name: [] for name in paths}  # wall and CPU seconds, peak
        kept = set()
        for _ in range(options.rounds):
            for label, file in paths.items():
                before = children_cpu_s()
                wall_s, peak, packed = pack(file, root / "out", options.tokenizer, workers)
                spent[label].append((wall_s, children_cpu_s() - before, peak))
                kept.add((packed["kept"], packed["tokens"]))
        assert len(kept) == 1, kept
        for label, of in spent.items():
            wall, cpu, peak = (statistics.median(each) for each in zip(*of, strict=True))
            wall_ratio, cpu_ratio = (
                statistics.median(each[n] for each in spent["jsonl"]) / (wall, cpu)[n] for n in (0, 1)
            )
            rates = f"{megabytes / wall:.1f} MB/s ({wall_ratio:.2f} of jsonl's; by CPU time {cpu_ratio:.2f})"
            what = f"`mm pack`, {name} as {label}, {megabytes:.0f} MB of jsonl, {workers} worker{'s' * (workers > 1)}"
            yield what, f"{rates}, peak {peak / 1e6:.0f} MB"


def children_cpu_s() -> float:
    """CPU seconds of the child processes that have ended, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def memory(path: Path, options: argparse.Namespace, root: Path) -> Iterator[tuple[str, str]]:
    """The file again and again up to 1 GB: memory hangs on sizes, not on what is said."""
    large = root / "large.jsonl"
    with large.open("wb") as file:
        while file.tell() < 1e9:
            file.write(path.read_bytes())
    seconds, peak, _ = pack(large, root / "large", options.tokenizer, 2)
    size = large.stat().st_size / 1e6
    yield (
        f"`mm pack`, {size:.0f} MB of sft, 2 workers",
        f"{size / seconds:.1f} MB/s; peak {peak / 1e6:.0f} MB in all processes",
    )
    large.unlink()
    shutil.rmtree(root / "large")


def main() -> None:
    """Prints the rows for RESULTS.md."""
    if len(sys.argv) > 1 and sys.argv[1] == "--peer":
        PEERS[sys.argv[2]](*sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--minimind", type=Path, help="a checkout of MiniMind's repository")
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--slice", type=float, default=12, help="MB that the peers get")
    parser.add_argument("--work", type=Path, help="where the corpora stay between runs")
    parser.add_argument("--peers", type=Path, default=Path(tempfile.gettempdir()) / "mm-bench-peers")
    parser.add_argument("--kinds", nargs="+", default=["sft", "pretrain"])
    parser.add_argument("--by-turns", type=Path, metavar="CHECKOUT", help="only compare with another checkout")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each with --by-turns and --formats")
    parser.add_argument("--templates", type=Path, metavar="DIR", help="only pack with the chat templates of a folder")
    parser.add_argument("--formats", action="store_true", help="only compare the same rows in several formats")
    parser.add_argument("--memory", action="store_true", help="also pack 1 GB and watch the memory")
    parser.add_argument("--only-peers", type=float, metavar="RATE", help="only the peers, against this rate of mm's")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        root = options.work or Path(directory)
        for name in options.kinds:
            path = root / f"{name}.jsonl"
            if not path.exists():
                sources = sorted(options.rows.glob(f"{name}*.jsonl"))
                if options.templates:
                    sources = [plain_turns(sources, root / "plain.jsonl")]
                write_corpus(sources, path, int(options.megabytes * 1e6))
            only = formats if options.formats else measure
            rows = templates if options.templates else by_turns if options.by_turns else only
            for what, figure in rows(name, path, options, root):
                print(f"| {what} | {figure} |", flush=True)
            if options.memory and name == "sft" and rows is measure:
                for what, figure in memory(path, options, root):
                    print(f"| {what} | {figure} |", flush=True)


if __name__ == "__main__":
    main()
