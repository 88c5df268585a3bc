"""Builds the report on runs from the figures of `mmtrain.log.history`: sections with tables and plots, as an HTML page,
which can also be served while a run trains. Reads no files of runs and does not import torch.

A chain is a run with the earlier runs that its weights come from, the first one first.
"""

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

from mmdata.errors import MMError, UsageError
from mmdata.options import options_of
from mmdata.stats.report import page
from mmdata.stats.report.page import (
    Block,
    Cards,
    Column,
    Fold,
    Grid,
    Heading,
    Note,
    Plot,
    Section,
    Table,
    Text,
    as_name,
    joined,
    phrase,
    verbatim,
)
from mmtrain.config import TrainSettings
from mmtrain.log.history import RunFigures

Chains = Sequence[Sequence[RunFigures]]
_Item = TypeVar("_Item")
AXES: dict[str, Text] = {"tokens": "tokens", "hours": "time", "step": "steps"}  # x axes of the plots, and their labels
MOST_MARKS = 60  # the most events of one kind that a plot marks in a run, and the most rows of a table of events
# Events that are marked on plots -> label of the mark; "" is a tick without a label.
_MARKED = {"resume": "↻", "skip": "✕", "halved": "½", "save": ""}
_TEXT, _DPO = ("pretrain", "sft"), ("dpo",)


def serve(make: Callable[[], str], port: int, *, on_start: Callable[[str], None]) -> None:
    """Serve the page that `make()` returns on `port` (0: a free one) of 127.0.0.1 until Ctrl-C, made anew for each
    request, one at a time. on_start: called with the address. Another path or host name gets status 404, an error of
    `make` 503; at the first call, before the server starts, it is raised. Raise UsageError if the port cannot be
    used."""
    one_at_a_time = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = self.headers.get("Host", "").rpartition(":")[0]
            # The domain of another site may resolve to this address (DNS rebinding).
            if self.path != "/" or host not in ("127.0.0.1", "localhost"):
                self.send_error(404)
                return
            try:
                with one_at_a_time:
                    body = make().encode()
            except (MMError, OSError) as error:
                self.send_error(503, str(error).splitlines()[0][:200].encode("ascii", "replace").decode())
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Cache-Control", "no-store")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Do not log requests: an open page sends one every other second."""

    make()
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise UsageError(
            f"port {port} of 127.0.0.1 cannot be had: {error.strerror}", "choose another, or --port 0"
        ) from error
    with server:
        on_start(f"http://127.0.0.1:{server.server_port}/")
        server.serve_forever()


def run_page(figures: RunFigures, *, lang: str = "en", refresh_s: float | None = None) -> str:
    """Return the HTML page about chains of runs, whose curves share the plots. figures: from `history.figures`. lang:
    "en" or "zh". refresh_s: seconds after which an open page requests a newer version; None for never."""
    last = [runs[-1] for runs in figures["chains"]]
    title = verbatim(", ".join(run["name"] for run in last))
    subtitle = joined(
        [joined([verbatim(run["dir"]), joined(["(", as_name(run["status"]), ")"], "")], " ") for run in last]
    )
    sections = list(sections_of(figures["chains"]))
    return page.render(title, subtitle, sections, lang, refresh_s=refresh_s, axes=AXES)


def sections_of(chains: Chains) -> Iterator[Section]:
    """Yield the sections of the report, whose tables the terminal prints too. Those on preference training, samples and
    events are left out if the runs have no data for them."""
    yield Section("glance", "At a glance", list(_glance(chains)))
    plots = _Plotter(chains)
    yield Section("curves", "Curves", [Grid(list(_curves(plots))), *_legend(chains)])
    if any(run["curves"].get("accuracy") for runs in chains for run in runs):
        yield Section("preference", "Preference", [Grid(list(_preference(plots)))])
    yield Section("speed", "Speed and memory", list(_speed(plots)))
    for id, title, make in (("samples", "What it says", _samples), ("events", "Events", _events)):
        if blocks := [block for runs in chains for block in make(runs)]:
            yield Section(id, title, blocks)
    yield Section(
        "settings", "Settings and where they come from", list(_settings([r for runs in chains for r in runs]))
    )
    yield Section("lineage", "Lineage", [block for runs in chains for block in _lineage(runs)])


