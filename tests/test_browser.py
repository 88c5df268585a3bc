"""Both reports in headless Chromium: phone and desktop, English and Chinese, light and dark. Skipped where there is none."""

import json
import threading
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pack_data import write_rows
from pages import HOSTILE
from train_runs import make_run, resumption
from waiting import LONG_S, wait_until

from mmdata.pack.options import PackOptions
from mmdata.pack.pipeline import pack
from mmdata.stats import stats
from mmdata.stats.report import compare, data, page
from mmtrain.log import history, report

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # selenium's own warnings
WIDTHS = {"phone": 360, "desktop": 1280}


@pytest.fixture
def driver(chromium: Any) -> Any:
    return chromium


def until(driver: Any, is_so: Callable[[], object]) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, LONG_S, poll_frequency=0.05).until(lambda _: is_so())


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """Every kind of report in both languages, from rows and runs that hold hostile text too."""
    root = tmp_path_factory.mktemp("pages")
    made = {}
    for kind in ("conversation", "pair"):
        path = write_rows(root / f"{kind}.jsonl", kind, 300)
        if kind == "conversation":
            with path.open("a") as file:
                for text in [*HOSTILE, "long " * 220_000]:
                    row = {"conversations": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]}
                    file.write(json.dumps(row) + "\n")
                file.write("not json </script><script>alert(1)</script>\n")
        pack([path], root / f"packed-{kind}", PackOptions(tokenizer=tokenizer_dir, max_len=640, val_fraction=0.1))
        made[kind] = stats.measure_dataset(root / f"packed-{kind}")
    of_file = stats.measure_file(root / "conversation.jsonl", tokenizer_dir)
    make_run(root / "pretrain-1", 60, stage="pretrain", matmul_flops=1e7, fill=0.9)
    make_run(
        root / "sft-1",
        900,
        init=str(root / "pretrain-1/checkpoints/step-60"),
        matmul_flops=1e7,
        fill=0.9,
        resumed=[resumption(step) for step in (400, 401, 402, 700)],
    )
    events = [{"step": step, "event": "save"} for step in range(10, 900, 10)] + [{"step": 500, "event": "halved"}]
    (root / "sft-1/events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    pairs = {"accuracy": 0.5, "reward_margin": 0.1, "chosen_drift": 0.2, "rejected_drift": -0.1}
    records = make_run(root / "dpo-1", 40, stage="dpo", init=str(root / "sft-1/checkpoints/step-900"), fill=0.5)
    lines = [
        json.dumps({**record, **{name: value * record["step"] / 40 for name, value in pairs.items()}})
        for record in records
    ]
    (root / "dpo-1/metrics.jsonl").write_text("\n".join(lines) + "\n")
    for step in (10, 20, 30):
        history.append(root / "dpo-1" / "samples.jsonl", [history.Sample(step, text, text) for text in HOSTILE])
    chain, both = history.figures([root / "dpo-1"]), history.figures([root / "pretrain-1", root / "sft-1"])
    assert len(both["chains"]) == 1
    make_run(root / "other-1", 300, stage="sft", fill=0.8)
    overlay = history.figures([root / "sft-1", root / "other-1"])
    for lang in ("en", "zh"):
        for kind, measured in made.items():
            (root / f"{kind}-{lang}.html").write_text(data.dataset_page([measured], lang=lang))
        several = [made["conversation"], of_file]
        (root / f"several-{lang}.html").write_text(
            data.dataset_page(several, lang=lang, others=stats.contained(several))
        )
        (root / f"compare-{lang}.html").write_text(compare.compare_page(*several, lang=lang))
        (root / f"run-{lang}.html").write_text(report.run_page(chain, lang=lang))
        (root / f"overlay-{lang}.html").write_text(report.run_page(overlay, lang=lang))
    return root


def open_page(driver: Any, url: str, *, width: str = "desktop", theme: str = "light") -> None:
    size = {"width": WIDTHS[width], "height": 800, "deviceScaleFactor": 1, "mobile": width == "phone"}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    )
    driver.get_log("browser"), driver.get_log("performance")  # what came before
    driver.get(url)
    until(driver, lambda: driver.execute_script("return document.documentElement.dataset.ready") == "yes")


