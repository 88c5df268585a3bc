"""What an unfinished pack left behind: does it belong to what is asked for now, and which of its parts are whole?

A part counts as done when its record is there and its files hash to what the record says (about 1 GB/s a thread).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mmdata.io.files import sha256_of
from mmdata.io.workers import Tick
from mmdata.pack.part import Part, PartPacker, PartResult, Settings
from mmdata.pack.staging import Staging
from mmdata.shards import checksums

# These decide whether a dataset is published, not what its parts hold.
FREE_ARGUMENTS = ("max_bad", "max_bad_by_reason")
PACKAGES = ("mm-toolkit", "tokenizers", "pyarrow", "jinja2")  # other versions may write other tokens or bytes


class RecordingPacker:
    """Packs parts as PartPacker does, and records each when its files are on disk."""

    def __init__(self, settings: Settings, out: Path):
        self._pack = PartPacker(settings)
        self._staging = Staging(out)

    def __call__(self, part: Part, tick: Tick) -> PartResult:
        result = self._pack(part, tick)
        self._staging.record(part.number, {field.name: getattr(result, field.name) for field in fields(result)})
        return result


def key_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """All that the bytes of the parts depend on, from the beginning of a manifest."""
    arguments = {name: value for name, value in manifest["arguments"].items() if name not in FREE_ARGUMENTS}
    near = ("rensa",) if arguments.get("dedup") == "near" else ()
    versions = {name: version(name) for name in (*PACKAGES, *near)}
    return {**manifest, "arguments": arguments, "versions": versions}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two keys, in words; empty when the one can go on with what the other began."""
    found = []
    for name in ("kind", "max_len"):
        if before.get(name) != now[name]:
            found.append(f"{name.replace('_', '-')} was {before.get(name)}, now {now[name]}")
    if before.get("tokenizer") != now["tokenizer"]:
        found.append("the tokenizer is another one")
    found += _input_differences(before.get("inputs", []), now["inputs"])
    for label, name in (("--", "arguments"), ("version of ", "versions")):
        old, new = before.get(name, {}), now[name]
        for key in [*new, *(key for key in old if key not in new)]:
            if old.get(key) != new.get(key):
                shown = f"--{key.replace('_', '-')}" if label == "--" else f"{label}{key}"
                found.append(f"{shown} was {old.get(key)}, now {new.get(key)}")
    if not found and before != now:
        found.append("it was begun by another version of mm")
    return found


def _input_differences(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[str]:
    names_before, names_now = [entry["path"] for entry in before], [entry["path"] for entry in now]
    if names_before != names_now:
        return [f"the inputs were {', '.join(names_before)}, now {', '.join(names_now)}"]
    return [
        f"{new['path']} has changed ({old['bytes']:,} bytes then, {new['bytes']:,} now)"
        for old, new in zip(before, now, strict=True)
        if old != new
    ]


def finished_parts(staging: Staging, numbers: Sequence[int] | None = None) -> dict[int, PartResult]:
    """The results of the parts (all, or those numbered) that are done; a record whose files are not whole is taken back."""
    found = {}
    for number, record in staging.records().items():
        if numbers is None or number in numbers:
            result = result_from(record)
            if _is_whole(staging.dataset, result):
                found[number] = result
            else:
                staging.forget(number)
    return found


def _is_whole(directory: Path, result: PartResult) -> bool:
    entries = [*result.shards, *result.files]

    def is_whole(entry: Mapping[str, Any]) -> bool:
        path = directory / entry["path"]
        return path.is_file() and path.stat().st_size == entry["bytes"] and sha256_of(path) == entry["sha256"]

    with ThreadPoolExecutor(checksums.MAX_THREADS) as pool:
        return all(pool.map(is_whole, entries))


def result_from(record: Mapping[str, Any]) -> PartResult:
    """A PartResult from its record: JSON knows neither Counter nor keys that are numbers."""
    values = dict(record)
    for field in fields(PartResult):
        if field.default_factory is Counter:
            values[field.name] = Counter(values[field.name])
    values["lengths"] = Counter({int(length): count for length, count in record["lengths"].items()})
    return PartResult(**values)
