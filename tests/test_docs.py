"""The README and the pages of docs/ say what is true: links lead somewhere, options exist, every command would be
accepted as it stands, the tree is the tree, and the commands of the first pages run."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from command_line import Run, fine
from conftest import Build
from fakehub import FakeHub
from recipe_runs import in_process

import cli
from mmdata.commands.terminal import checking
from mmtrain.commands.other_flags import OTHER_FLAGS
from mmtrain.convert import export
from mmtrain.shapes import MODEL_SHAPES, ModelConfig

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "shards" / "README.md"])
APP: Any = typer.main.get_command(cli.app)
SHELLS = ("", "sh", "bash", "console")  # languages of fenced blocks that hold commands
ENDS = {"|", ">", ">>", "<", "&&", ";", "&"}  # words of the shell after which a command's own words end

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@cache
def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of each fenced block."""
    return re.findall(r"^ *```(\w*)\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.M | re.S)


@cache
def prose(page: Path) -> str:
    """The text of a page without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def lines_of(text: str) -> list[str]:
    """The command lines of a shell block, without prompts; of a block with prompts only those behind one."""
    lines = [line.strip() for line in re.sub(r" *\\\n\s*", " ", text).splitlines()]
    return [line[2:] for line in lines if line.startswith("$ ")] or lines


def words_of(line: str) -> list[str]:
    """The words behind `mm`, or behind `-m cli` of a line with torchrun; none of another line."""
    if not line.startswith(("mm ", "torchrun ")):
        return []
    words = shlex.split(line, comments=True)
    end = next((at for at, word in enumerate(words) if word in ENDS), len(words))
    return words[words.index("cli") + 1 if words[0] == "torchrun" else 1 : end]


def commands_of(page: Path) -> list[str]:
    """The command lines of a page."""
    return [line for language, text in blocks(page) if language in SHELLS for line in lines_of(text)]


def command_at(words: list[str]) -> Any:
    """The command, or group of commands, that the words begin with; None if there is none of that name."""
    command = APP
    for word in words:
        if not hasattr(command, "commands") or not re.match("[a-z]", word):
            break
        command = command.commands.get(word)
    return command


def flags_of(command: Any) -> set[str]:
    if hasattr(command, "commands"):
        return {"--help", "-h"}.union(*(flags_of(each) for each in command.commands.values()))
    return {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    names = [re.sub(r"[^\w\- ]", "", re.sub(r"\]\(.*?\)", "", each).lower()).replace(" ", "-") for each in headings]
    return {f"{name}-{names[:at].count(name)}" if name in names[:at] else name for at, name in enumerate(names)}


@every_page
def test_every_link_and_anchor_of_a_page_exists(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", prose(page)):
        path, _, anchor = "".join(target).partition("#")
        if not re.match("[a-z]+:", path):
            there = (page.parent / path).resolve() if path else page
            assert there.exists(), f"{page.name}: {path}"
            assert not anchor or anchor in anchors_of(there), f"{page.name}: {path}#{anchor}"


@every_page
def test_every_command_on_a_page_would_be_accepted(page: Path) -> None:
    for words in filter(None, map(words_of, commands_of(page))):
        try:
            with checking():
                APP.main(list(words), standalone_mode=False)
        except Exception as error:
            pytest.fail(f"{page.name}: mm {shlex.join(words)}: {getattr(error, 'message', error)}")


@every_page
def test_every_command_and_option_that_a_text_names_exists(page: Path) -> None:
    """In `code` that begins with mm or an option. Options of MiniMind's scripts are those that mm knows to answer."""
    known = flags_of(APP) | OTHER_FLAGS.keys() | {"--version", "--install-completion"}
    for span in re.findall(r"`([^`\n]+)`", prose(page)):
        words = span.split()
        options = (word for word in re.split(r"[\s/|]+", span) if re.match("--[a-z]", word))
        flags = {word.split("=")[0].strip(".,;:()") for word in options}
        if span.startswith("--"):
            assert flags <= known, f"{page.name}: {span}"
        elif words[:1] == ["mm"] and len(words) > 1 and re.match("[a-z]", words[1]):
            command = command_at(words[1:])
            assert command, f"{page.name}: {span}"
            assert flags <= flags_of(command) | {"--help"}, f"{page.name}: {span}"


def test_the_reference_is_what_the_program_declares() -> None:
    path = ROOT / "docs" / "reference.py"
    spec = importlib.util.spec_from_file_location("reference", path)
    assert spec and spec.loader
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    for page, content in reference.pages():
        assert page.read_text(encoding="utf-8") == content, "run python docs/reference.py"
    phrases = json.loads((path.parent / "zh" / "reference.json").read_text(encoding="utf-8"))
    assert [english for english, chinese in phrases.items() if chinese not in content] == [], "no longer used: remove"


@pytest.mark.parametrize("folder", ["docs", "docs/zh"])
def test_the_index_names_every_page(folder: str) -> None:
    index = ROOT / folder / "README.md"
    named = index.read_text(encoding="utf-8")
    pages = [str(page.relative_to(index.parent)) for page in PAGES if page.is_relative_to(index.parent)]
    assert [
        page for page in pages if not page.endswith("README.md") and f"]({page})" not in named and page[:3] != "zh/"
    ] == []


def test_every_command_of_mm_stands_in_the_readme() -> None:
    text = README.read_text(encoding="utf-8")
    assert [name for name in APP.commands if f"`mm {name}" not in text] == []


def test_the_readme_begins_with_set_up_and_four_commands() -> None:
    head = README.read_text(encoding="utf-8").splitlines()[:25]
    assert any(line.startswith("make demo") for line in head) and any(line.startswith("make test") for line in head)
    assert sum(line.startswith("mm ") for line in head) >= 4


def test_the_readmes_commands_run(home: Path, mm: Run) -> None:
    """As they stand, on small data: fetch needs a network and the model a minute, so the data is here and the model tiny."""
    words = [shlex.join(words_of(line)) for line in commands_of(README) if line.startswith("mm ")]
    lines = [line.replace("--model minimind2-small", "--model tiny") for line in words]
    assert [line.split()[0] for line in lines] == ["fetch", "pack", "train", "train", "train", "chat"]
    for line in lines[1:-1]:
        fine(mm(f"{line} --steps 1 --quiet" if line.startswith("train") else line))
    fine(mm(f"{lines[-1]} --prompt hello --max-new-tokens 2"))


def test_the_readmes_tree_names_every_folder() -> None:
    text = README.read_text(encoding="utf-8")
    folders = {path.parent.relative_to(ROOT) for top in ("mmdata", "mmtrain") for path in (ROOT / top).rglob("*.py")}
    assert [str(path) for path in sorted(folders) if f"{path.name}/" not in text] == []


# --- the commands of pages run, in order, as they stand but for what makes them quick

STAGES = ("pack", "train pretrain --steps 2 --quiet", "train sft --steps 2 --quiet", "train dpo --steps 2 --quiet")
MINI, SEED_ERA = "fetch --preset begin", "fetch pretrain_hq sft_512 --tokenizer minimind-3"
BEFORE = {  # page -> commands that its reader has typed before
    "getting-started.md": (),
    "faq.md": (MINI, SEED_ERA, *STAGES, "tokenizer train data/dpo.jsonl --out data/tokenizer-mine"),
    "how-to/own-data.md": (),
    "how-to/own-tokenizer.md": (SEED_ERA,),
    "how-to/own-shape.md": (MINI, "pack"),
    "how-to/several-cards.md": (MINI, *STAGES),
    "how-to/several-machines.md": ("fetch --preset zero --out other", SEED_ERA, "pack"),
    "how-to/from-minimind.md": (),
    "how-to/exporting.md": (MINI, *STAGES),
    **{f"learn/{page.name}": () for page in PAGES if page.parent == ROOT / "docs" / "learn"},
}
CHANGED = {  # so that a line needs no large model, no card, no port in use and no other machine
    "--scale 0.01": "--scale 0.9",
    "/mnt/other/data": "other",
    "--layers 12 --width 640": "--layers 2 --width 64",
    "--depth 6": "--depth 1",
    "--model minimind2 --nproc": "--model tiny --nproc",
    "29500": "29561",
}
SHELL = ("cp ", "head ", "tail ", "cat ")  # lines that bash runs
NOT_RUN = (
    "mm demo",
    "mm serve",
    "mm doctor",
    "--lm-eval",
    "HOST",
)  # minutes, a server, this machine's state, a network


def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """One small shape under the names of all models, which can be exported for MiniMind although its vocabulary is smaller."""
    for name in MODEL_SHAPES:
        monkeypatch.setitem(MODEL_SHAPES, name, ModelConfig(0, 64, 1, 8, 2, 192))
    monkeypatch.setattr(export, "_not_minimind", lambda shape: [])


def statements_of(text: str) -> list[str]:
    """The statements of a shell block: lines, or several of a document (<<'EOF')."""
    whole = re.findall(r"^[^\n]*<<'EOF'.*?^EOF$|^[^\n]+$", re.sub(r" *\\\n\s*", " ", text), re.M | re.S)
    return [statement if "<<" in statement else statement.strip() for statement in whole]


def quick(line: str) -> str:
    """The line with what makes it quick."""
    for old, new in CHANGED.items():
        line = line.replace(old, new)
    words = words_of(line)
    if words[:1] == ["train"] and "--plan" not in words:
        line = re.sub(r" --(steps|epochs) [\d.]+", "", line.split("#")[0]) + " --steps 2 --no-samples"
    elif words[:1] == ["chat"]:
        line = line.split("#")[0] + " --max-new-tokens 2" + (" --prompt hello" if "--prompt" not in words else "")
    return line


def run(statement: str, mm: Run) -> "subprocess.Popen[bytes] | None":
    """Execute a statement; return the process of one with torchrun, which waits for others."""
    if statement.startswith("python - <<"):
        exec(compile(statement.split("\n", 1)[1].removesuffix("EOF"), "<page>", "exec"), {})
    elif statement.startswith(SHELL):
        subprocess.run(["bash", "-c", statement], check=True, stdout=subprocess.DEVNULL)
    elif statement.startswith("torchrun "):
        command = [sys.executable, "-m", "torch.distributed.run", *shlex.split(quick(statement))[1:]]
        return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    elif statement.startswith("mm "):
        if " out/" in statement and not Path("out").exists():  # MiniMind's .pth, and its tokenizer in model/
            fine(mm("export runs/sft-1 --format minimind --out out"))
            next(Path("out").glob("*.pth")).rename("out/full_sft_768.pth")
            shutil.copytree("data/tokenizer", "model")
        fine(mm(shlex.join(words_of(quick(statement)))))
    return None


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # short scripts
@pytest.mark.parametrize("name", BEFORE)
def test_the_commands_of_a_page_run(
    name: str, hub: FakeHub, tmp_path: Path, mm: Run, built_once: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipes").symlink_to(ROOT / "recipes")
    in_process(monkeypatch)
    small_models(monkeypatch)
    for line in BEFORE[name]:
        fine(mm(line))
    if name.startswith(("learn/", "getting")):
        made = built_once("short_demo", lambda out: fine(mm(f"demo --minutes 0.22 --out {out / 'demo'}")))
        shutil.copytree(made / "demo", "demo")
    if name.startswith("learn/"):
        monkeypatch.chdir("demo")
    for language, text in blocks(ROOT / "docs" / name):
        if language == "python":
            exec(compile(text, name, "exec"), {})
        elif language == "toml":
            Path("my.toml").write_text(text)
        elif language in SHELLS:
            statements = [each for each in statements_of(text) if not any(word in each for word in NOT_RUN)]
            ranks = [rank for each in statements if (rank := run(each, mm))]
            assert [rank.wait(timeout=300) for rank in ranks] == [0] * len(ranks)


@pytest.mark.parametrize("page", ["docs/reliability.md", "docs/zh/reliability.md"])
def test_the_tests_that_hold_the_promises_are_there(page: str) -> None:
    named = re.findall(r"`((?:faults/)?test_\w+\.py)`", (ROOT / page).read_text(encoding="utf-8"))
    assert len(named) > 20 and all((ROOT / "tests" / name).is_file() for name in named)
