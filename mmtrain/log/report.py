"""Figures of runs in, one HTML file out, or served while a run trains. Reads no run itself; never torch."""

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from mmdata.errors import MMError, UsageError
from mmdata.stats.report import page
from mmdata.stats.report.page import Bar, Html, Section, Words
from mmtrain.log.words import ZH

_MARKED = {"resume": "↻", "skip": "✕", "halved": "½", "save": ""}  # events that a plot marks; a save by a tick alone
MOST_MARKS = 60  # of a kind of event in a run; of more, some stand for all


def write(path: Path, html: str) -> None:
    """Write a page beside its place and rename it."""
    beside = path.with_name(f".{path.name}.writing")
    beside.write_text(html, encoding="utf-8")
    beside.replace(path)


def serve(make: Callable[[], str], port: int, *, on_start: Callable[[str], None]) -> None:
    """Answer on 127.0.0.1 with the page that `make` gives, made anew for each question, one at a time; until Ctrl-C.

    on_start is told the address. UsageError when the port is taken. Only this machine is answered, and only by its name.
    """

    one_at_a_time = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = self.headers.get("Host", "").rpartition(":")[0]
            if self.path != "/" or host not in ("127.0.0.1", "localhost"):  # a foreign name may lead here too
                self.send_error(404)
                return
            try:
                with one_at_a_time:
                    body = make().encode()
            except (MMError, OSError) as error:
                self.send_error(503, str(error).splitlines()[0][:200].encode("ascii", "replace").decode())
                return
            self.send_response(200)
            for name, value in (("Content-Type", "text/html; charset=utf-8"), ("Cache-Control", "no-store")):
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Not on the terminal: a page asks every other second."""

    make()  # what cannot be shown is said before anything is served
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise UsageError(
            f"port {port} of 127.0.0.1 cannot be had: {error.strerror}", "choose another, or --port 0"
        ) from error
    with server:
        on_start(f"http://127.0.0.1:{server.server_port}/")
        server.serve_forever()


# --- the page


def run_page(figures: Mapping[str, Any], *, lang: str = "en", refresh_s: float | None = None) -> str:
    """The report of one chain of runs, or of several laid over each other."""
    words = Words(lang, ZH)
    chains = figures["chains"]
    last = [runs[-1] for runs in chains]
    title = ", ".join(run["name"] for run in last)
    subtitle = " · ".join(f"{run['dir']} ({words.or_same(run['status'])})" for run in last)
    sections = [
        Section("glance", words("At a glance"), list(_glance(chains, words))),
        Section("curves", words("Curves"), [page.grid(_curves(chains, words)), _key(chains, words)]),
    ]
    if any(run["curves"].get("accuracy") for runs in chains for run in runs):
        sections.append(Section("preference", words("Preference"), [page.grid(_preference(chains, words))]))
    sections.append(Section("speed", words("Speed and memory"), list(_speed(chains, words))))
    said = [block for runs in chains for block in _said(runs, words)]
    if said:
        sections.append(Section("samples", words("What it says"), said))
    events = [block for runs in chains for block in _event_table(runs, words)]
    if events:
        sections.append(Section("events", words("Events"), events))
    sections.append(Section("settings", words("Settings and where they come from"), [_settings(chains, words)]))
    sections.append(Section("lineage", words("Lineage"), list(_lineage(chains, words))))
    return page.page(title, subtitle, sections, words, refresh_s=refresh_s, controls=_axis_control(words))


def _axis_control(words: Words) -> Html:
    names = (("tokens", "tokens"), ("hours", "time"), ("step", "steps"))
    options = page.join(Html(f'<option value="{value}">{page.text(words(name))}</option>') for value, name in names)
    return Html(
        f'<div class="page-controls"><label>{page.text(words("over"))} <select id="axis">{options}</select></label></div>'
    )


def _axes(words: Words) -> dict[str, Any]:
    return {
        "tokens": {"label": words("tokens")},
        "hours": {"label": words("hours"), "hours": True},
        "step": {"label": words("steps")},
    }


# --- at a glance


def glance(run: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """A run's figures that stand first, as (label, value, hint); the terminal shows the same ones."""
    last = run["last"]
    found = [("step", f"{run['step']:,}", f"of {run['num_steps']:,}")]
    if last.get("loss") is not None:
        found.append(("loss", f"{last['loss']:.4f}", ""))
    if last.get("val_loss") is not None:
        found.append(("val loss", f"{last['val_loss']:.4f}", f"best {last['best_val_loss']:.4f}"))
    if last.get("val_bits_per_byte") is not None:
        found.append(("val bits per byte", f"{last['val_bits_per_byte']:.4f}", ""))
    if last.get("val_accuracy") is not None:
        found.append(("val accuracy", f"{100 * last['val_accuracy']:.1f} %", ""))
    found.append(("tokens", page.short(run["tokens"]), f"{run['tokens']:,}"))
    found.append(("training time", hours(run["hours"]), ""))
    rates = [rate for rate in run["curves"].get("tokens_per_s", []) if rate]
    if rates:
        found.append(("tokens a second", page.short(float(f"{sorted(rates)[len(rates) // 2]:.3g}")), ""))
    found.append(("parameters", page.short(float(f"{run['params']:.4g}")), run["device"]))
    if run["skipped"]:
        found.append(("skipped steps", f"{run['skipped']:,}", ""))
    return found