def nothing_is_wrong(driver: Any, begin: str = "file://") -> None:
    """No console message, and no request but for the page itself."""
    assert driver.get_log("browser") == []
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            url = message["params"]["request"]["url"]
            assert url.startswith((begin, "data:", "chrome:", "about:")), url


HAVE_CANVAS = """
return [...document.querySelectorAll("figure.plot")].every((figure) => !figure.offsetParent || figure.querySelector("canvas"));
"""
DRAWN = """
return [...document.querySelectorAll("figure.plot")].filter((figure) => figure.offsetParent).map((figure) => {
  const canvas = figure.querySelector("canvas");
  if (!canvas) return figure.dataset.drawn || "nothing";
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  const colours = new Set();
  for (let i = 0; i < data.length; i += 4) if (data[i + 3] > 128) colours.add(`${data[i] >> 5},${data[i + 1] >> 5},${data[i + 2] >> 5}`);
  return colours.size > 2 && canvas.clientWidth <= figure.clientWidth ? "drawn" : `bare: ${colours.size} colours, ${canvas.clientWidth}`;
});
"""


BETWEEN = """
const canvas = document.querySelector("figure.plot canvas"), { width, height } = canvas;
const data = canvas.getContext("2d").getImageData(0, Math.round(height * 0.35), width, Math.round(height * 0.2)).data;
let blue = 0;
for (let i = 0; i < data.length; i += 4) blue += data[i + 3] > 50 && data[i + 2] > data[i] + 60;
return blue;
"""


@pytest.mark.parametrize("gap", [[None], []])
def test_a_curve_is_parted_by_a_gap_narrower_than_a_pixel(driver: Any, tmp_path: Path, gap: list[None]) -> None:
    middle = [1_000_001 for _ in gap]
    series = {"name": "a", "x": {"step": [0, 10**6, *middle, 1_000_002, 2 * 10**6]}, "y": [1, 1, *gap, 9, 9]}
    spec = {"kind": "lines", "axes": {"step": {"label": "steps"}}, "series": [series]}
    path = tmp_path / "page.html"
    path.write_text(page.render("a", "", [page.Section("a", "", [page.Plot("a", spec)])], "en"))
    open_page(driver, f"file://{path}")
    assert bool(driver.execute_script(BETWEEN)) == (not gap)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("name", ["conversation", "pair", "several", "compare", "run", "overlay"])
def test_every_plot_is_drawn_and_nothing_overflows(
    driver: Any, pages: Path, name: str, lang: str, width: str, theme: str
) -> None:
    open_page(driver, f"file://{pages}/{name}-{lang}.html", width=width, theme=theme)
    drawn = driver.execute_script(DRAWN)
    assert (len(drawn) >= 4 or name == "several") and set(drawn) <= {"drawn"}, drawn
    assert driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    dark = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(int(x) for x in dark[4:-1].split(",")) < 200) == (theme == "dark")
    assert driver.execute_script("return document.documentElement.lang") == {"en": "en", "zh": "zh-CN"}[lang]
    assert driver.execute_script("return window.alerted === undefined && document.images.length") == 0
    nothing_is_wrong(driver)


def click(driver: Any, selector: str, number: int = 0) -> None:
    driver.execute_script("document.querySelectorAll(arguments[0])[arguments[1]].click()", selector, number)


def choose(driver: Any, selector: str, value: str) -> None:
    script = (
        "const c = document.querySelector(arguments[0]); c.value = arguments[1];"
        "for (const kind of ['input', 'change']) c.dispatchEvent(new Event(kind));"  # as a browser does
    )
    driver.execute_script(script, selector, value)


def text(driver: Any, selector: str) -> str:
    return driver.execute_script("return document.querySelector(arguments[0]).textContent", selector)


