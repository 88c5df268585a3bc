"""Where an export, run or dataset comes from: a tree from the hash of its content back to the hashes of the raw files, as
their records have it, and compared with what is on the disk. Imports no torch."""

from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from mmdata.errors import CheckpointError, DatasetError, UsageError
from mmdata.hub import catalog
from mmdata.hub.lockfile import read_lock
from mmdata.io.files import read_bytes, sha256_of
from mmdata.io.records import JsonObject, read_record
from mmdata.shards.dataset import CARD
from mmdata.shards.manifest import MANIFEST, Manifest, Parts, is_unfinished, read_manifest
from mmtrain.records import RUN, CheckpointState, RunRecord, newest_state, read_run

EXPORT = "export.json"
SAME, CHANGED, MISSING = "same", "changed", "missing"


class LineageNode(msgspec.Struct, kw_only=True):
    """A node of the tree. kind: export, run, dataset, tokenizer or file. sha256: the hash of its content as recorded.
    facts: what else its record has. state: same, changed or missing on the disk; empty if not compared. sources: what it
    was made from."""

    kind: str
    name: str
    sha256: str
    facts: JsonObject = {}
    state: str = ""
    sources: list["LineageNode"] = []

    def walk(self) -> Iterator["LineageNode"]:
        """Yield this node and all below it, each before its sources."""
        yield self
        for source in self.sources:
            yield from source.walk()

    def all(self, kind: str) -> list["LineageNode"]:
        """Return the different nodes of a kind."""
        return list({node.sha256: node for node in self.walk() if node.kind == kind}.values())


class ExportRecord(msgspec.Struct, kw_only=True):
    """export.json. step, weights_sha256: of the exported checkpoint. run: directory of its run. files: the sha256 of each
    file of weights."""

    format: str
    dtype: str
    weights_sha256: str
    step: int
    run: str = ""
    files: dict[str, str] = {}


def origin_of(path: Path, *, is_checked: bool = False) -> LineageNode:
    """Return the tree of an export, run or packed dataset. is_checked: hash everything and compare it with the records.
    Raise UsageError for another path, and the errors of records that cannot be read."""
    if (path / EXPORT).is_file():
        record = read_record(path / EXPORT, ExportRecord, CheckpointError, "mm export it again")
        states = [_state(path / name, sha256, is_checked) for name, sha256 in record.files.items()]
        facts = {"format": record.format, "dtype": record.dtype, "step": record.step}
        run = _located(record.run, path) if record.run else None
        below = [run_origin(run, record.weights_sha256, is_checked)] if run and (run / RUN).is_file() else []
        return LineageNode(
            kind="export",
            name=str(path),
            sha256=record.weights_sha256,
            facts=facts,
            state=_worst(states),
            sources=below,
        )
    if (path / RUN).is_file():
        return run_origin(path, "", is_checked)
    if (path / MANIFEST).is_file() or is_unfinished(path):
        return _dataset(path, str(path), "", is_checked)
    raise UsageError(f"{path} is no run, export or packed dataset", "name the directory of one, such as runs/sft-1")


def run_origin(path: Path, weights: str = "", is_checked: bool = False, seen: Collection[Path] = ()) -> LineageNode:
    """Return the tree of a run. weights: the hash of those that something else was made from; empty: the newest. seen:
    runs above this one in the tree."""
    run = read_run(path)
    states = {state.weights_sha256: state for state in _checkpoints(path)}
    newest = newest_state(path)
    sha256 = weights or (newest.weights_sha256 if newest else "")
    state = ""
    if is_checked:
        found = states.get(sha256)
        state = _worst(_weights_states(path, found)) if found else MISSING
    sources = [_dataset(_located(each.dir, path), each.dir, each.digest, is_checked) for each in run.data]
    if run.init and run.init.dir:
        parent = _located(run.init.dir, path)
        parent = parent.parent.parent if parent.parent.name == "checkpoints" else parent
        if not (parent / RUN).is_file() and (path.resolve().parent / parent.name / RUN).is_file():
            parent = path.resolve().parent / parent.name
        below = {*seen, path.resolve()}
        node = LineageNode(kind="run", name=str(parent), sha256=run.init.weights_sha256, state=MISSING * is_checked)
        with suppress(CheckpointError):  # without a record that can be read it is a leaf
            if parent.resolve() not in below and (parent / RUN).is_file():
                node = run_origin(parent, run.init.weights_sha256, is_checked, below)
        sources.append(node)
    if run.imported:
        sources.append(LineageNode(kind="file", name=Path(run.imported["from"]).name, sha256=run.imported["sha256"]))
    return LineageNode(
        kind="run", name=path.resolve().name, sha256=sha256, facts=_facts(run), state=state, sources=sources
    )


def _facts(run: RunRecord) -> dict[str, Any]:
    """Return what decided the weights of a run besides its sources: the samples, settings, code, and how it ended."""
    settings = {name: each.value for name, each in run.settings.items() if each.origin != "default" and each.value}
    facts = {
        "stage": run.stage,
        "status": run.status,
        "steps": run.final_step or 0,
        "samples": run.data_digest or "",
        "seed": run.settings["seed"].value if "seed" in run.settings else None,
        "settings": settings,
        "versions": run.versions or {},
        "val": (run.result or {}).get("val", {}),
    }
    return {name: value for name, value in facts.items() if value not in ("", None, {})}


