"""The rules of who may import whom, held by reading every module's imports; and what each process may load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {"mmdata", "mmtrain", "cli"}
DECLARED = {
    "torch",
    "numpy",
    "pyarrow",
    "polars",
    "tokenizers",
    "huggingface_hub",
    "typer",
    "rich",
    "safetensors",
    "jinja2",
    "filelock",
    "orjson",
}
# Imported only inside the function that needs it.
EXTRAS = {"fastokens", "zstandard", "ray", "fsspec", "rensa", "wandb", "swanlab", "trackio", "starlette", "uvicorn"}
# All that mmtrain takes from mmdata; `page` because the run's report is drawn like the data's.
FROM_DATA = {"loader", "shards", "template", "tokenizer", "errors", "page", "vocabulary"}

# A module imports only from modules before it on its package's path.
PATH = {
    "mmdata": [
        "errors",
        "catalog",
        "lock",
        "transfer",
        "sources",
        "plan",
        "fetch",
        "remote",
        "lines",
        "rows",
        "validate",
        "tokenizer",
        "encoders",
        "traced",
        "talks",
        "plain",
        "template",
        "blocks",
        "sequences",
        "bulk",
        "encode",
        "buckets",
        "packing",
        "arrow",
        "stamps",
        "shards",
        "columns",
        "overlap",
        "order",
        "loader",
        "pairs",
        "pair_checks",
        "verify",
        "engine",
        "parts",
        "shingles",
        "screen",
        "publish",
        "unfinished",
        "pipeline",
        "estimate",
        "repair",
        "tally",
        "texts",
        "corpus",
        "measure",
        "token_tally",
        "decoded",
        "scan",
        "samples",
        "figures",
        "remarks",
        "stats",
        "page",
        "report_words",
        "report",
        "report_compare",
        "chat_templates",
        "vocabulary",
        "hostile",
        "unigram",
        "tokenizer_train",
        "tokenizer_eval",
        "tokenizer_report",
        "tokenizer_compare",
        "tokenizer_check",
        "tokenizer_show",
        "tokenizer_extend",
        "demo",
        "terminal",
        "terminal_tokenizer",
    ],
    "mmtrain": [
        "config",
        "shared_prompt",
        "model",
        "losses",
        "preference",
        "batch",
        "muon",
        "optim",
        "ema",
        "lora",
        "precision",
        "distributed",
        "checkpoint",
        "resize",
        "reference",
        "metrics",
        "trackers",
        "evaluate",
        "replies",
        "decoder",
        "sampling",
        "generate",
        "worker",
        "api",
        "serve",
        "stages",
        "measure",
        "exam",
        "convert",
        "gguf_file",
        "export",
        "harness",
        "talk",
        "presets",
        "demo",
        "forecast",
        "plan",
        "speed",
        "speak",
        "history",
        "report_words",
        "report",
        "keeper",
        "preflight",
        "prelude",
        "facts",
        "start",
        "loop",
    ],
}
TERMINALS = {"mmdata.terminal", "mmdata.terminal_tokenizer"}  # what cli prints with
ALONE = {
    "mmdata.packing",
    "mmdata.buckets",
    "mmdata.tally",
    "mmdata.texts",
    "mmdata.page",
    "mmdata.unigram",
    "mmtrain.losses",
}  # import nothing of ours
FROM_DATA |= {"pairs", "pair_checks", "arrow"}  # arrow: a reference's cache is an Arrow file beside the dataset
MODULES = sorted(path for package in PATH for path in (ROOT / package).glob("*.py") if path.name != "__init__.py")
PEERS = {"transformers", "gguf", "lm_eval"}  # whose formats we write; imported like EXTRAS
CHAT = {"mmtrain.talk"}  # the terminal of `mm chat`


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path: Path, *, top_only: bool = False) -> set[str]:
    """Dotted names a file imports: `a.b` for `import a.b` and for `from a import b` of our own packages."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} relative import"
            assert node.module is not None
            if node.module in ("mmdata", "mmtrain"):
                names.update(f"{node.module}.{alias.name}" for alias in node.names)
            else:
                names.add(node.module)
    return names


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_only_from_earlier_on_its_path(path: Path) -> None:
    package, module = name_of(path).split(".")
    order = PATH[package]
    assert module in order, f"{name_of(path)} has no place on the path: add it to PATH in {Path(__file__).name}"
    for other in imports(path):
        if other.split(".")[0] == package:
            assert order.index(other.split(".")[1]) < order.index(module), f"{name_of(path)} imports {other}"
    if name_of(path) in ALONE:
        assert not {other for other in imports(path) if other.split(".")[0] in OURS}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_the_packages_keep_to_their_side(path: Path) -> None:
    names = imports(path)
    assert "cli" not in names
    if name_of(path).startswith("mmdata."):
        assert not {n for n in names if n.split(".")[0] in ("torch", "mmtrain")}
    else:
        taken = {n.split(".")[1] for n in names if n.startswith("mmdata.")}
        assert taken <= FROM_DATA, f"mmtrain takes {taken - FROM_DATA} from mmdata"


@pytest.mark.parametrize("path", [*MODULES, ROOT / "cli.py"], ids=name_of)
def test_what_is_imported_is_declared(path: Path) -> None:
    known = set(sys.stdlib_module_names) | OURS | DECLARED | EXTRAS | PEERS
    assert {n.split(".")[0] for n in imports(path)} <= known
    assert not {n.split(".")[0] for n in imports(path, top_only=True)} & (EXTRAS | PEERS)


def test_cli_and_terminal_import_nothing_heavy_at_their_top() -> None:
    """cli takes typer and mmdata.terminal (its printing half, apart so that both stay readable), terminal nothing."""
    standard = set(sys.stdlib_module_names)
    assert imports(ROOT / "cli.py", top_only=True) - standard <= {"typer", "mmdata.terminal", "collections.abc"}
    for name in TERMINALS:
        path = ROOT / f"{name.replace('.', '/')}.py"
        assert imports(path, top_only=True) - standard <= {"mmdata.terminal", "collections.abc"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_cli_uses_the_terminal(path: Path) -> None:
    assert name_of(path) in TERMINALS or not TERMINALS & imports(path)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_cli_prints_and_reads_the_environment(path: Path) -> None:
    may_print = {"mmtrain.metrics", *TERMINALS}
    may_read_environment = {"mmtrain.distributed", "mmdata.engine"}  # engine sets one variable in its own workers
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            assert name_of(path) in may_print | CHAT, f"{path.name}:{node.lineno} prints"
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
            assert name_of(path) in may_read_environment, f"{path.name}:{node.lineno} reads the environment"


def test_training_loads_neither_polars_nor_huggingface_hub() -> None:
    """Machines used only for training lack them."""
    code = (
        "import sys; sys.modules['polars'] = None; sys.modules['huggingface_hub'] = None\n"
        "import mmtrain.loop, mmtrain.generate, mmdata.loader\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, cli\n"
        "try: cli.app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'pyarrow', 'polars', 'tokenizers', 'huggingface_hub', 'rich', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
