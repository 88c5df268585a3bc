"""Tables of counts and plots of lengths, as the reports on data and their comparison show them."""

from collections.abc import Mapping, Sequence

from mmdata.stats.report import page
from mmdata.stats.report.page import Column, Plot, Table, as_name
from mmdata.stats.tally import Figures


def shares(title: str, counts: Mapping[str, int], *, unit: str = "rows", total: int = 0, caption: str = "") -> Table:
    """Return a table of counts with their shares, as numbers and as bars. title, unit: headings of keys and counts.
    total: what the shares are of; 0: the sum of the counts. caption: the table's title."""
    total = max(1, total or sum(counts.values()))
    columns = [Column(title, "word"), Column(unit, "count"), Column("share", "share"), Column("", "bar")]
    return Table(columns, [(key, count, count / total, count / total) for key, count in counts.items()], caption)


def strings(items: Sequence[Figures], unit: str, title: str = "", first: str = "", *, bar: bool = False) -> Table:
    """Return a table of [{"text", "count"}], not empty, the most frequent first. unit, first: headings of counts and
    strings. bar: whether to draw the counts as bars, too."""
    columns = [Column(first, "code"), Column(unit, "count"), *([Column("", "bar")] if bar else [])]
    rows = [(item["text"], item["count"], item["count"] / items[0]["count"])[: len(columns)] for item in items]
    return Table(columns, rows, title, wrap=True)


def histogram(title: str, lengths: Figures, unit: str, *, marks: Sequence[float] = ()) -> Plot:
    """Return a plot of `tally.length_figures`. unit: what is counted. marks: lengths with a vertical line."""
    return Plot(
        title, page.bars(lengths["edges"], [(unit, lengths["counts"])], marks=marks, unit=unit, x=_unit_of(title))
    )


def _unit_of(title: str) -> str:
    return title.partition(" ")[0].rstrip(":").lower()  # every title of lengths begins with what they are counted in


def overlaid(
    title: str, series: Mapping[str, Figures] | Sequence[tuple[page.Text, Figures]], *, marks: Sequence[float] = ()
) -> Plot:
    """Return a plot of several histograms (`tally.length_figures` by name; empty ones are omitted) over all their
    edges, each in shares of its own count. marks: lengths at which vertical lines are drawn."""
    pairs = [(as_name(key), each) for key, each in series.items()] if isinstance(series, Mapping) else list(series)
    pairs = [(label, each) for label, each in pairs if each]
    edges = sorted({edge for _, each in pairs for edge in each["edges"]})
    drawn = []
    for label, each in pairs:
        share = dict.fromkeys(edges, 0.0)
        for edge, count in zip(each["edges"], each["counts"], strict=False):
            share[edge] += count / max(1, each["count"])
        drawn.append((label, [share[edge] for edge in edges[:-1]]))
    return Plot(title, page.bars(edges, drawn, marks=marks, x=_unit_of(title), is_share=True))


def share_plot(title: str, counts: Sequence[int], unit: str, *, num_ticks: int) -> Plot:
    """Return a histogram of shares. counts: of items in each of len(counts) equal bins from 0 to 100 %. unit: what is
    counted. num_ticks: steps between labels of the x axis."""
    edges = [i / len(counts) for i in range(len(counts) + 1)]
    ticks = [(i / num_ticks, f"{100 * i // num_ticks} %") for i in range(num_ticks + 1)]
    return Plot(title, page.bars(edges, [(unit, counts)], ticks=ticks, unit=unit, x="share"), in_terminal=True)
