"""`mm doctor`: check the machine that mm runs on, with a line of advice for each problem."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata

import typer

from mmdata.commands.fetch import ENDPOINT_VARIABLES
from mmdata.commands.options import HOME, Json
from mmdata.commands.terminal import print_json, result, say, size, table, waiting

LEAST_DISK_BYTES, LEAST_MEMORY_BYTES = 10_000_000_000, 4_000_000_000
PYTHONS = ((3, 11), (3, 13))  # the oldest and newest that mm is tested with
TIMEOUT_S = 5


@dataclass(frozen=True)
class MachineFact:
    """What was found of one thing. advice: what to do about it; empty if nothing is wrong."""

    name: str
    value: str
    advice: str = ""


def doctor(as_json: Json = False) -> None:
    """Check Python, torch, accelerator and driver, disk, memory, the download endpoint and optional packages. Exit code 1
    if something needs mending.

    Example: mm doctor
    """
    findings = [found for check in (python, accelerator, driver, space, endpoint, extras) for found in check()]
    problems = [found for found in findings if found.advice]
    if as_json:
        print_json(findings)
    else:
        table("", ("", "", ""), [(found.name, "!" if found.advice else "", found.value) for found in findings])
        for found in problems:
            result(f"{found.name}: {found.advice}")
        say("nothing needs mending" if not problems else f"{len(problems)} of {len(findings)} need mending")
    raise typer.Exit(bool(problems))


def python() -> Iterator[MachineFact]:
    """Yield the versions of mm, Python and torch."""
    yield MachineFact("mm", metadata.version("mm-toolkit"))
    oldest, newest = ("{}.{}".format(*each) for each in PYTHONS)
    is_known = PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]
    advice = "" if is_known else f"mm is tested with Python {oldest} to {newest}"
    yield MachineFact("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}", advice)


def accelerator() -> Iterator[MachineFact]:
    """Yield the version of torch and the device that `mm train` would take."""
    try:
        import torch
    except ImportError as error:
        yield MachineFact("torch", f"cannot be imported: {error}", "pip install torch")
        return
    yield MachineFact("torch", torch.__version__)
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            kind = "bf16" if has_bf16 else "no bf16, so fp16"
            text = f"{torch.cuda.get_device_name(number)}, {size(free)} of {size(total)} free, CUDA {torch.version.cuda}, {kind}"
            yield MachineFact(f"GPU {number}", text)
        compiler = shutil.which("cc") or shutil.which("gcc")
        yield MachineFact(
            "C compiler", compiler or "none", "" if compiler else "install gcc: torch.compile is faster by it"
        )
    elif torch.backends.mps.is_available():
        yield MachineFact("GPU", "Apple, by MPS")
    elif shutil.which("nvidia-smi"):
        advice = "install a torch for CUDA, or update the driver: nvidia-smi shows its CUDA version"
        yield MachineFact("GPU", f"there is one that torch {torch.__version__} does not see", advice)
    else:
        yield MachineFact("GPU", f"none: training on {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads")


def driver() -> Iterator[MachineFact]:
    """Yield the version of NVIDIA's driver; nothing where it is not installed."""
    if program := shutil.which("nvidia-smi"):
        command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        version = ""
        with suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
            version = done.stdout.partition("\n")[0].strip() if done.returncode == 0 else ""
        advice = "" if version else "nvidia-smi fails: restart the machine, or install the driver again"
        yield MachineFact("driver", version or "does not answer", advice)


def space() -> Iterator[MachineFact]:
    """Yield free disk space and memory."""
    import psutil

    disk, memory = shutil.disk_usage(HOME), psutil.virtual_memory()
    small = disk.free < LEAST_DISK_BYTES
    advice = "free some, or work on another disk: MM_HOME=DIR, or --out" if small else ""
    yield MachineFact("disk", f"{size(disk.free)} of {size(disk.total)} free in {HOME.resolve()}", advice)
    advice = "close other programs, or train a smaller --model" if memory.available < LEAST_MEMORY_BYTES else ""
    yield MachineFact("memory", f"{size(memory.available)} of {size(memory.total)} free", advice)


def endpoint() -> Iterator[MachineFact]:
    """Yield whether the address that `mm fetch` downloads from answers."""
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    from mmdata.hub.sources import HF_ENDPOINT

    address = os.environ.get(ENDPOINT_VARIABLES["hf"]) or HF_ENDPOINT
    try:
        with waiting(address), urlopen(Request(address, method="HEAD"), timeout=TIMEOUT_S) as answer:
            yield MachineFact("endpoint", f"{address} answers ({answer.status})")
    except HTTPError as error:  # it is there
        yield MachineFact("endpoint", f"{address} answers ({error.code})")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        advice = f"name a mirror: export {ENDPOINT_VARIABLES['hf']}=URL; or mm fetch --source modelscope"
        yield MachineFact("endpoint", f"{address} does not answer: {reason}", advice)


def extras() -> Iterator[MachineFact]:
    """Yield the optional packages that are not installed."""
    missing: dict[str, str] = {}
    for line in metadata.requires("mm-toolkit") or ():
        package, _, extra = line.partition("; extra == ")
        name = package.split("[")[0].split(">")[0].split("<")[0].split("=")[0].strip()
        if extra and extra.strip("\"'") != "dev":
            try:
                metadata.version(name)
            except metadata.PackageNotFoundError:
                missing[name] = extra.strip("\"'")
    text = ", ".join(f"{name} ('mm-toolkit[{extra}]')" for name, extra in missing.items())
    yield MachineFact("optional packages", f"not installed: {text}" if text else "all installed")