def test_the_sample_browser_can_be_used(driver: Any, pages: Path) -> None:
    open_page(driver, f"file://{pages}/conversation-en.html", width="phone")
    first = text(driver, ".sample")
    assert text(driver, ".place").startswith("1 / ")
    click(driver, ".browser .on")
    assert text(driver, ".place").startswith("2 / ") and text(driver, ".sample") != first
    click(driver, ".browser .back")
    assert text(driver, ".sample") == first
    choose(driver, ".why", "shortest")
    assert text(driver, ".place") == "1 / 6" and "shortest" in text(driver, ".about")
    assert driver.execute_script("return document.querySelectorAll('.sample .t').length > 0")
    title = driver.execute_script("return document.querySelector('.sample .t').title")
    assert "trained" in title and title.split()[0].isdigit()
    click(driver, ".edges")
    assert driver.execute_script("return document.querySelector('.sample').classList.contains('edges-on')")
    number = driver.execute_script("return JSON.parse(document.querySelector('.browser script').textContent).length")
    choose(driver, ".why", "")
    for _ in range(number):
        click(driver, ".browser .on")
    assert text(driver, ".place").startswith("1 / ")
    nothing_is_wrong(driver)


FILTER = """
const input = [...document.querySelectorAll("#rows thead input")].find((each) => each.getAttribute("aria-label") === arguments[0]);
input.value = arguments[1];
input.dispatchEvent(new Event("input"));
return input.getAttribute("aria-invalid");
"""
COLUMN = """
const at = [...document.querySelectorAll("#rows thead tr:first-child th")].findIndex((each) => each.textContent === arguments[0]);
return [...document.querySelectorAll("#rows tbody tr")].map((row) => row.cells[at].textContent);
"""


def test_rows_are_sorted_filtered_and_searched(driver: Any, pages: Path) -> None:
    open_page(driver, f"file://{pages}/conversation-en.html")
    heads = driver.execute_script(
        "return [...document.querySelectorAll('#rows th.sorts')].map((each) => each.textContent)"
    )
    number = int(text(driver, "#rows .place").split("/ ")[1])
    click(driver, "#rows th.sorts", heads.index("characters"))
    most = [int(each.replace(",", "")) for each in driver.execute_script(COLUMN, "characters")]
    assert len(most) == 50 and most == sorted(most, reverse=True)
    assert driver.execute_script(FILTER, "characters", "20-90") == "false"
    shown = [int(each) for each in driver.execute_script(COLUMN, "characters")]
    assert shown == sorted(shown, reverse=True) and all(20 <= each <= 90 for each in shown)
    assert text(driver, "#rows .choice bdi") == '--where "characters between 20 and 90"'
    assert driver.execute_script(FILTER, "characters", "many") == "true"
    assert text(driver, "#rows .place").endswith(f"/ {number}")
    driver.execute_script(FILTER, "characters", "")
    driver.execute_script(FILTER, "text", "<img src=x")
    assert driver.execute_script(COLUMN, "text") == ["<img src=x onerror=alert(1)> <img src=x onerror=alert(1)>"]
    click(driver, "#rows .pick input", 0)
    assert "line" not in driver.execute_script("return document.querySelector('#rows thead').textContent")
    saved = "const a = []; URL.createObjectURL = (blob) => { a.push(blob); return '#'; }; document.querySelector(arguments[0]).click();"
    saved += "a[0].text().then(arguments[1])"
    lines = driver.execute_async_script(saved, "#rows .tools button:last-child").splitlines()
    assert len(lines) == 2 and "characters" in lines[0] and "onerror=alert(1)>" in lines[1]
    lines = driver.execute_async_script(saved, "#cuts .tools button:last-child").splitlines()
    assert [line.split(",")[0] for line in lines] == ["length limit", "512", "640"]
    click(driver, "#cuts th.sorts")
    first = driver.execute_script("return document.querySelector('#cuts tbody tr').cells[0].textContent")
    assert first == "640"
    driver.execute_script(
        "const find = document.querySelector('.browser .find'); find.value = '<IMG src'; find.oninput()"
    )
    assert text(driver, ".browser .place") in ("1 / 1", "0")
    nothing_is_wrong(driver)


