"""The options of `mm fetch`: types, defaults, ranges and help texts. Imports nothing heavy, so `mm --help` is fast."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmdata.options import option

if TYPE_CHECKING:
    from mmdata.hub.transfer import RetryPolicy

FILES, SOURCE, LOCAL = "What to fetch", "Source", "Files on this machine"  # headings of --help


@dataclass(frozen=True, slots=True)
class FetchOptions:
    """Options of `mm fetch`. `endpoint` None: the usual web address of `source`. `retry` None: `RetryPolicy()`."""

    preset: str | None = option(
        None, "Fetch a set of files with their tokenizer: begin, zero, full, seed or zero-seed.", FILES, metavar="NAME"
    )
    file: tuple[str, ...] = option(
        (),
        "With OWNER/DATASET: a file or glob of that repository; may be repeated.",
        FILES,
        metavar="PATH",
        default_text="all data files",
    )
    everything: bool = option(False, "Fetch every file of the dataset's repository.", FILES, flag="--all")
    tokenizer: str | None = option(
        None,
        "Fetch the tokenizer minimind-3, minimind-2 or minimind-2-seed to tokenizer/ in --out.",
        FILES,
        metavar="NAME",
    )
    out: Path = option(Path("data"), "Directory for the files.", LOCAL, metavar="DIR")
    source: str = option(
        "hf",
        "Where to fetch from: Hugging Face, ModelScope, a directory, or a web address.",
        SOURCE,
        metavar="hf|modelscope|DIR|URL",
    )
    endpoint: str | None = option(
        None, "Address of a mirror of Hugging Face or ModelScope.", SOURCE, metavar="URL", default_text="$HF_ENDPOINT"
    )
    revision: str | None = option(
        None,
        "Commit, tag or branch to fetch.",
        SOURCE,
        metavar="NAME",
        default_text="the commit in mm.lock, else the one in mm's list of known files",
    )
    update: bool = option(False, "Fetch the newest commit instead of the one recorded in mm.lock.", SOURCE)
    verify: bool = option(False, "Hash files again that were fetched before; without NAME, all of them.", LOCAL)
    force: bool = option(False, "Replace files of the same name that mm did not fetch.", LOCAL)
    connections: int = option(
        1,
        "Number of connections per file; 4 is faster where a single connection is slow.",
        SOURCE,
        metavar="N",
        least=1,
        most=32,
    )
    retry: "RetryPolicy | None" = None
