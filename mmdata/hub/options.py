"""The options of `mm fetch`, declared once: types, defaults, ranges and help texts. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmdata.options import option

if TYPE_CHECKING:
    from mmdata.hub.transfer import RetryPolicy

SOURCE, LOCAL = "Source", "Files on this machine"  # headings of --help


@dataclass(frozen=True, slots=True)
class FetchOptions:
    """How to fetch. `endpoint` None is the source's own; `retry` None is the default `RetryPolicy`."""

    out: Path = option(Path("data"), help="Directory for the files.", group=LOCAL, metavar="DIR")
    source: str = option("hf", help="Where to fetch from.", group=SOURCE, metavar="hf|modelscope|DIR|URL")
    endpoint: str | None = option(
        None, help="A mirror of the source.", group=SOURCE, metavar="URL", default_text="$HF_ENDPOINT"
    )
    revision: str | None = option(
        None,
        help="Commit, tag or branch.",
        group=SOURCE,
        metavar="NAME",
        default_text="the locked commit, else the known one",
    )
    update: bool = option(False, help="Move from the locked commit to the newest one.", group=SOURCE)
    verify: bool = option(False, help="Hash the files that are here again; without NAME, all of them.", group=LOCAL)
    force: bool = option(False, help="Replace files that were not fetched by mm.", group=LOCAL)
    connections: int = option(
        1,
        help="Connections per file; 4 is faster where each connection is slow.",
        group=SOURCE,
        metavar="N",
        least=1,
        most=32,
    )
    retry: "RetryPolicy | None" = None