def _dataset(path: Path, name: str, digest: str, is_checked: bool) -> LineageNode:
    """Return the tree of a packed dataset; only a leaf with its recorded name if it is not there, or is another one now.
    digest: that it had when something was made from it; empty for the present one."""
    try:
        manifest = read_manifest(path)
    except DatasetError:
        if not digest:
            raise
        state = CHANGED if (path / MANIFEST).is_file() else MISSING
        return LineageNode(kind="dataset", name=name, sha256=digest, state=state * is_checked)
    if digest not in ("", manifest.dataset_digest):
        return LineageNode(kind="dataset", name=name, sha256=digest, state=CHANGED * is_checked)
    totals, tokenizer = manifest.totals, manifest.tokenizer
    facts = {
        **{name: getattr(totals, name) for name in ("rows", "kept", "tokens", "loss_tokens", "left_out")},
        "kind": manifest.kind,
        "max_len": manifest.max_len,
        "languages": languages_of(path),
    }
    state = ""
    if is_checked:
        states = [_state(path / each.path, each.sha256, True) for each in Parts(path, manifest).files]
        state = _worst(states)
    sources = [_file(path, each.path, each.sha256, each.bytes, is_checked) for each in manifest.inputs]
    about = {"template": tokenizer.template_sha256, "vocabulary": tokenizer.vocab_size, **_source(path, manifest)}
    state_of = _state(path / "tokenizer" / "tokenizer.json", tokenizer.sha256, is_checked)
    sources.append(
        LineageNode(kind="tokenizer", name="tokenizer", sha256=tokenizer.sha256, facts=about, state=state_of)
    )
    sha256 = manifest.dataset_digest
    return LineageNode(
        kind="dataset", name=path.resolve().name, sha256=sha256, facts=facts, state=state, sources=sources
    )


def _file(dataset: Path, name: str, sha256: str, num_bytes: int, is_checked: bool) -> LineageNode:
    """Return a raw file, with where mm.lock beside it says that it was fetched from."""
    path = _located(name, dataset)
    entry = read_lock(path.parent).files.get(path.name)
    facts: dict[str, Any] = {"bytes": num_bytes}
    if entry and entry.sha256 == sha256:
        facts["source"] = f"{entry.repo}@{entry.commit or entry.revision}"
        if entry.repo in catalog.DATASET_REPO.values():
            facts["licence"] = catalog.LICENCE
    return LineageNode(kind="file", name=path.name, sha256=sha256, facts=facts, state=_state(path, sha256, is_checked))


def _source(dataset: Path, manifest: Manifest) -> dict[str, str]:
    """Return where the tokenizer of a dataset was fetched from, if the mm.lock beside an input has it."""
    folders = {_located(each.path, dataset).parent for each in manifest.inputs}
    entries = [entry for folder in folders for entry in read_lock(folder).files.values()]
    entry = next((entry for entry in entries if entry.sha256 == manifest.tokenizer.sha256), None)
    return {"source": f"{entry.repo}@{entry.commit or entry.revision}"} if entry else {}


def languages_of(dataset: Path) -> list[str]:
    """Return the languages that a dataset's card names, such as "zh"; none without a card."""
    with suppress(OSError):
        lines = read_bytes(dataset / CARD).decode("utf-8", "replace").partition("\nlanguage:\n")[2].splitlines()
        return [line[2:] for line in lines[: next((i for i, line in enumerate(lines) if line[:2] != "- "), 0)]]
    return []


def _checkpoints(run: Path) -> Iterator[CheckpointState]:
    for path in run.glob("checkpoints/step-*/state.json"):
        with suppress(CheckpointError):
            yield read_record(path, CheckpointState, CheckpointError, "")


def _weights_states(run: Path, state: CheckpointState) -> list[str]:
    """Return the states of the files of a checkpoint."""
    directory = run / "checkpoints" / f"step-{state.step}"
    return [_state(directory / name, record.sha256, True) for name, record in state.files.items()]


def _located(recorded: str, near: Path) -> Path:
    """Return the path that a record of `near` names, relative to where the command ran: as it is, or seen from the
    directory above that of `near`, or beside `near`; the first that exists."""
    near = near.resolve()
    places = (Path(recorded), near.parent.parent / recorded, near.parent / Path(recorded).name)
    return next((place for place in places if place.exists()), Path(recorded))


def _state(path: Path, sha256: str, is_checked: bool) -> str:
    if not is_checked:
        return ""
    if not path.is_file():
        return MISSING
    return SAME if sha256_of(path) == sha256 else CHANGED


def _worst(states: list[str]) -> str:
    return next((state for state in (CHANGED, MISSING, SAME) if state in states), "")


def lines_of(origin: LineageNode, indent: str = "", bullet: str = "") -> Iterator[str]:
    """Yield the tree as lines of text."""
    facts = origin.facts
    texts = [
        f"{facts[name]:,} {name.replace('_', ' ')}" for name in ("steps", "kept", "tokens", "bytes") if name in facts
    ]
    texts += [f"{name} {str(facts[name])[:12]}" for name in ("samples", "template") if name in facts]
    texts += [f"{key} {value}" for key, value in facts.get("settings", {}).items()]
    texts += [f"{key} {value}" for key, value in facts.get("versions", {}).items() if key in ("mm-toolkit", "torch")]
    texts += [f"from {facts['source']}"] if "source" in facts else []
    state = f"  {origin.state.upper() if origin.state in (CHANGED, MISSING) else origin.state}" if origin.state else ""
    yield f"{indent}{bullet}{origin.kind} {origin.name}  {origin.sha256[:12]}  {', '.join(texts)}{state}"
    indent += {"": "", "├─ ": "│  ", "└─ ": "   "}[bullet]
    for number, source in enumerate(origin.sources, 1):
        yield from lines_of(source, indent, "└─ " if number == len(origin.sources) else "├─ ")


def is_intact(origin: LineageNode) -> bool:
    """Whether nothing in a compared tree has changed. What is missing, such as raw files, does not count."""
    return all(node.state != CHANGED for node in origin.walk())
