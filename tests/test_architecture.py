"""The layout of the project, held by reading every module's syntax tree once: who may import whom, how large a folder may be."""

import ast
import subprocess
import sys
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import warm

ROOT = Path(__file__).resolve().parent.parent
MAX_MODULES = 9  # of a folder, `__init__.py` not counted
MAX_PARAMETERS = 8  # of a public function outside commands/

# What each room may import of the project, itself always included. A room is a folder, or a module beside the folders.
# Rooms that are named include the rooms inside them, unless those stand here on their own.
DATA = ["errors", "options", "io", "tokenizer", "encode", "shards"]
MAY_IMPORT: dict[str, list[str]] = {
    "mmdata.errors": [],
    "mmdata.demo": ["mmdata.errors", "mmdata.io"],
    "mmdata.options": ["mmdata.errors"],
    "mmdata.io": ["mmdata.errors", "mmdata.options"],
    "mmdata.hub": ["mmdata.errors", "mmdata.options", "mmdata.io"],
    "mmdata.tokenizer": ["mmdata.errors", "mmdata.io"],
    "mmdata.encode": ["mmdata.errors", "mmdata.io", "mmdata.tokenizer"],
    "mmdata.tokenizer.toolkit": ["mmdata.errors", "mmdata.options", "mmdata.io", "mmdata.tokenizer", "mmdata.encode"],
    "mmdata.shards": ["mmdata.errors", "mmdata.io", "mmdata.tokenizer", "mmdata.encode"],
    "mmdata.pack": [f"mmdata.{room}" for room in DATA],
    "mmdata.stats": [*(f"mmdata.{room}" for room in DATA), "mmdata.tokenizer.toolkit", "mmdata.pack"],
    "mmdata.packed": [*(f"mmdata.{room}" for room in DATA), "mmdata.stats", "mmdata.torch_batches"],
    "mmdata.torch_batches": ["mmdata.errors", "mmdata.shards", "mmdata.packed"],
    "mmdata.commands": ["mmdata", "mmtrain.config", "mmtrain.shapes", "mmtrain.sizing"],
}
SHARED = [*(f"mmdata.{room}" for room in DATA), "mmdata.stats.report.page"]  # what mmtrain may take from mmdata
_ORDER = ["shapes", "config", "resolve", "records", "lineage", "sizing", "distributed", "model", "checkpoint"]
_ORDER += ["inference", "log", "train", "convert", "commands"]
MAY_IMPORT |= {
    f"mmtrain.{room}": [*SHARED, *(f"mmtrain.{before}" for before in _ORDER[:index])]
    for index, room in enumerate(_ORDER)
}
MAY_IMPORT["mmtrain.commands"] += ["mmdata"]
MAY_IMPORT["mmtrain.lineage"] += ["mmdata.hub"]  # where mm.lock says that files come from

# Libraries that only these rooms import.
ONLY_IN = {
    "polars": ("mmdata.packed", "mmdata.io.tables", "mmdata.pack.filter", "mmdata.stats"),
    "huggingface_hub": ("mmdata.hub",),
    "ray": ("mmdata.io.workers",),
    "torch": ("mmtrain", "mmdata.torch_batches"),
}
EXTRAS = {  # imported only inside the function that needs them
    *("fastokens", "zstandard", "ray", "fsspec", "rensa", "wandb", "swanlab", "trackio", "tensorboard", "starlette"),
    *("uvicorn", "llguidance", "transformers", "datasets", "gguf", "lm_eval"),
}
COMMANDS = ("mmdata.commands", "mmtrain.commands")
OPTIONS = (
    "mmdata.hub.options",
    "mmdata.io.options",
    "mmdata.options",
    "mmdata.pack.options",
    "mmdata.tokenizer.toolkit.options",
    "mmtrain.config",
    "mmtrain.inference.settings",
    "mmtrain.shapes",
)  # what the command line is generated from
PRINT = (*COMMANDS, "mmtrain.log.console")
READ_ENVIRONMENT = (*COMMANDS, "mmtrain.distributed", "mmdata.io.workers", "mmdata.encode.template.limits")


