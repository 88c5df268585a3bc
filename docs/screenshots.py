"""Makes docs/images/*.png: `python docs/screenshots.py [DIR]`. Needs the dev extra, Chromium and its driver.

Everything shown is made here, in DIR (kept; a temporary directory unless given): the demo's corpus, packed, and a short pretrain,
sft and dpo run on it, and in DIR/lessons the runs of docs/learn/5-pretraining.md; two minutes on two cores. docs/serve.png is
made where DIR/demo is a finished `mm demo`.
"""

import base64
import json
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
sys.path.insert(0, str(ROOT))


def mm(work: Path, *words: str) -> None:
    """Run a command of mm in the working directory."""
    print("mm", *words, flush=True)
    subprocess.run(
        [sys.executable, "-m", "cli", *words],
        cwd=work,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        check=True,
    )


def make(work: Path) -> None:
    """The demo's corpus with some flaws, packed; three short runs."""
    from mmdata.demo import corpus as demo
    from mmdata.tokenizer.tokenizer import CHATML, train_bpe

    corpus = demo.write_corpus(work / "data", seed=3, minutes=0.4)
    tokenizer = work / "data" / "tokenizer"
    train_bpe(
        corpus.tokenizer_texts,
        vocab_size=demo.VOCAB_SIZE,
        control_tokens=demo.CONTROL_TOKENS,
        chat_template=CHATML,
        out_dir=tokenizer,
    )
    draw = random.Random(0)
    for name in ("sft_512", "dpo"):  # flaws, so that the page has something to say
        path = corpus.files[name]
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        lines += [draw.choice(lines) for _ in range(len(lines) // 12)] + ["{broken\n", '{"conversations": []}\n']
        path.write_text("".join(lines), encoding="utf-8")
    for name in ("pretrain_hq", "sft_512", "dpo"):
        mm(work, "pack", str(corpus.files[name].relative_to(work)), "--max-len", "512", "--val-fraction", "0.03")
    short = ("--quiet", "--batch-tokens", "512", "--seed", "1")
    mm(
        work,
        "train",
        "pretrain",
        "--model",
        "demo",
        "--steps",
        "240",
        "--val-every",
        "20",
        "--save-every",
        "120",
        "--lr",
        "6e-3",
        *short,
    )
    mm(work, "train", "sft", "--steps", "160", "--val-every", "16", "--save-every", "80", "--lr", "6e-3", *short)
    mm(work, "train", "dpo", "--steps", "40", "--val-every", "8", "--lr", "2e-4", *short)
    mm(work, "stats", "shards/sft_512", "--html", "sft-en.html")
    mm(work, "stats", "shards/dpo", "--html", "dpo-zh.html", "--lang", "zh")
    mm(work, "report", "runs/dpo-1", "--html", "run-en.html")
    mm(work, "report", "runs/dpo-1", "--html", "run-zh.html", "--lang", "zh")


def make_lessons(work: Path) -> None:
    """The runs of docs/learn/5-pretraining.md, by its own commands, on the demo's whole corpus."""
    page = (ROOT / "docs" / "learn" / "5-pretraining.md").read_text(encoding="utf-8")
    commands = [shlex.split(line)[1:] for line in page.splitlines() if line.startswith("mm ")]
    work.mkdir(exist_ok=True)
    mm(work, "demo", "--corpus", "data")
    mm(work, "pack", "data/pretrain_hq.jsonl", "--max-len", "512", "--val-fraction", "0.01")
    rows = (work / "data" / "pretrain_hq.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (work / "few.jsonl").write_text("".join(rows[:200]), encoding="utf-8")
    for words in commands:
        if "--out" in words or "--html" in words or words[0] == "pack":
            mm(work, *words)


def open_browser() -> Any:
    """Headless Chromium."""
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = shutil.which("chromium") or sys.exit(
        "no chromium: apt-get install chromium chromium-driver"
    )
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    return webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))


def shoot(driver: Any, page: Path, image: str, *, width: int, height: int, theme: str = "light", at: str = "") -> None:
    """A picture of a page's part: from the element `at` (or the top) on, `height` pixels."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    )
    driver.get(f"file://{page}")
    top = driver.execute_script(
        "const e = document.querySelector(arguments[0]); return e ? e.getBoundingClientRect().top + scrollY - 14 : 0",
        at or "x-none",
    )
    clip = {"x": 0, "y": top, "width": width, "height": height, "scale": 1}
    found = driver.execute_cdp_cmd(
        "Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True, "clip": clip}
    )
    (IMAGES / image).write_bytes(base64.b64decode(found["data"]))
    print(image, (IMAGES / image).stat().st_size // 1000, "kB")


def shoot_chat(driver: Any, run: Path) -> None:
    """A picture of the chat page, with three questions answered."""
    from selenium.webdriver.support.ui import WebDriverWait

    command = [sys.executable, "-m", "cli", "serve", str(run), "--name", "demo", "--port", "8765"]
    server = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None and any("chat at" in line for line in server.stderr)
        size = {"width": 1100, "height": 720, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        light = {"features": [{"name": "prefers-color-scheme", "value": "light"}]}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", light)
        driver.get("http://127.0.0.1:8765/")
        driver.execute_script("localStorage.setItem('mm.settings', JSON.stringify({temperature: 0, language: 'en'}))")
        driver.refresh()
        for number, question in enumerate(("Hello!", "What is 17 + 5?", "17 加 5 等于多少？"), 1):
            driver.find_element("css selector", "#text").send_keys(question + "\n")
            answered = f"return document.querySelectorAll('.assistant .figures').length == {number}"
            WebDriverWait(driver, 60).until(lambda driver, answered=answered: driver.execute_script(answered))
        found = driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
        (ROOT / "docs" / "serve.png").write_bytes(base64.b64decode(found["data"]))
    finally:
        server.terminate()


def main() -> None:
    """Make the data, the runs and the pages where they are missing, then take the pictures."""
    work = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "run-zh.html").exists():
        make(work)
    if not (work / "lessons" / "few.html").exists():
        make_lessons(work / "lessons")
    IMAGES.mkdir(exist_ok=True)
    driver = open_browser()
    try:
        shoot(driver, work / "sft-en.html", "data-glance.png", width=1100, height=1150)
        shoot(driver, work / "sft-en.html", "data-lengths.png", width=1100, height=1000, theme="dark", at="#lengths")
        shoot(driver, work / "dpo-zh.html", "data-phone-zh.png", width=390, height=1500)
        shoot(driver, work / "run-en.html", "run-glance.png", width=1100, height=1350)
        shoot(driver, work / "run-zh.html", "run-phone-zh.png", width=390, height=1500, theme="dark")
        for page, image in (("rates.html", "learn-rates.png"), ("few.html", "learn-overfit.png")):
            shoot(driver, work / "lessons" / page, image, width=860, height=340, at="#curves figure")
        if (work / "demo" / "runs" / "dpo").exists():
            shoot_chat(driver, work / "demo" / "runs" / "dpo")
    finally:
        driver.quit()
    print(json.dumps({"images": sum(p.stat().st_size for p in IMAGES.iterdir())}))


if __name__ == "__main__":
    main()