# --- at a glance


def glance(run: RunFigures) -> list[tuple[Text, str, Text]]:
    """Return the most important figures of a run, as (label, value, hint): step, losses, tokens, time and more."""
    last, params = run["last"], float(f"{run['params']:.4g}")
    cards: list[tuple[Text, str, Text]] = [
        ("step", f"{run['step']:,}", phrase("of {value}", value=f"{run['num_steps']:,}"))
    ]
    if last.get("loss") is not None:
        cards.append(("loss", f"{last['loss']:.4f}", "of the last step"))
    if last.get("val_loss") is not None:
        cards.append(
            ("val loss", f"{last['val_loss']:.4f}", phrase("best {value}", value=f"{last['best_val_loss']:.4f}"))
        )
    if last.get("val_bits_per_byte") is not None:
        cards.append(("val bits per byte", f"{last['val_bits_per_byte']:.4f}", ""))
    if last.get("val_accuracy") is not None:
        cards.append(("val reward accuracy", f"{100 * last['val_accuracy']:.1f} %", ""))
    cards.append(("tokens", page.short(run["tokens"]), as_name(f"{run['tokens']:,}")))
    cards.append(("training time", page.duration(run["hours"]), ""))
    if rates := sorted(rate for rate in run["curves"].get("tokens_per_s", []) if rate):
        cards.append(("tokens a second", page.short(float(f"{rates[len(rates) // 2]:.3g}")), ""))
    cards.append(("parameters", page.short(params), as_name(run["device"])))
    if run["skipped"]:
        cards.append(("skipped steps", f"{run['skipped']:,}", ""))
    return cards


def _glance(chains: Chains) -> Iterator[Block]:
    """Yield, for each chain, its last run's main figures, a table of all its runs, and the last run's newest
    figures."""
    columns = [Column("run", "code"), Column("stage", "word"), Column("status", "word"), Column("steps", "count")]
    columns += [Column("tokens", "count"), Column("trained tokens", "count"), Column("time", "hours")]
    columns += [Column("loss", "decimal4"), Column("val loss", "decimal4"), Column("share of tokens", "bar")]
    for runs in chains:
        if len(chains) > 1:
            yield Heading(verbatim(runs[-1]["name"]))
        yield Cards(glance(runs[-1]))
        tokens = max(1, sum(run["tokens"] for run in runs))
        keys = ("name", "stage", "status", "step", "tokens", "trained_tokens", "hours")
        rows = [
            (*(run[key] for key in keys), run["last"].get("loss"), run["last"].get("val_loss"), run["tokens"] / tokens)
            for run in runs
        ]
        yield Table(columns, rows)
        if "missing" in runs[0]:
            text = "{run} goes back to {parent}, which is no longer there."
            yield Note(
                phrase(text, run=verbatim(runs[0]["name"]), parent=verbatim(runs[0]["missing"])), in_terminal=True
            )
        if newest := [(key, value) for key, value in runs[-1]["last"].items() if isinstance(value, float)]:
            yield Fold("Newest figures", [Table([Column("", "code"), Column("", "decimal4")], newest)])


# --- curves


