"""The chat page in a real browser: it streams, stops, remembers, and shows what a model says as text."""

import json
from typing import Any

import pytest
from serving import SayingEngine, served, small_tokenizer
from waiting import LONG_S

from mmdata.tokenizer.tokenizer import Tokenizer

pytestmark = pytest.mark.slow
HOSTILE = (
    "<img src=x onerror=\"document.title='owned'\"> **bold** and `code`\n\n```html\n<script>alert(1)</script>\n```"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def browser(chromium: Any) -> Any:
    """The browser, without what it logged before. Each test's server has a port, and so a storage, of its own."""
    chromium.get("about:blank")
    chromium.get_log("browser"), chromium.get_log("performance")
    return chromium


def find(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def texts(browser: Any, selector: str) -> list[str]:
    return [element.text for element in browser.find_elements("css selector", selector)]


def until(browser: Any, is_so: Any) -> None:
    from selenium.common.exceptions import StaleElementReferenceException as Redrawn
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, LONG_S, poll_frequency=0.05, ignored_exceptions=(Redrawn,)).until(lambda _: is_so())


def ask(browser: Any, text: str) -> None:
    find(browser, "#text").send_keys(text + "\n")


def answered(browser: Any) -> None:
    until(browser, lambda: find(browser, "#send").is_displayed() and texts(browser, ".assistant .figures"))


def check_quiet(browser: Any, address: str) -> None:
    """Nothing on the console, nothing asked of anybody else."""
    assert [entry["message"] for entry in browser.get_log("browser")] == []
    events = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert asked
    assert [url for url in asked if not url.startswith((address, "data:", "chrome:"))] == []


@pytest.mark.parametrize(("width", "height"), [(1200, 800), (390, 780)])
def test_an_answer_streams_is_shown_as_text_and_is_remembered(
    browser: Any, tokenizer: Tokenizer, width: int, height: int
) -> None:
    with served(SayingEngine(tokenizer, HOSTILE)) as address:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get(address)
        until(browser, lambda: find(browser, "#model").text == "runs-a")
        ask(browser, "<b>hello</b>")
        answered(browser)
        assert texts(browser, ".user .said") == ["<b>hello</b>"]
        assert browser.title == "mm chat" and not browser.find_elements("css selector", ".said img, .said script")
        assert texts(browser, ".assistant strong") == ["bold"]
        assert texts(browser, ".assistant p code") == ["code"]
        assert texts(browser, ".assistant pre") == ["<script>alert(1)</script>"]
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        browser.refresh()
        if width < 600:
            find(browser, "#menu").click()
        until(browser, lambda: texts(browser, "#conversations .title") == ["<b>hello</b>"])
        until(browser, lambda: find(browser, "#conversations .title").is_displayed())
        find(browser, "#conversations .title").click()
        assert len(texts(browser, ".message")) == 2
        check_quiet(browser, address)


def test_stop_ends_the_answer_here_and_on_the_server(browser: Any, tokenizer: Tokenizer) -> None:
    engine = SayingEngine(tokenizer, "word " * 10_000, pause_s=0.03, window=100_000)  # minutes, if nobody stops it
    with served(engine) as address:
        browser.get(address)
        ask(browser, "go on")
        until(browser, lambda: "word" in "".join(texts(browser, ".assistant .said")))
        find(browser, "#stop").click()
        answered(browser)
        until(browser, lambda: engine.is_idle)
        assert engine.num_cancelled == 1 and texts(browser, ".figures") == ["stopped"]
        find(browser, ".assistant .foot button:nth-of-type(2)").click()  # answer again
        until(browser, lambda: not engine.is_idle)
        until(browser, lambda: find(browser, "#stop").is_displayed())
        find(browser, "#stop").click()
        answered(browser)
        check_quiet(browser, address)


MARKDOWN = """# Towns
Two **towns**:

1. Ulm, with
   - a river
   - `a tower`
2. Bonn

| town | people |
|---|---:|
| Ulm | 126,405 |
| <b>Bonn</b> | 321,544 |

> said
- one
- two
---
end"""


def test_markdown_is_drawn_and_stays_text(browser: Any, tokenizer: Tokenizer) -> None:
    with served(SayingEngine(tokenizer, MARKDOWN)) as address:
        browser.get(address)
        ask(browser, "towns?")
        answered(browser)
        assert texts(browser, ".assistant h3") == ["Towns"]
        outline = "return [...document.querySelectorAll('.assistant .said > *')].map((e) => e.tagName).join(' ')"
        assert browser.execute_script(outline) == "H3 P OL DIV BLOCKQUOTE UL HR P"
        assert texts(browser, ".assistant ol > li > ul > li") == ["a river", "a tower"]
        assert texts(browser, ".assistant th") == ["town", "people"]
        assert texts(browser, ".assistant td") == ["Ulm", "126,405", "<b>Bonn</b>", "321,544"]
        assert "104.0M parameters" in find(browser, "#facts").get_property("textContent")
        check_quiet(browser, address)


def test_a_question_is_changed_and_the_conversation_saved(browser: Any, tokenizer: Tokenizer) -> None:
    with served(SayingEngine(tokenizer, "Yes.")) as address:
        browser.get(address)
        for text in ("first", "second"):
            ask(browser, text)
            until(browser, lambda text=text: text in texts(browser, ".user .said"))
            answered(browser)
        browser.execute_script(
            "document.querySelector('.user .foot button:last-child').click()"
        )  # hidden until hovered
        assert find(browser, "#text").get_property("value") == "first"
        assert texts(browser, ".user .said") == ["first", "second"]  # nothing is lost before the new one is sent
        ask(browser, " changed")
        until(browser, lambda: texts(browser, ".user .said") == ["first changed"])
        answered(browser)
        browser.execute_script(
            "URL.createObjectURL = (blob) => { blob.text().then((text) => { window.saved = text; }); return '#'; };"
            "document.getElementById('save').click()"
        )
        until(browser, lambda: browser.execute_script("return window.saved"))
        row = json.loads(browser.execute_script("return window.saved"))
        assert [(m["role"], m["content"]) for m in row["messages"]] == [
            ("user", "first changed"),
            ("assistant", "Yes."),
        ]


def test_prompts_of_the_models_own_kind_are_proposed(browser: Any, tokenizer: Tokenizer) -> None:
    with served(SayingEngine(tokenizer, "Yes."), prompts=("2 + 3?", HOSTILE)) as address:
        browser.get(address)
        until(browser, lambda: len(texts(browser, ".proposed button")) == 2)
        find(browser, ".proposed button").click()
        until(browser, lambda: texts(browser, ".user .said") == ["2 + 3?"])
        answered(browser)
        assert texts(browser, ".proposed button") == [] and texts(browser, ".assistant .said") == ["Yes."]
        check_quiet(browser, address)


def test_thinking_and_calls_have_places_of_their_own(browser: Any, tokenizer: Tokenizer) -> None:
    with served(SayingEngine(tokenizer, "<think>\nhm\n</think>\n\nYes.")) as address:
        browser.get(address)
        ask(browser, "is it?")
        answered(browser)
        assert texts(browser, ".assistant .said") == ["Yes."]
        find(browser, "details.thought summary").click()
        assert "hm" in find(browser, "details.thought").text


def test_settings_reach_the_server_and_stay(browser: Any, tokenizer: Tokenizer) -> None:
    from selenium.webdriver.common.keys import Keys

    engine = SayingEngine(tokenizer, "word " * 50)
    with served(engine, api_key="s3cret") as address:
        browser.get(address)
        until(browser, lambda: "API key" in find(browser, "#model").text)
        find(browser, "#tune").click()
        for name, value in (("max_tokens", "3"), ("temperature", "0"), ("api_key", "s3cret")):
            find(browser, f"[name={name}]").send_keys(Keys.CONTROL + "a" + Keys.NULL + value + "\t")
        for name, value in (("theme", "dark"), ("language", "zh")):
            find(browser, f"[name={name}] option[value={value}]").click()
        until(browser, lambda: find(browser, "#model").text == "runs-a")
        assert find(browser, "#settings-title").text == "设置"
        assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 28)"
        find(browser, "#settings [value=close]").click()
        ask(browser, "go on")
        answered(browser)
        assert texts(browser, ".figures")[0].startswith("已达最长回答长度 · 3 token")
        browser.refresh()
        assert find(browser, "#text").get_attribute("placeholder") == "输入消息"


def test_an_error_is_said_in_the_page(browser: Any, tokenizer: Tokenizer) -> None:
    engine = SayingEngine(tokenizer, "yes")
    with served(engine) as address:
        browser.get(address)
        until(browser, lambda: find(browser, "#model").text == "runs-a")
        engine.error = RuntimeError("out of memory")
        ask(browser, "hello")
        until(browser, lambda: any("out of memory" in text for text in texts(browser, ".wrong")))
        ask(browser, "hello again")
        answered(browser)
        assert texts(browser, ".assistant .said") == ["yes"]
