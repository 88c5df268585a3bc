"""`mm fetch` against `hf download`, from a hub on loopback: rate with hashing, peak memory, bytes sent again after a kill, and
several connections where each is slow.

    python tests/bench/fetch.py                        # 1 GiB, 3 rounds, about 3 minutes
    python tests/bench/fetch.py --mib 128 --rounds 1   # a quick look

Both clients run as processes of their own and take turns, so that other load on the machine hits both. `hf download` verifies
nothing; `mm fetch` hashes, counts lines and syncs the file to disk within the time shown.
"""

import argparse
import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from tests.fakehub import FakeHub, OnDisk, lines  # noqa: E402

DATASET = "jingyaogong/minimind_dataset"
MIB = 1 << 20
NAME = "bench.jsonl"


def make_file(path: Path, num_bytes: int) -> OnDisk:
    """A jsonl of that size on disk, written once."""
    block = lines(MIB // 128, width=128)
    sha256 = hashlib.sha256()
    with open(path, "wb") as file:
        for _ in range(num_bytes // MIB):
            file.write(block)
            sha256.update(block)
    return OnDisk(path, sha256.hexdigest())


def command(client: str, hub: FakeHub, out: Path, connections: int) -> list[str]:
    """The command line of a client."""
    if client == "hf":
        hf = Path(sys.executable).with_name("hf")
        return [str(hf), "download", DATASET, NAME, "--repo-type", "dataset", "--local-dir", str(out), "--quiet"]
    options = ["--endpoint", hub.url, "--out", str(out), "--connections", str(connections), "--quiet"]
    return [sys.executable, str(ROOT / "cli.py"), "fetch", NAME, *options]


def start(client: str, hub: FakeHub, out: Path, connections: int = 1) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(out.parent / "home"),
    }
    return subprocess.Popen(command(client, hub, out, connections), env=environment, stdout=subprocess.DEVNULL)


def measure(client: str, hub: FakeHub, out: Path, connections: int = 1) -> tuple[float, float]:
    """Seconds and peak memory in MiB of one download into an empty folder."""
    shutil.rmtree(out, ignore_errors=True)
    began = time.monotonic()
    process = start(client, hub, out, connections)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, f"{client} failed"
    return time.monotonic() - began, usage.ru_maxrss / 1024


def kill_and_resume(client: str, hub: FakeHub, out: Path, size: int) -> tuple[float, float]:
    """Kill a client at 60 % and run it again. Gives MiB it had on disk and fetched again, and MiB lost in flight.

    In flight is what the hub had handed to its socket and the client never wrote: mostly the kernel's buffers, which on loopback
    grow to several MiB. At the speed of a gigabit line, as a network would give it.
    """
    shutil.rmtree(out, ignore_errors=True)
    hub.forget()
    hub.bytes_per_s = 120_000_000
    process = start(client, hub, out)
    while hub.sent() < 0.6 * size:
        time.sleep(0.005)
    process.kill()
    process.wait()
    time.sleep(0.5)
    sent = hub.sent()
    on_disk = sum(path.stat().st_size for path in out.rglob("*") if path.suffix in (".part", ".incomplete"))
    assert start(client, hub, out).wait() == 0
    hub.bytes_per_s = None
    return (hub.sent() - sent - (size - on_disk)) / MIB, (sent - on_disk) / MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slow-mib", type=int, default=160, help="size of the file for the capped connections")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, FakeHub() as hub:
        size, out = arguments.mib * MIB, Path(folder) / "out"
        hub.put(DATASET, {NAME: make_file(Path(folder) / "source", size)})
        seen: dict[str, list[tuple[float, float]]] = {"hf": [], "mm": [], "mm x4": []}
        for _ in range(arguments.rounds):
            for client, runs in seen.items():
                runs.append(measure(client[:2], hub, out, 4 if client.endswith("x4") else 1))
        for client, runs in seen.items():
            seconds = statistics.median(run[0] for run in runs)
            print(
                f"{client:6} {arguments.mib / seconds:6.0f} MiB/s   peak {max(run[1] for run in runs):5.1f} MiB   {seconds:.1f} s"
            )
        for client in ("mm", "hf"):
            again, in_flight = kill_and_resume(client, hub, out, size)
            print(
                f"{client:6} killed at 60 % and run again: {again:.1f} MiB fetched again, {in_flight:.1f} MiB lost in flight"
            )
        hub.put(DATASET, {NAME: make_file(Path(folder) / "slow", arguments.slow_mib * MIB)})
        hub.bytes_per_s = 10_000_000
        one, four = (measure("mm", hub, out, connections)[0] for connections in (1, 4))
        print(f"10 MB/s a connection: 1 takes {one:.1f} s, 4 take {four:.1f} s: {one / four:.2f} times as fast")


if __name__ == "__main__":
    main()