def hours(value: float) -> str:
    """Hours as people say them."""
    if value * 3600 < 10:
        return f"{value * 3600:.1f} s"
    seconds = round(value * 3600)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} m {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} m"


def _glance(chains: Sequence[Sequence[Mapping[str, Any]]], words: Words) -> Iterator[Html]:
    for runs in chains:
        run = runs[-1]
        if len(chains) > 1:
            yield Html(f"<h3>{page.text(run['name'])}</h3>")
        yield page.cards((words(label), value, _hint(hint, words)) for label, value, hint in glance(run))
        if len(runs) > 1 or len(chains) > 1:
            tokens = max(1, sum(one["tokens"] for one in runs))
            rows = [
                (
                    page.code(one["name"]),
                    words.or_same(one["stage"]),
                    one["step"],
                    one["tokens"],
                    one["trained_tokens"],
                    hours(one["hours"]),
                    _number(one["last"].get("loss")),
                    _number(one["last"].get("val_loss")),
                    Bar(one["tokens"] / tokens),
                )
                for one in runs
            ]
            columns = (
                "run",
                "stage",
                "steps",
                "tokens",
                "trained tokens",
                "time",
                "loss",
                "val loss",
                "share of tokens",
            )
            yield page.table([words(name) for name in columns], rows)
        if "missing" in runs[0]:
            yield page.paragraph(
                words(
                    "{run} goes back to {parent}, which is no longer there.",
                    run=runs[0]["name"],
                    parent=runs[0]["missing"],
                ),
                kind="note",
            )


def _hint(hint: str, words: Words) -> str:
    for begin in ("of ", "best "):
        if hint.startswith(begin):
            return words(begin + "{value}", value=hint.removeprefix(begin))
    return hint


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


# --- curves


class _Plotter:
    """Makes specs of curves over tokens, hours and steps, of chains laid over each other and joined from stage to stage."""

    def __init__(self, chains: Sequence[Sequence[Mapping[str, Any]]], words: Words):
        self.chains, self.words = chains, words
        self.marks = sorted(
            (m for number, runs in enumerate(chains) for m in self._marks(number, runs)), key=lambda m: m["x"]["step"]
        )

    def _marks(self, number: int, runs: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """Where runs begin, named, and what happened in them; of several chains in each one's colour."""
        color = {} if len(self.chains) == 1 else {"color": number}
        if len(runs) > 1:
            for run in runs:
                yield {"x": dict(run["offset"]), "label": self.words.or_same(run["stage"]), "kind": "stage", **color}
        for run in runs:
            for what, label in _MARKED.items():
                for event in _evenly([event for event in run["events"] if event["event"] == what]):
                    x = {axis: _rounded(event[axis] + run["offset"][axis]) for axis in ("step", "tokens", "hours")}
                    yield {
                        "x": x,
                        "label": label,
                        "kind": "event" if label else "tick",
                        "said": self.words(what),
                        **color,
                    }

    def lines(
        self,
        title: str,
        names: Mapping[str, str],
        *,
        stages: Sequence[str] | None = None,
        logy: bool = False,
        note: str = "",
        **more: Any,
    ) -> Html:
        """A plot of curves by name -> label ("val_…" of validations); of these stages only, where given."""
        series = []
        for number, runs in enumerate(self.chains):
            for i, (name, label) in enumerate(names.items()):
                found = self._joined([run for run in runs if not stages or run["stage"] in stages], name)
                if not found:
                    continue
                several = len(self.chains) > 1
                said = label if "/" in name else self.words(label)  # of one dataset: its own name
                called = f"{runs[-1]['name']}: {said}" if several else said
                color = number if several else i
                series.append({"name": called, "color": color, "dash": several and i % 2 == 1, **found})
        spec = {
            "kind": "lines",
            "axes": _axes(self.words),
            "series": series,
            "marks": self.marks,
            "group": "dpo" if stages == _DPO else "run",
            "extent": self._extent(_DPO if stages == _DPO else None),
            "logy": logy,
            **more,
        }
        return page.plot(self.words(title), spec, note=self.words(note) if note else "") if series else Html()

    def held_out(self, figure: str, stages: Sequence[str] | None = None) -> dict[str, str]:
        """A held-out figure by name -> label, in all and for each dataset of a run that has several."""
        runs = [run for found in self.chains for run in found if not stages or run["stage"] in stages]
        names = dict.fromkeys(name for run in runs for v in run["vals"] for name in v)
        each = {name: name.partition("/")[2] for name in names if name.startswith(f"val_{figure}/")}
        return {f"val_{figure}": "val", **each}

    def _extent(self, stages: Sequence[str] | None) -> dict[str, list[float]]:
        """Where each axis begins and ends, so that plots of one group stand below each other."""
        runs = [run for found in self.chains for run in found if not stages or run["stage"] in stages]
        ends = {axis: [run["offset"][axis] + run[axis] for run in runs] for axis in ("step", "tokens", "hours")}
        return {axis: [min(run["offset"][axis] for run in runs), max(found)] for axis, found in ends.items()}

    def _joined(self, runs: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any] | None:
        """One curve over the runs of a chain."""
        x: dict[str, list[Any]] = {axis: [] for axis in ("step", "tokens", "hours")}
        y: list[Any] = []
        low: list[Any] = []
        high: list[Any] = []
        for run in runs:
            is_val = name.startswith("val_")
            points = {key: [v[key] for v in run["vals"] if name in v] for key in x} if is_val else run["curves"]
            values = [v[name] for v in run["vals"] if name in v] if is_val else run["curves"].get(name, [])
            for axis, places in x.items():
                places += [place + run["offset"][axis] for place in points.get(axis, [])[: len(values)]]
            y += values
            low += run["curves"].get(f"{name}_low", values)
            high += run["curves"].get(f"{name}_high", values)
        if not any(value is not None for value in y):
            return None
        found: dict[str, Any] = {"x": x, "y": y, "points": len(y) < 60 and name.startswith("val_")}
        return found | ({"low": low, "high": high} if low != y else {})


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.6g}")


