"""docs/scale.md has the tables that tests/bench/scale.py computes, and what the page says of them is so."""

import importlib.util
import re
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def scale() -> Any:
    path = ROOT / "tests" / "bench" / "scale.py"
    spec = importlib.util.spec_from_file_location("scale", path)
    assert spec and spec.loader
    sys.modules["scale"] = module = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_tables_of_the_script(scale: Any) -> None:
    for name, text in scale.tables().items():
        assert f"<!-- {name} -->\n\n{text}\n" in PAGE, f"{name}: python tests/bench/scale.py model"


def test_the_page_has_the_scripts_constants(scale: Any) -> None:
    lines = "".join(line for line in PAGE.splitlines() if line.startswith("| "))
    for field in fields(scale.Measured):
        value = getattr(scale.Measured(), field.name)
        shown = {f"{value / unit:.3g}" for unit in (1, 1e3, 1e6, 1e9, 1e-3)}
        assert shown & set(re.findall(r"[\d.]*\d", lines)), field.name


def test_ten_terabytes_take_half_an_hour_only_with_fast_links(scale: Any) -> None:
    slow, fast = (scale.packing(10 * scale.TB, scale.Cluster(link=rate / 8))["all"] for rate in (25e9, 100e9))
    assert fast < 1800 < slow


def test_nothing_grows_faster_than_the_data(scale: Any) -> None:
    cluster = scale.Cluster()
    one, ten = (scale.packing(size * scale.TB, cluster, inputs=2000 * size) for size in (1, 10))
    assert all(ten[name] <= 10.001 * value for name, value in one.items())
    wide = scale.packing(10 * scale.TB, replace(cluster, cores=10_000), inputs=20_000)
    longer = {name for name, value in wide.items() if value > one[name] * 1.001 and name != "all"}
    steps = {"look at each input: size, kind of rows", "the driver: sizes of all files, manifest, stats"}
    sizes = {"parts", "manifest", "driver", "first opening", "verify"}
    assert longer == steps | sizes, (
        "ten times the data on ten times the cores: what one process does takes ten times as long"
    )


def test_chunks_are_waited_for_no_longer_than_one_sum(scale: Any) -> None:
    for cards in scale.CARDS:
        figures = scale.training(cards)
        assert 0 < figures["mm"] < figures["one sum"] < 1
