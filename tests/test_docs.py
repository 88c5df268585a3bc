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
DOWNLOADS: tuple[str, ...] = ("fetch --preset begin",)
BEFORE = {  # page -> commands that its reader has typed before
    "getting-started.md": (*DOWNLOADS, *STAGES),
    "faq.md": (
        *DOWNLOADS,
        "fetch pretrain_hq sft_512",
        *STAGES,
        "tokenizer train data/dpo.jsonl --out data/tokenizer-mine",
    ),
    "how-to/own-data.md": (),
    "how-to/own-tokenizer.md": ("fetch pretrain_hq sft_512",),
    "how-to/own-shape.md": (*DOWNLOADS, "pack"),
    "how-to/several-cards.md": (*DOWNLOADS, *STAGES),
    "how-to/several-machines.md": (
        "fetch --preset zero --out other",
        "fetch pretrain_hq sft_512 --tokenizer minimind-3",
        "pack",
    ),
    "how-to/from-minimind.md": (),
    "how-to/exporting.md": (*DOWNLOADS, *STAGES),
}
ADDED = {
    "chat": "--max-new-tokens 2",
    "train": "--steps 2 --quiet",
    "report": "--quiet",
}  # where the line has no such option
CHANGED = {  # so that a line needs no large model, no card and no other machine
    "--scale 0.01": "--scale 0.9",
    "/mnt/other/data": "other",
    "--layers 12 --width 640": "--layers 2 --width 64",
    "--depth 6": "--depth 1",
    "--model minimind2 --nproc": "--model tiny --nproc",
}
NOT_RUN = (
    "mm demo",
    "mm serve",
    "mm doctor",
    "--lm-eval",
    "HOST",
)  # minutes, a server, this machine's state, the network


def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """One small shape under the names of all models, which can be exported for MiniMind although its vocabulary is smaller."""
    for name in MODEL_SHAPES:
        monkeypatch.setitem(MODEL_SHAPES, name, ModelConfig(0, 64, 1, 8, 2, 192))
    monkeypatch.setattr(export, "_not_minimind", lambda shape: [])


def quick(line: str) -> str:
    """The line with what makes it quick, without `mm`."""
    for old, new in CHANGED.items():
        line = line.replace(old, new)
    words = words_of(line)
    added = shlex.split(ADDED.get(words[0], ""))
    if words[0] == "chat" and "--prompt" not in words:
        added += ["--prompt", "hello"]
    if words[0] == "train" and {"--plan", "--steps", "--epochs"} & set(words):
        added = []
    return shlex.join([*words, *added])


def bring(line: str, mm: Run) -> None:
    """Make what a line takes for granted: the demo's directory, or MiniMind's .pth and tokenizer."""
    if " demo/" in line and not Path("demo").exists():
        for made in ("runs", "shards"):
            shutil.move(made, f"demo/{made}")
        for old, new in (("pretrain-1", "pretrain_hq"), ("sft-1", "sft_512"), ("dpo-1", "dpo")):
            Path("demo/runs", old).rename(Path("demo/runs", new))
        Path("demo/shards/sft_t2t_mini").rename("demo/shards/sft_512")
    if " out/" in line and not Path("out").exists():
        fine(mm("export runs/sft-1 --format minimind --out out"))
        next(Path("out").glob("*.pth")).rename("out/full_sft_768.pth")
        shutil.copytree("data/tokenizer", "model")


def start(line: str) -> "subprocess.Popen[bytes]":
    """Start a line with torchrun, for two steps."""
    words = shlex.split(line.replace("--steps 10", "").replace("29500", "29561"))
    command = [sys.executable, "-m", "torch.distributed.run", *words[1:], "--steps", "2", "--no-samples"]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})


@pytest.mark.slow
@pytest.mark.parametrize("name", BEFORE)
def test_the_commands_of_a_page_run(
    name: str, hub: FakeHub, tmp_path: Path, mm: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    in_process(monkeypatch)
    small_models(monkeypatch)
    for line in BEFORE[name]:
        fine(mm(line))
    for language, text in blocks(ROOT / "docs" / name):
        if language == "python":
            exec(compile(text, name, "exec"), {})
        if language == "toml":
            Path("my.toml").write_text(text)
        ranks = []
        for line in lines_of(text) if language in SHELLS else ():
            if any(word in line for word in NOT_RUN):
                continue
            if line.startswith("torchrun "):
                ranks.append(start(line))
            elif line.startswith("cp "):
                shutil.copy(*line.split()[1:])
            elif line.startswith("mm "):
                bring(line, mm)
                fine(mm(quick(line)))
        assert [rank.wait(timeout=300) for rank in ranks] == [0] * len(ranks)
