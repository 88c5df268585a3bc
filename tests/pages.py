"""What the tests of HTML pages share: strings that must stay text, the elements of a page, and its large figures."""

import re
from html import unescape
from html.parser import HTMLParser

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "<img src=x onerror=alert(1)>",
    "\u2028\u2029&amp;<b>",
    "\u202eright to left\u202c \u05d0\u05d1 \u0627",
    "e\u0301\u0302" * 20,
    "\"'`${x}",
]


class Elements(HTMLParser):
    """Tags, attributes, and the text of each script."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._in_script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
            self._in_script = True

    def handle_endtag(self, tag: str) -> None:
        self._in_script = self._in_script and tag != "script"

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data


def parsed(html: str) -> Elements:
    elements = Elements()
    elements.feed(html)
    return elements


def cards(html: str) -> dict[str, str]:
    """Label -> value of the page's large figures."""
    found = re.findall(r'class="label"[^>]*>(.*?)</div><div class="value">(.*?)</div>', html)
    return {unescape(label): unescape(value) for label, value in found}