class _Plotter:
    """Plots of curves over tokens, hours and steps. Runs of a chain follow each other; chains overlay each other."""

    def __init__(self, chains: Chains):
        self.chains = chains
        marks = (mark for number, runs in enumerate(chains) for mark in self._marks(number, runs))
        self.marks = sorted(marks, key=lambda mark: mark["x"]["step"])

    def runs(self, stages: Sequence[str] | None = None) -> list[RunFigures]:
        return [run for runs in self.chains for run in runs if not stages or run["stage"] in stages]

    def _marks(self, number: int, runs: Sequence[RunFigures]) -> Iterator[page.PlotSpec]:
        """Yield the marks of a chain on the x axis: the beginning of each run, with its stage, if there are several,
        and the runs' events. If there are several chains, the marks have the colour of their chain."""
        color = {} if len(self.chains) == 1 else {"color": number}
        if len(runs) > 1:
            for run in runs:
                yield {"x": dict(run["offset"]), "label": as_name(run["stage"]), "kind": "stage", **color}
        for run in runs:
            for what, label in _MARKED.items():
                for event in _evenly([event for event in run["events"] if event["event"] == what]):
                    x = {axis: _rounded(event[axis] + run["offset"][axis]) for axis in AXES}
                    yield {"x": x, "label": label, "kind": "event" if label else "tick", "said": phrase(what), **color}

    def lines(
        self,
        title: str,
        labels: Mapping[str, str],
        *,
        stages: Sequence[str] | None = None,
        note: str = "",
        **options: Any,
    ) -> Iterator[Plot]:
        """Yield one plot with a curve for each name in `labels` (name -> label), or nothing if no run has any of them.
        Names that begin with "val_" are figures of validations, others of steps. stages: draw only runs of these. note:
        text below the plot. options: further keys of the spec (docs/reports.md)."""
        series = []
        is_several = len(self.chains) > 1
        for number, runs in enumerate(self.chains):
            for i, (curve, label) in enumerate(labels.items()):
                points = self._joined([run for run in runs if not stages or run["stage"] in stages], curve)
                if not points:
                    continue
                # The figure of one dataset ("val_loss/NAME") has the dataset's name as label, which is not translated.
                text = verbatim(label) if "/" in curve else phrase(label)
                called = joined([verbatim(runs[-1]["name"]), text], ": ") if is_several else text
                color = number if is_several else i
                series.append({"name": called, "color": color, "dash": is_several and i % 2 == 1, **points})
        spec = {
            "kind": "lines",
            "axes": {
                axis: {"label": phrase("hours"), "hours": True}
                if axis == "hours"
                else {"label": phrase(axis if axis == "tokens" else "steps")}
                for axis in AXES
            },
            "series": series,
            "marks": self.marks,
            "group": "dpo" if stages == _DPO else "run",
            "extent": self._extent(_DPO if stages == _DPO else None),
            "logy": False,
            **options,
        }
        if series:
            yield Plot(title, spec, note)

    def held_out(self, figure: str, stages: Sequence[str] | None = None) -> dict[str, str]:
        """Return names and labels of a figure of validations, for `lines`: over all datasets and, if a run has several,
        for each."""
        names = dict.fromkeys(key for run in self.runs(stages) for values in run["vals"] for key in values)
        each = {key: key.partition("/")[2] for key in names if key.startswith(f"val_{figure}/")}
        return {f"val_{figure}": "val", **each}

    def _extent(self, stages: Sequence[str] | None) -> dict[str, list[float]]:
        """Return [lowest, highest] value of each axis over the runs, so that plots of one group have the same axes."""
        runs = self.runs(stages)
        return {
            axis: [min(run["offset"][axis] for run in runs), max(run["offset"][axis] + run[axis] for run in runs)]
            for axis in AXES
        }

    def _joined(self, runs: Sequence[RunFigures], curve: str) -> page.PlotSpec | None:
        """Return one curve over consecutive runs of a chain, None if it has no values: x values by axis, y values, and
        the band from the lowest to the highest value if the curve was averaged. A value None parts the curves of
        two runs."""
        is_val = curve.startswith("val_")
        x: dict[str, list[Any]] = {axis: [] for axis in AXES}
        y: list[Any] = []
        low: list[Any] = []
        high: list[Any] = []
        for run in runs:
            vals = [values for values in run["vals"] if curve in values]
            points = {axis: [values[axis] for values in vals] for axis in AXES} if is_val else run["curves"]
            values = [values[curve] for values in vals] if is_val else run["curves"].get(curve, [])
            known = [i for i, value in enumerate(values) if value is not None]
            gap = [None] if y and known else []
            for axis, places in x.items():
                own = [points[axis][i] + run["offset"][axis] for i in known]
                places += [*((places[-1] + own[0]) / 2 for _ in gap), *own]
            for all_values, name in ((y, curve), (low, f"{curve}_low"), (high, f"{curve}_high")):
                own = values if is_val else run["curves"].get(name, values)
                all_values += [*gap, *(own[i] for i in known)]
        if not any(value is not None for value in y):
            return None
        band = {"low": low, "high": high} if low != y else {}
        return {"x": x, "y": y, "points": len(y) < 60 and is_val, **band}


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.6g}")