@dataclass(frozen=True)
class Module:
    """A parsed module: its dotted name, its path, the dotted names it imports, and the nodes of its syntax tree."""

    name: str
    path: Path
    imports: frozenset[str]
    top_imports: frozenset[str]
    nodes: tuple[ast.AST, ...]


@cache
def modules() -> tuple[Module, ...]:
    """Every module of the product, parsed once."""
    paths = [ROOT / "cli.py", *(path for top in ("mmdata", "mmtrain") for path in sorted((ROOT / top).rglob("*.py")))]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths}
    known = set(names.values())
    found = []
    for path, name in names.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = frozenset(other for node in tree.body for other in _imported(node, known))
        nodes = tuple(ast.walk(tree))
        imports = frozenset(other for node in nodes for other in _imported(node, known))
        found.append(Module(name, path, imports, top, nodes))
    return tuple(found)


def _imported(node: ast.AST, known: set[str]) -> Iterator[str]:
    """The dotted names that a statement imports; `from a import b` is `a.b` where that is a module of ours."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0 and node.module, f"line {node.lineno}: relative import"
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            yield inner if inner in known else node.module


def is_in(name: str, *rooms: str) -> bool:
    """Whether a module is one of `rooms` or lies inside one."""
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def room_of(name: str) -> str:
    """The room of MAY_IMPORT that a module belongs to: the longest that fits."""
    return max((room for room in MAY_IMPORT if is_in(name, room)), key=len, default="")


def test_rooms_import_only_what_comes_before_them() -> None:
    wrong = []
    for module in modules():
        room = room_of(module.name)
        allowed = {room, *MAY_IMPORT.get(room, ())}
        for other in module.imports:
            is_ours = is_in(other, "mmdata", "mmtrain", "cli") and room
            if is_ours and not {other, room_of(other), other.split(".")[0]} & allowed:
                wrong.append(f"{module.name} imports {other}")
    assert not wrong, wrong


def test_only_cli_imports_commands() -> None:
    for module in modules():
        if module.name != "cli" and not is_in(module.name, *COMMANDS):
            taken = {other for other in module.imports if is_in(other, "mmdata.commands", "mmtrain.commands", "cli")}
            assert not taken, f"{module.name} imports {taken}"


def test_libraries_are_declared_and_stay_in_their_rooms() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {_package(line) for line in project["dependencies"]}
    extras = {_package(line) for lines in project["optional-dependencies"].values() for line in lines}
    standard = set(sys.stdlib_module_names)
    for module in modules():
        taken = {other.split(".")[0] for other in module.imports} - standard - {"mmdata", "mmtrain", "cli"}
        assert taken <= declared | extras, f"{module.name} imports {taken - declared - extras}, which is not declared"
        top = {other.split(".")[0] for other in module.top_imports}
        assert not top & EXTRAS, f"{module.name} imports {top & EXTRAS} at its top"
        for library, rooms in ONLY_IN.items():
            assert library not in taken or is_in(module.name, *rooms), f"{module.name} imports {library}"


def _package(requirement: str) -> str:
    """The module that a requirement of pyproject.toml brings."""
    name = requirement
    for mark in " <>=!~;[":
        name = name.split(mark)[0]
    return name.replace("-", "_")


def test_commands_import_nothing_heavy_at_their_top() -> None:
    light = {*sys.stdlib_module_names, "typer", "cli"}
    for module in modules():
        if module.name == "cli" or is_in(module.name, *COMMANDS):
            for other in module.top_imports:
                ours = is_in(other, *COMMANDS, *OPTIONS, "mmdata.errors")
                assert ours or other.split(".")[0] in light, f"{module.name} imports {other} at its top"


def test_only_commands_print_and_read_the_environment() -> None:
    for module in modules():
        for node in module.nodes:
            place = f"{module.path.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                assert is_in(module.name, *PRINT), f"{place} prints"
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
                assert is_in(module.name, "cli", *READ_ENVIRONMENT), f"{place} reads the environment"


def test_only_io_files_renames_syncs_hashes_files_and_locks() -> None:
    """`rename`, `fsync`, `file_digest`, flock and filelock are for mmdata.io.files; in-memory hashes may be taken anywhere."""
    for module in modules():
        if module.name == "mmdata.io.files":
            continue
        assert not module.imports & {"filelock", "fcntl"}, f"{module.name} locks: use mmdata.io.files.locked"
        for node in module.nodes:
            if isinstance(node, ast.Attribute):
                is_os_replace = node.attr == "replace" and isinstance(node.value, ast.Name) and node.value.id == "os"
                is_wrong = is_os_replace or node.attr in ("rename", "fsync", "file_digest", "flock")
                assert not is_wrong, f"{module.path.name}:{node.lineno}: {node.attr} is for mmdata.io.files"


def test_folders_classes_and_signatures_stay_small() -> None:
    folders: dict[Path, list[str]] = defaultdict(list)
    classes: Counter[str] = Counter()
    wide = []
    for module in modules():
        if module.path.name != "__init__.py":
            folders[module.path.parent].append(module.path.name)
        for node in module.nodes:
            if isinstance(node, ast.ClassDef):
                classes[node.name] += 1
            if isinstance(node, ast.FunctionDef) and not is_in(module.name, "cli", *COMMANDS):
                number = len(node.args.args) + len(node.args.kwonlyargs)
                if number > MAX_PARAMETERS and not node.name.startswith("_"):
                    wide.append(f"{module.name}.{node.name} has {number} parameters")
    crowded = {folder.name: sorted(names) for folder, names in folders.items() if len(names) > MAX_MODULES}
    assert not crowded, crowded
    twice = [name for name, count in classes.items() if count > 1 and not name.startswith("_")]
    assert not twice, twice
    assert not wide, wide


def test_no_module_imports_in_a_circle() -> None:
    graph = {
        module.name: {other for other in module.imports if is_in(other, "mmdata", "mmtrain")} for module in modules()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_training_needs_neither_polars_nor_huggingface_hub() -> None:
    """Machines used only for training lack them. In a process that has torch already; ours is imported anew."""
    _runs(
        "import sys\n"
        "for name in list(sys.modules):\n"
        "    if name.split('.')[0] in ('mmdata', 'mmtrain'): del sys.modules[name]\n"
        "sys.modules['polars'] = None; sys.modules['huggingface_hub'] = None\n"
        "import mmtrain.train.loop, mmtrain.inference.engine, mmdata.shards.loader\n",
        warm.command(),
    )


def test_help_loads_nothing_heavy() -> None:
    _runs(
        "import sys, cli, typer\n"
        "try: cli.app(['--help'])\n"
        "except SystemExit: pass\n"
        "for command in typer.main.get_command(cli.app).commands.values():\n"
        "    for each in getattr(command, 'commands', {'': command}).values(): assert each.params\n"
        "heavy = {'torch', 'numpy', 'pyarrow', 'polars', 'tokenizers', 'huggingface_hub', 'rich', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )


def _runs(code: str, python: tuple[str, ...] = (sys.executable,)) -> None:
    done = subprocess.run([*python, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_modules_of_posix_systems_are_not_imported_at_a_top() -> None:
    posix = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog", "readline"}
    for module in modules():
        taken = {other.split(".")[0] for other in module.top_imports} & posix
        assert not taken, f"{module.name} imports {taken} at its top, which Windows does not have"


def test_the_command_line_only_registers_and_catches() -> None:
    assert len((ROOT / "cli.py").read_text(encoding="utf-8").splitlines()) <= 150
