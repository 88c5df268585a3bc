"""The wheel and the sdist: the same files in both, and a program that runs outside the checkout."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import cli

ROOT = Path(cli.__file__).parent
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def test_the_version_stands_in_one_place_and_in_the_changelog() -> None:
    sources = [ROOT / "cli.py", *(path for top in ("mmdata", "mmtrain") for path in (ROOT / top).rglob("*.py"))]
    assert not [path for path in sources if f'"{VERSION}"' in path.read_text(encoding="utf-8")]
    assert f"## {VERSION}\n" in (ROOT / "docs/CHANGELOG.md").read_text(encoding="utf-8")


def built(source: Path, what: str, out: Path) -> Path:
    command = [sys.executable, "-c", BUILD, f"build_{what}", str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_the_wheel_runs_outside_the_checkout(home: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    out = tmp_path_factory.mktemp("built")
    source = out / "source"
    for name in ("pyproject.toml", "README.md", "LICENSE", "cli.py", "mmdata", "mmtrain"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(ROOT / name, source / name)
    for cache in source.rglob("__pycache__"):
        shutil.rmtree(cache)
    files = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    sdist = built(source, "sdist", out)
    with tarfile.open(sdist) as archive:
        archive.extractall(out / "unpacked", filter="data")
    wheel = built(out / "unpacked" / sdist.name.removesuffix(".tar.gz"), "wheel", out)
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == files - {"pyproject.toml", "README.md", "LICENSE"}

    target = out / "installed"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*install, str(wheel)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(target)}

    def mm(*words: str) -> str:
        command = [sys.executable, str(target / "bin" / "mm"), *words]
        done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert mm("--version") == f"mm {VERSION}\n"
    mm("pack", "data/sft_512.jsonl", "--max-len", "128")
    assert "<html" in (home / "shards/sft_512/report.html").read_text(encoding="utf-8")
    assert json.loads(mm("run", "minimind3", "--dry-run", "--only", "export", "--json"))[0]["state"] == "to do"
    figures = json.loads(mm("demo", "--minutes", "0.01", "--json"))
    assert [stage["stage"] for stage in figures["stages"]] == ["pretrain_hq", "sft_512", "sft_1024", "dpo"]
    mm("export", "demo/runs/dpo", "--format", "gguf", "--out", "exported")
    assert "demo" not in (home / "exported/README.md").read_text(encoding="utf-8").partition("# dpo")[0]