def _curves(plots: _Plotter) -> Iterator[Plot]:
    stages = _TEXT if plots.runs(_TEXT) else None
    note = "The line is the mean of a stretch of steps, the band its lowest and highest."
    yield from plots.lines("Loss", {"loss": "train", **plots.held_out("loss")}, stages=stages, note=note, tall=True)
    yield from plots.lines("Bits per byte of held-out text", plots.held_out("bits_per_byte"), stages=stages, tall=True)
    yield from plots.lines("Learning rate", {"lr": "learning rate"}, floor=0)
    yield from plots.lines("Gradient norm", {"grad_norm": "gradient norm"}, logy=True)


def _legend(chains: Chains) -> Iterator[Note]:
    """Yield a note that explains the marks on the plots; only marks that occur are explained."""
    occurring = {event["event"] for runs in chains for run in runs for event in run["events"]}
    texts: list[Text] = [
        joined([label, what], " ") if label else "ticks at the foot: saves"
        for what, label in _MARKED.items()
        if what in occurring
    ]
    if texts:
        yield Note(joined(texts))


def _preference(plots: _Plotter) -> Iterator[Plot]:
    note = "How far the log-probabilities have moved from the reference: both falling is forgetting."
    accuracy = {"accuracy": "train", **plots.held_out("accuracy", _DPO)}
    margin, drift = (
        {"reward_margin": "train", "val_reward_margin": "val"},
        {"chosen_drift": "chosen", "rejected_drift": "rejected"},
    )
    yield from plots.lines("Preference loss", {"loss": "train", **plots.held_out("loss", _DPO)}, stages=_DPO)
    yield from plots.lines("Reward accuracy", accuracy, stages=_DPO, share=True)
    yield from plots.lines("Margin", margin, stages=_DPO)
    yield from plots.lines("Drift", drift, stages=_DPO, note=note)


def _speed(plots: _Plotter) -> Iterator[Block]:
    rates = {"tokens_per_s": "tokens", "trained_per_s": "trained tokens"}
    use = {"mfu": "of the measured rate", "mfu_peak": "of the datasheet's", "mfu_attention": "attention counted"}
    yield Grid(
        [
            *plots.lines("Tokens a second", rates, floor=0),
            *plots.lines("Positions a second, if rows were padded", {"padded_per_s": "positions, padded"}, floor=0),
            *plots.lines("Use of the hardware (MFU)", use, share=True, floor=0),
            *plots.lines("GFLOP a second", {"gflops": "GFLOP/s"}, floor=0),
            *plots.lines("Most memory so far, GB", {"memory_gb": "memory"}, floor=0),
        ]
    )
    yield Note(
        "Padded: the positions a second that rows padded to their bucket would need for the same tokens; nothing is padded "
        "here. Work is counted as 6 operations a weight and token (attention's products left out), MFU against the rate of "
        "a matrix product measured when the run began and, for cards whose datasheet is known, its rate, without attention "
        "and with its products counted for all pairs of tokens of a sequence."
    )


# --- samples, events, settings, lineage


def _samples(runs: Sequence[RunFigures]) -> Iterator[Block]:
    """Yield, for each run, tables of the generated texts by prompt, the newest last, collapsed except for the last run."""
    for run in runs:
        by_prompt: dict[str, list[RunFigures]] = {}
        for sample in run["samples"]:
            by_prompt.setdefault(sample["prompt"], []).append(sample)
        tables = Grid(
            [
                Table(
                    [Column("step", "count"), Column(verbatim(prompt), "code")],
                    [(s["step"], one_line(s["text"])) for s in _some(samples)],
                )
                for prompt, samples in by_prompt.items()
            ]
        )
        title = joined([verbatim(run["name"]), as_name(run["stage"])])
        if tables.blocks:
            yield from [Heading(title), tables] if run is runs[-1] else [Fold(title, [tables], in_terminal=False)]


def one_line(text: str) -> str:
    """Return a text as one line: a line end is shown as ⏎, several in a row with their number; an empty text as ∅."""
    return re.sub(r"\n+", lambda run: "⏎" if len(run[0]) == 1 else f"⏎×{len(run[0])} ", text).strip() or "∅"


