"""The card of a packed dataset: README.md in Hugging Face's form."""

from importlib import resources
from pathlib import Path

from mmdata.shards.manifest import read_manifest
from mmdata.stats.tally import Figures

CODES = {"Chinese": "zh", "English": "en", "code": "code"}
LEAST_SHARE = 0.05  # of the rows, for a language to be named


def dataset_card(directory: Path, figures: Figures) -> str:
    """Return the card of a packed dataset. figures: those that its report shows."""
    import jinja2

    text = resources.files("mmdata.stats.report").joinpath("templates/dataset_card.md").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    counts = figures["languages"]
    languages = [CODES[name] for name in CODES if counts.get(name, 0) >= LEAST_SHARE * max(1, sum(counts.values()))]
    return environment.from_string(text).render(
        f=figures, name=directory.resolve().name, languages=languages, files=read_manifest(directory).inputs
    )