def _evenly(found: Sequence[Any]) -> Sequence[Any]:
    """At most MOST_MARKS of them, equally far apart, the last one among them."""
    step = -(-len(found) // MOST_MARKS) or 1
    return found[(len(found) - 1) % step :: step]


_TEXT, _DPO = ("pretrain", "sft"), ("dpo",)


def _curves(chains: Sequence[Sequence[Mapping[str, Any]]], words: Words) -> Iterator[Html]:
    plots = _Plotter(chains, words)
    stages = _TEXT if any(run["stage"] in _TEXT for runs in chains for run in runs) else None
    note = "The line is the mean of a stretch of steps, the band its lowest and highest."
    yield plots.lines("Loss", {"loss": "train", **plots.held_out("loss")}, stages=stages, note=note, tall=True)
    yield plots.lines("Bits per byte of held-out text", plots.held_out("bits_per_byte"), stages=stages, tall=True)
    yield plots.lines("Learning rate", {"lr": "learning rate"}, floor=0)
    yield plots.lines("Gradient norm", {"grad_norm": "gradient norm"}, logy=True)


def _key(chains: Sequence[Sequence[Mapping[str, Any]]], words: Words) -> Html:
    """What the marks on the plots mean, of those that are there."""
    there = {event["event"] for runs in chains for run in runs for event in run["events"]}
    said = [
        f"{label} {words(what)}" if label else words("ticks at the foot: saves")
        for what, label in _MARKED.items()
        if what in there
    ]
    return page.paragraph(" · ".join(said), kind="note") if said else Html()


def _preference(chains: Sequence[Sequence[Mapping[str, Any]]], words: Words) -> Iterator[Html]:
    plots = _Plotter(chains, words)
    yield plots.lines("Preference loss", {"loss": "train", **plots.held_out("loss", _DPO)}, stages=_DPO)
    right = {"accuracy": "train", **plots.held_out("accuracy", _DPO)}
    yield plots.lines("Pairs ranked right", right, stages=_DPO, share=True)
    yield plots.lines("Margin", {"reward_margin": "train", "val_reward_margin": "val"}, stages=_DPO)
    note = "How far the log-probabilities have moved from the reference: both falling is forgetting."
    yield plots.lines("Drift", {"chosen_drift": "chosen", "rejected_drift": "rejected"}, stages=_DPO, note=note)


def _speed(chains: Sequence[Sequence[Mapping[str, Any]]], words: Words) -> Iterator[Html]:
    plots = _Plotter(chains, words)
    rates = {"tokens_per_s": "tokens", "trained_per_s": "trained tokens", "padded_per_s": "positions, padded"}
    yield page.grid(
        [
            plots.lines("Tokens a second", rates, floor=0),
            plots.lines("Use of the hardware (MFU)", {"mfu": "MFU"}, share=True, floor=0),
            plots.lines("GFLOP a second", {"gflops": "GFLOP/s"}, floor=0),
            plots.lines("Most memory so far, GB", {"memory_gb": "memory"}, floor=0),
        ]
    )
    yield page.paragraph(
        words(
            "Padded: the positions a second that rows padded to their bucket would need for the same tokens; nothing is padded here. Work is counted as 6 operations a weight and token (attention's products left out), MFU against the rate of a matrix product measured when the run began."
        ),
        kind="note",
    )


# --- words, events, settings, lineage


def _said(runs: Sequence[Mapping[str, Any]], words: Words) -> Iterator[Html]:
    """What the model said to each prompt as it learned, the newest last; of the runs before the last one folded."""
    for run in runs:
        by_prompt: dict[str, list[Mapping[str, Any]]] = {}
        for sample in run["samples"]:
            by_prompt.setdefault(sample["prompt"], []).append(sample)
        tables = []
        for prompt, found in by_prompt.items():
            rows = [(f"{one['step']:,}", page.code(_line(one["text"]))) for one in _some(found)]
            tables.append(page.table([words("step"), Html(f"<bdi>{page.text(prompt)}</bdi>")], rows))
        if tables:
            title = f"{run['name']} · {words.or_same(run['stage'])}"
            yield Html(f"<h3><bdi>{page.text(title)}</bdi></h3>") if run is runs[-1] else Html()
            yield page.grid(tables) if run is runs[-1] else page.fold(title, page.grid(tables))


def _line(said: str) -> str:
    """What was said as a line: ends of lines to be seen, many in a row as one with their number."""
    return re.sub(r"\n+", lambda run: "⏎" if len(run[0]) == 1 else f"⏎×{len(run[0])} ", said).strip() or "∅"


def _some(found: Sequence[Any], number: int = 8) -> list[Any]:
    """At most `number`, the first and the last among them, closer together at the beginning."""
    if len(found) <= number:
        return list(found)
    places = {round((len(found) - 1) * (i / (number - 1)) ** 1.6) for i in range(number)}
    return [found[i] for i in sorted(places)]


def _event_table(runs: Sequence[Mapping[str, Any]], words: Words) -> Iterator[Html]:
    rows = [
        (
            page.code(run["name"]),
            f"{event['step']:,}",
            _MARKED.get(event["event"], "") or "·",
            words.or_same(event["event"]),
            event["note"],
        )
        for run in runs
        for event in run["events"]
    ]
    if not rows:
        return
    shown = page.table([words(name) if name else "" for name in ("run", "step", "", "event", "note")], rows)
    yield shown if len(rows) <= 12 else page.fold(words("{number} events", number=len(rows)), shown)


def _settings(chains: Sequence[Sequence[Mapping[str, Any]]], words: Words) -> Html:
    runs = [run for found in chains for run in found]
    given = ((name, one) for run in runs for name, one in run["settings"].items())
    names = dict.fromkeys(name for name, one in given if one["value"] is not None)
    rows = []
    for name in names:
        cells = []
        for run in runs:
            one = run["settings"].get(name)
            value = "–" if one is None or one["value"] is None else _setting(one["value"])
            origin = words.or_same(one["from"]) if one and one["value"] is not None else ""
            cells.append(Html(f'{page.text(value)} <span class="note">{page.text(origin)}</span>'))
        rows.append((Html(f"<code>{page.text(name)}</code>"), *cells))
    return page.table(["", *(Html(f"<bdi>{page.text(run['name'])}</bdi>") for run in runs)], rows)


def _setting(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _lineage(chains: Sequence[Sequence[Mapping[str, Any]]], words: Words) -> Iterator[Html]:
    for runs in chains:
        rows = []
        for run in runs:
            data = page.join(
                Html(f"{page.code(one['dir'])} <span class=note>{page.text(str(one.get('digest', ''))[:12])}</span> ")
                for one in run["data"]
            )
            source = run["init"] or {}
            begin = source.get("dir") or words("new weights")
            rows.append(
                (
                    page.code(run["name"]),
                    words.or_same(run["stage"]),
                    page.code(str(begin)),
                    Html(f"<code>{page.text(str(source.get('weights_sha256', ''))[:12])}</code>"),
                    data,
                    f"{run['device']}, {run['precision']}"
                    + (f" × {run['world_size']}" if run["world_size"] > 1 else ""),
                )
            )
        columns = ("run", "stage", "from", "weights", "data", "device")
        yield page.table([words(name) for name in columns], rows)
        model = ", ".join(
            f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}"
            for name, value in runs[-1]["model"].items()
        )
        versions = ", ".join(f"{name} {value}" for name, value in runs[-1]["versions"].items())
        yield page.paragraph(Html(f"<bdi>{page.text(model)}</bdi>"), kind="note")
        yield page.paragraph(Html(f"<bdi>{page.text(versions)}</bdi>"), kind="note")
