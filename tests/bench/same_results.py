"""Whether two checkouts give the same results: dataset digests, training losses, and answers at temperature 0.

    python tests/bench/same_results.py BEFORE [AFTER] --data DIR

`BEFORE` and `AFTER` are checkouts of mm; `DIR` holds `minimind_dataset/*.jsonl` and `tokenizers/NAME/`. Each checkout packs
every file with every tokenizer, trains 30 steps of pretrain, sft and dpo on the CPU with each tokenizer (losses and weights are
compared bit for bit) and answers a few prompts greedily. What AFTER packs and trains is also opened by BEFORE's data and the
other way round: AFTER verifies and evaluates what BEFORE wrote. Exits with 1 when anything differs. About 15 minutes
on two cores.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STAGES = {"pretrain": "pretrain_hq", "sft": "sft_512", "dpo": "dpo"}
PROMPTS = ("什么是机器学习？", "What is 3 + 4?", "hello")
TRAIN = ("--model demo", "--steps 30 --batch-tokens 4096 --micro-tokens 4096 --val-every 15 --log-every 1 --device cpu")


def mm(checkout: Path, home: Path, arguments: str, *more: str) -> str:
    """Standard output of a command of a checkout, run in `home`; its error output and SystemExit when it fails."""
    command = [sys.executable, "-m", "cli", *arguments.split(), *more]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{checkout}: mm {arguments} {' '.join(more)}\n{done.stdout}{done.stderr}")
    return done.stdout


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def record_of(path: Path) -> dict[str, Any]:
    """A record without its hash of itself, which older checkouts do not write."""
    record = json.loads(path.read_bytes())
    record.pop("record_sha256", None)
    return record


def results(checkout: Path, data: Path, home: Path) -> dict[str, Any]:
    """Name of a result -> its value, for one checkout."""
    found: dict[str, Any] = {}
    for tokenizer in sorted((data / "tokenizers").iterdir()):
        for file in sorted((data / "minimind_dataset").glob("*.jsonl")):
            out = home / "shards" / tokenizer.name / file.stem
            options = "--no-report --max-len 1024 --val-fraction 0.01 --workers 1"
            try:
                mm(checkout, home, f"pack {file} --tokenizer {tokenizer} --out {out} {options}")
            except SystemExit as refused:
                found[f"{tokenizer.name} {file.stem} digest"] = "refused: " + str(refused).split("error: ")[-1]
                continue
            found[f"{tokenizer.name} {file.stem} digest"] = record_of(out / "manifest.json")["dataset_digest"]
            found[f"{tokenizer.name} {file.stem} manifest"] = hashlib.sha256(
                json.dumps(record_of(out / "manifest.json")).encode()
            ).hexdigest()[:16]
        init = ""
        for stage, name in STAGES.items():
            run = home / "runs" / f"{tokenizer.name}-{stage}"
            model = f"--init {init}" if init else TRAIN[0]
            mm(
                checkout,
                home,
                f"train {stage} --data shards/{tokenizer.name}/{name} --out {run} {model} {TRAIN[1]} --quiet",
            )
            steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            kept = ("step", "loss", "grad_norm", "lr", "val_loss", "accuracy", "margin")
            found[f"{tokenizer.name} {stage} losses"] = [{k: s[k] for k in kept if k in s} for s in steps]
            weights = max(run.glob("checkpoints/step-*/model.safetensors"))
            found[f"{tokenizer.name} {stage} weights"] = digest(weights)
            found[f"{tokenizer.name} {stage} run.json keys"] = sorted(record_of(run / "run.json"))
            init = str(run)
            for prompt in PROMPTS:
                chat = f"chat {run} --temperature 0 --max-new-tokens 24 --prompt"
                found[f"{tokenizer.name} {stage} answer to {prompt}"] = mm(checkout, home, chat, prompt)
    return found


def opens_the_others(checkout: Path, home: Path) -> list[str]:
    """What a checkout cannot do with the datasets and runs that another one wrote under `home`."""
    wrong = []
    for directory in sorted(path.parent for path in home.glob("shards/*/*/manifest.json")):
        try:
            mm(checkout, home, f"verify {directory}")
        except SystemExit as error:
            wrong.append(str(error))
    for run in sorted(home.glob("runs/*")):
        try:
            mm(checkout, home, f"eval {run} --json")
            mm(checkout, home, f"report {run} --json")
            mm(
                checkout, home, f"train {run.name.rsplit('-', 1)[1]} --out {run} --resume --quiet"
            )  # finished: nothing to do
        except SystemExit as error:
            wrong.append(str(error))
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path, nargs="?", default=ROOT)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--keep", type=Path, help="keep BEFORE's results here, and take them from here the next time")
    parser.add_argument("--only-before", action="store_true", help="with --keep: make BEFORE's results and end")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        home = options.keep.resolve() if options.keep else Path(scratch) / "before"
        saved = home / "results.json"
        if not saved.exists():
            home.mkdir(parents=True, exist_ok=True)
            values = results(options.before.resolve(), options.data.resolve(), home)
            saved.write_text(json.dumps(values, ensure_ascii=False, indent=1), encoding="utf-8")
        if options.only_before:
            return
        before = json.loads(saved.read_text(encoding="utf-8"))
        other = Path(scratch) / "after"
        other.mkdir()
        after = json.loads(json.dumps(results(options.after.resolve(), options.data.resolve(), other)))
        different = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        for name in different:
            print(f"differs: {name}\n  before {str(before.get(name))[:600]}\n  after  {str(after.get(name))[:600]}")
        refused = opens_the_others(options.after.resolve(), home)
        for line in refused:
            print(f"refused: {line}")
        print(f"{len(before)} results, {len(different)} differ; {len(refused)} old datasets and runs are refused")
        raise SystemExit(bool(different or refused))


if __name__ == "__main__":
    main()