def _some(samples: Sequence[Any], number: int = 8) -> list[Any]:
    """Return at most `number` (2 or more) samples, with the first and the last, chosen more densely at the beginning."""
    if len(samples) <= number:
        return list(samples)
    places = {round((len(samples) - 1) * (i / (number - 1)) ** 1.6) for i in range(number)}
    return [samples[i] for i in sorted(places)]


def _events(runs: Sequence[RunFigures]) -> Iterator[Block]:
    """Yield a table of the events other than saves, collapsed above 12 rows, and a collapsed table of the saves. Of more
    than MOST_MARKS events a table has an even selection, and its title says how many there are."""
    columns = [Column("run", "code"), Column("step", "count"), Column(""), Column("event", "word"), Column("note")]
    events = [(run, event) for run in runs for event in run["events"]]
    for is_save, title in ((False, "{number} events"), (True, "{number} saves")):
        chosen = [(run, event) for run, event in events if (event["event"] == "save") == is_save]
        rows = [
            (run["name"], event["step"], _MARKED.get(event["event"], "") or "·", event["event"], event["note"])
            for run, event in _evenly(chosen)
        ]
        if rows and not is_save and len(rows) <= 12:
            yield Table(columns, rows)
        elif rows:
            label = phrase(title, number=len(chosen))
            if len(rows) < len(chosen):
                label = phrase("{label}, {number} of them shown", label=label, number=len(rows))
            yield Fold(label, [Table(columns, rows)], in_terminal=not is_save)


def _evenly(items: list[_Item]) -> list[_Item]:
    """Return at most MOST_MARKS items in their order: an even selection that has the last one."""
    step = -(-len(items) // MOST_MARKS) or 1
    return items[(len(items) - 1) % step :: step]


def _settings(runs: Sequence[RunFigures]) -> Iterator[Block]:
    """Yield tables of all settings that a run has a value for, with a column for each run, the value and its origin:
    first of those that differ from their default in a run, then, collapsed, of the others. Empty values, and settings
    that a run's stage does not accept, have none."""
    stages = {name: known.stages for name, known in options_of(TrainSettings)}
    columns = [
        {
            key: (_setting(setting["value"]), setting["from"])
            for key, setting in run["settings"].items()
            if setting["value"] not in (None, "") and run["stage"] in (stages.get(key) or [run["stage"]])
        }
        for run in runs
    ]
    keys = dict.fromkeys(key for column in columns for key in column)
    changed = {key for column in columns for key, (_, origin) in column.items() if origin != "default"}

    def table(keys: Sequence[str]) -> Table:
        rows = [(key, *([column.get(key, ("–", ""))] for column in columns)) for key in keys]
        return Table([Column("", "code"), *(Column(verbatim(run["name"]), "noted") for run in runs)], rows)

    yield table([key for key in keys if key in changed])
    if rest := [key for key in keys if key not in changed]:
        yield Fold(phrase("{number} settings at their defaults", number=len(rest)), [table(rest)])


def _setting(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _lineage(runs: Sequence[RunFigures]) -> Iterator[Block]:
    """Yield a table of each run's start weights and data, then the last run's configuration and software versions."""
    columns = [Column("run", "code"), Column("stage", "word"), Column("from", "code"), Column("weights", "code")]
    rows = []
    for run in runs:
        source = run["init"] or {}
        ranks = f" × {run['world_size']}" if run["world_size"] > 1 else ""
        rows.append(
            (
                run["name"],
                run["stage"],
                verbatim(source["dir"]) if source.get("dir") else phrase("new weights"),
                str(source.get("weights_sha256", ""))[:12],
                [(data["dir"], str(data.get("digest", ""))[:12]) for data in run["data"]],
                f"{run['device']}, {run['precision']}{ranks}",
            )
        )
    yield Table([*columns, Column("data", "noted"), Column("device")], rows)
    if untaught := [run["name"] for run in runs if run["stage"] in ("sft", "dpo") and not run["init"]]:
        text = "{runs} began with new weights, not with those of a finished stage before: good for a trial only"
        yield Note(phrase(text, runs=", ".join(untaught)), in_terminal=True)
    yield Note(
        as_name(
            ", ".join(
                f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}"
                for key, value in runs[-1]["model"].items()
            )
        )
    )
    yield Note(as_name(", ".join(f"{key} {value}" for key, value in runs[-1]["versions"].items())))