def test_theme_legend_and_folds_can_be_used(driver: Any, pages: Path) -> None:
    open_page(driver, f"file://{pages}/several-en.html")
    colours = set()
    for _ in range(3):
        click(driver, "#theme")
        colours.add(driver.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert len(colours) == 2
    driver.execute_script("document.querySelectorAll('details').forEach((node) => { node.open = true; })")
    until(driver, lambda: driver.execute_script(HAVE_CANVAS))
    driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    drawn = driver.execute_script(DRAWN)
    assert len(drawn) > 10 and set(drawn) == {"drawn"}
    driver.execute_script("document.querySelector('.legend button[aria-pressed]').click()")
    assert driver.execute_script("return document.querySelectorAll('.legend button[aria-pressed=false]').length") == 1
    nothing_is_wrong(driver)


def drag(driver: Any, number: int) -> None:
    """Drag over the middle of a plot."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    over = driver.find_elements(By.CSS_SELECTOR, "figure.plot .u-over")[number]
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", over)
    ActionChains(driver).move_to_element_with_offset(over, -60, 0).click_and_hold().move_by_offset(
        120, 0
    ).release().perform()


def test_curves_zoom_together_and_change_their_axis(driver: Any, pages: Path) -> None:
    open_page(driver, f"file://{pages}/run-en.html")
    limits = (
        "return [...document.querySelectorAll('figure.plot')].map((f) => [f.plot.scales.x.min, f.plot.scales.x.max])"
    )
    before = driver.execute_script(limits)
    drag(driver, 0)
    after = driver.execute_script(limits)
    assert before[0][0] < after[0][0] < after[0][1] < before[0][1] and after[1] == after[0]
    assert driver.execute_script("return document.querySelectorAll('.zoomed:not([hidden])').length") >= 2
    click(driver, ".zoomed:not([hidden])")
    assert driver.execute_script(limits) == before
    for axis in ("hours", "step", "tokens"):
        choose(driver, "#axis", axis)
        assert set(driver.execute_script(DRAWN)) == {"drawn"}
    assert driver.execute_script(limits) == before
    driver.execute_script(
        "const o = document.querySelector('figure.plot .u-over'); const b = o.getBoundingClientRect();"
        "o.dispatchEvent(new MouseEvent('mousemove', {clientX: b.x + b.width / 2, clientY: b.y + 20, bubbles: true}))"
    )
    until(driver, lambda: driver.execute_script("return document.querySelector('.tip').textContent.includes('tokens')"))
    nothing_is_wrong(driver)


def test_curves_are_smoothed_and_drawn_on_a_logarithmic_scale(driver: Any, pages: Path) -> None:
    open_page(driver, f"file://{pages}/run-en.html")
    values = (
        "return [...document.querySelector('figure.plot').plot.data[1]].filter((y) => y !== null && y !== undefined)"
    )
    scale = "return document.querySelector('figure.plot').plot.scales.y.distr"
    before = driver.execute_script(values)
    assert driver.execute_script(scale) == 1
    driver.execute_script(
        "const s = document.getElementById('smooth'); s.value = 0.5; s.dispatchEvent(new Event('input'));"
        "const l = document.getElementById('log'); l.checked = true; l.dispatchEvent(new Event('input'));"
    )
    after = driver.execute_script(values)
    assert driver.execute_script(scale) == 1  # these runs have losses below 0
    logarithmic = (
        "return [...document.querySelectorAll('figure.plot')].filter((f) => f.plot.scales.y.distr === 3).length"
    )
    assert driver.execute_script(logarithmic) > 2 and set(driver.execute_script(DRAWN)) == {"drawn"}
    average, weight = 0.0, 0.0
    for number in range(4):  # before a stage ends
        average, weight = 0.5 * average + 0.5 * before[number], 0.5 * weight + 0.5
        assert after[number] == pytest.approx(average / weight)
    nothing_is_wrong(driver)


MARKED = """
const figure = document.querySelector("figure.plot"), plot = figure.plot, context = plot.ctx, box = plot.bbox;
const said = [], real = context.fillText;
let ticks = 0, from = 0;
context.fillText = (label, ...more) => { said.push(label); real.call(context, label, ...more); };
const move = context.moveTo, to = context.lineTo;
context.moveTo = (x, y) => { from = y; move.call(context, x, y); };
context.lineTo = (x, y) => {
  if (y === box.top + box.height && y - from < 12) ticks += 1;
  to.call(context, x, y);
};
plot.redraw();
return new Promise((done) => setTimeout(() => done({said, ticks}), 200));
"""


def test_events_are_drawn_and_stay_legible_when_there_are_many(driver: Any, pages: Path) -> None:
    open_page(driver, f"file://{pages}/run-en.html", width="phone")
    found = driver.execute_script(MARKED)
    assert {"pretrain", "sft", "½", "↻"} <= set(found["said"])
    assert 1 <= found["said"].count("↻") <= 2  # of three that lie beside each other one is named
    assert 20 <= found["ticks"] <= 60
    key = "return [...document.querySelectorAll('#curves .note')].some((node) => node.textContent.includes('ticks at the foot'))"
    assert driver.execute_script(key)
    nothing_is_wrong(driver)


def test_a_print_is_light_and_whole(driver: Any, pages: Path) -> None:
    for name in ("conversation-zh", "run-en"):
        open_page(driver, f"file://{pages}/{name}.html", theme="dark")
        driver.execute_script("window.dispatchEvent(new Event('beforeprint'))")
        assert driver.execute_script("return document.documentElement.dataset.theme") == "light"
        assert not [state for state in driver.execute_script(DRAWN) if state.startswith(("bare: 1 ", "nothing"))]
        found = driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
        assert len(found["data"]) > 50_000
        driver.execute_script("window.dispatchEvent(new Event('afterprint'))")
        assert driver.execute_script("return document.documentElement.dataset.theme || 'auto'") == "auto"
        nothing_is_wrong(driver)


def test_between_two_stages_no_curve_has_a_line(driver: Any, tmp_path: Path) -> None:
    """Train and val loss stand at other places of x. Where one of them is parted, all places up to its next value are."""
    make_run(tmp_path / "base", 60, stage="pretrain")
    make_run(tmp_path / "next", 60, stage="sft", init=str(tmp_path / "base"))
    page = tmp_path / "run.html"
    page.write_text(report.run_page(history.figures([tmp_path / "next"])))
    open_page(driver, page.as_uri())
    _, *curves = driver.execute_script(
        "const {data} = document.querySelector('figure.plot').plot;"
        "return data.map((all) => [...all].map((value) => (value === undefined ? 'none' : value)))"
    )
    parted = [[value for value in curve if value != "none"] for curve in curves]
    assert sum(None in values for values in parted) >= 2
    for curve in curves:
        known = [i for i, value in enumerate(curve) if value not in (None, "none")]
        for before, after in pairwise(known):
            assert len(set(curve[before + 1 : after])) <= 1  # all of them None (parted) or all "none" (joined)
    nothing_is_wrong(driver)


def test_following_a_run_redraws_it_in_place(driver: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "run", 20)
    servers: list[ThreadingHTTPServer] = []

    class Kept(ThreadingHTTPServer):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            servers.append(self)

    monkeypatch.setattr(report, "ThreadingHTTPServer", Kept)
    urls: list[str] = []
    asked: list[int] = []

    def make() -> str:
        asked.append(1)
        return report.run_page(history.figures([tmp_path / "run"]), refresh_s=0.2)

    thread = threading.Thread(target=lambda: report.serve(make, 0, on_start=urls.append))
    thread.start()
    try:
        wait_until(lambda: urls)
        open_page(driver, urls[0])
        choose(driver, "#axis", "step")
        before = len(asked)
        wait_until(lambda: len(asked) > before + 1)  # the page has seen itself unchanged
        with (tmp_path / "run/metrics.jsonl").open("a") as file:
            for step in range(21, 41):
                file.write(json.dumps({"step": step, "loss": 1.0, "tokens": 10, "tokens_per_s": 5.0}) + "\n")
        until(driver, lambda: text(driver, ".card .value") == "40")
        assert driver.execute_script("return document.querySelector('figure.plot').plot.scales.x.max") == 40
        assert driver.execute_script("return document.getElementById('axis').value") == "step"
        assert set(driver.execute_script(DRAWN)) == {"drawn"}
        nothing_is_wrong(driver, urls[0])
    finally:
        driver.get("about:blank")
        servers[0].shutdown()
        thread.join()
