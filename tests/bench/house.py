"""How large the project is, and how much of it one reads to follow a command.

    python tests/bench/house.py [CHECKOUT] [--data DIR] [--json]

Sizes: lines of Python of the product (cli.py, mmdata, mmtrain), modules, lines with an untyped dictionary, the largest functions.
Reading distances (with --data, a folder with `minimind_dataset/*.jsonl` and `tokenizers/minimind-3/`): a command is run under a
profiler; every function of the product that was called on the way from the command to the line named is counted once, with all
lines of its definition. So the figure holds every helper that ran, not only those on the shortest path.
"""

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# name -> (commands that prepare, the command that is followed, the first call of this function ends the path)
PATHS = {
    "mm train dpo -> loss and update": (
        ["pack DATA/dpo.jsonl --tokenizer TOKENIZER --out shards/dpo --no-report --workers 1"],
        "train dpo --data shards/dpo --model tiny --steps 1 --batch-tokens 4096 --device cpu --no-report --no-samples",
    ),
    "an sft line -> bytes in a shard": (
        [],
        "pack DATA/sft_512.jsonl --tokenizer TOKENIZER --out shards/sft --no-report --workers 1",
    ),
    "mm stats DIR --html": (
        ["pack DATA/sft_512.jsonl --tokenizer TOKENIZER --out shards/sft --no-report --workers 1"],
        "stats shards/sft --html page.html",
    ),
}
PROFILE = """
import sys, threading, json, atexit, os
called = set()
root = {root!r}
def note(frame, event, _):
    if event == "call":
        code = frame.f_code
        if code.co_filename.startswith(root) and code.co_filename.endswith(".py") and "/.venv/" not in code.co_filename and "/tests/" not in code.co_filename:
            called.add((code.co_filename, code.co_firstlineno, code.co_name))
def write():
    sys.setprofile(None)
    with open({out!r}, "w") as file:
        json.dump(sorted(called), file)
atexit.register(write)
import cli
threading.setprofile(note); sys.setprofile(note)
sys.argv = ["mm", *{arguments!r}]
cli.main()
"""


def sources(checkout: Path) -> list[Path]:
    return [checkout / "cli.py", *sorted(p for top in ("mmdata", "mmtrain") for p in (checkout / top).rglob("*.py"))]


def sizes(checkout: Path) -> dict[str, object]:
    """Lines, modules, untyped dictionaries, wide and long functions of a checkout."""
    lines = docstrings = untyped = 0
    functions = []
    modules = [path for path in sources(checkout) if path.name != "__init__.py"]
    for path in sources(checkout):
        text = path.read_text(encoding="utf-8")
        lines += text.count("\n")
        untyped += sum("dict[str, Any]" in line or "Mapping[str, Any]" in line for line in text.splitlines())
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                docstrings += (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
            if isinstance(node, ast.FunctionDef):
                functions.append(
                    ((node.end_lineno or 0) - node.lineno + 1, f"{path.relative_to(checkout)}:{node.name}")
                )
    return {
        "lines": lines,
        "of which docstrings": docstrings,
        "modules": len(modules),
        "lines of cli.py": (checkout / "cli.py").read_text(encoding="utf-8").count("\n"),
        "lines with dict/Mapping[str, Any]": untyped,
        "functions over 60 lines": sum(length > 60 for length, _ in functions),
        "largest function": max(functions),
    }


def definitions(path: Path) -> list[tuple[int, int, str]]:
    """First line (decorators included), last line and name of every function of a module."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found.append((first, node.end_lineno or node.lineno, node.name))
    return found


def distance(checkout: Path, called: list[tuple[str, int, str]]) -> tuple[int, int]:
    """Lines of the definitions of the functions called, and the number of files they stand in."""
    lines: dict[str, set[int]] = {}
    for file in {name for name, _, _ in called}:
        starts = {number for name, number, _ in called if name == file}
        for first, last, _ in definitions(Path(file)):
            if first in starts:
                lines.setdefault(file, set()).update(range(first, last + 1))
    return sum(map(len, lines.values())), len(lines)


def follow(checkout: Path, data: Path, home: Path, prepare: list[str], command: str) -> tuple[int, int]:
    """Run `prepare`, then `command` under a profiler; the distance of what it called."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    for one in [*prepare, command]:
        words = one.replace("DATA", str(data / "minimind_dataset")).replace(
            "TOKENIZER", str(data / "tokenizers/minimind-3")
        )
        out = home / "called.json"
        code = PROFILE.format(root=str(checkout), out=str(out), arguments=words.split())
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=home, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"mm {words}\n{done.stdout}{done.stderr}")
    return distance(checkout, [tuple(one) for one in json.loads(out.read_text())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, nargs="?", default=ROOT)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--json", action="store_true", dest="as_json")
    options = parser.parse_args()
    checkout = options.checkout.resolve()
    figures = sizes(checkout)
    if options.data:
        for name, (prepare, command) in PATHS.items():
            with tempfile.TemporaryDirectory() as home:
                lines, files = follow(checkout, options.data.resolve(), Path(home), prepare, command)
            figures[name] = f"{lines:,} lines in {files} files"
    if options.as_json:
        print(json.dumps(figures, indent=1))
    else:
        for name, value in figures.items():
            print(f"{name:<36} {value}")


if __name__ == "__main__":
    main()
