"""Fetching over a link that drops, lies, stalls and refuses, from a hub on loopback, through the real huggingface_hub client."""

import email.utils
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from fakehub import CHUNK_BYTES, Bytes, FakeHub, Filler, Repo, lines
from waiting import LONG_S, wait_until

from mmdata.errors import (
    AccessError,
    ConflictError,
    DiskError,
    IntegrityError,
    InterruptedFetch,
    MMError,
    NetworkError,
    NotFoundError,
    UsageError,
)
from mmdata.hub import catalog, fetch, partial, plan
from mmdata.hub.fetch import FetchOutcome
from mmdata.hub.lockfile import LOCK_NAME, read_lock
from mmdata.hub.options import FetchOptions
from mmdata.hub.partial import cut, merge, missing
from mmdata.hub.plan import FetchPlan
from mmdata.hub.sources import asked_wait, is_safe
from mmdata.hub.transfer import RetryPolicy

DATASET = catalog.DATASET_REPO["hf"]
ROOT = Path(__file__).resolve().parent.parent
SMALL = lines(200, seed="small")  # 20 kB
LARGE = lines(30_000, seed="large")  # 3 MB: three pieces for several connections


@dataclass
class Waits:
    """Stands in for time.sleep and remembers what was asked of it."""

    seconds: list[float] = field(default_factory=list)

    def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent/token")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with FakeHub() as hub:
        yield hub
        close_session()


@pytest.fixture
def waits() -> Waits:
    return Waits()


@dataclass
class Client:
    """Plans and fetches into one folder, patient in kind but not in time."""

    hub: FakeHub
    out: Path
    waits: Waits

    def options(self, **changes: object) -> FetchOptions:
        retry = RetryPolicy(read_timeout_s=LONG_S, sleep=self.waits)
        defaults: dict = {"out": self.out, "endpoint": self.hub.url, "retry": retry}
        source = changes.get("source", "hf")
        if source not in ("hf", "modelscope"):
            defaults["endpoint"] = None
        return FetchOptions(**{**defaults, **changes})

    def plan(self, *names: str, **changes: object) -> FetchPlan:
        return plan.plan(names, self.options(**changes))

    def all(self, *names: str, watch: fetch.Watch | None = None, **changes: object) -> list[FetchOutcome]:
        return fetch.fetch(self.plan(*names, **changes), watch=watch)  # type: ignore[arg-type]

    def one(self, *names: str, watch: fetch.Watch | None = None, **changes: object) -> FetchOutcome:
        """Fetch one file; its error is raised."""
        (outcome,) = self.all(*names, watch=watch, **changes)
        if outcome.error:
            raise outcome.error
        return outcome

    def read(self, name: str) -> bytes:
        return (self.out / name).read_bytes()

    def leftovers(self) -> list[str]:
        return sorted(path.name for path in self.out.rglob("*.part*"))


@pytest.fixture
def client(hub: FakeHub, tmp_path: Path, waits: Waits) -> Client:
    return Client(hub, tmp_path / "data", waits)


# --- A: the transfer ------------------------------------------------------------------------------------------------


def test_a_file_arrives_with_one_listing_and_one_body_and_a_rerun_asks_nothing(hub: FakeHub, client: Client) -> None:
    commit = hub.put(DATASET, {"a.jsonl": SMALL})
    outcome = client.one("a.jsonl")
    assert client.read("a.jsonl") == SMALL
    assert (outcome.status, outcome.num_lines, outcome.commit) == ("fetched", 200, commit)
    assert (hub.count("api"), hub.count("resolve"), hub.count("cdn"), hub.sent()) == (1, 1, 1, len(SMALL))
    assert client.leftovers() == []
    hub.forget()
    assert client.one("a.jsonl").status == "kept"
    assert hub.requests == []


def test_a_rerun_does_not_even_load_huggingface_hub(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"a.jsonl": SMALL})
    client.one("a.jsonl")
    code = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "from pathlib import Path; from mmdata.hub import fetch, plan\n"
        f"fetch.fetch(plan.plan(('a.jsonl',), plan.FetchOptions(out=Path({str(client.out)!r}))))\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("connections", [1, 4])
@pytest.mark.parametrize("kind", ["drop", "reset"])
def test_a_broken_connection_goes_on_where_it_broke(hub: FakeHub, client: Client, kind: str, connections: int) -> None:
    hub.put(DATASET, {"a.jsonl": LARGE})
    hub.fail("cdn", kind, after=600_000)
    outcome = client.one("a.jsonl", connections=connections)
    assert client.read("a.jsonl") == LARGE
    assert outcome.failures == 1
    assert outcome.received_bytes == len(LARGE)  # no received byte was asked for twice


def test_a_link_that_drops_for_ever_still_ends(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"a.jsonl": LARGE})
    hub.fail("cdn", "drop", after=300_000, times=-1)
    outcome = client.one("a.jsonl")
    assert client.read("a.jsonl") == LARGE
    assert outcome.received_bytes == len(LARGE)
    assert hub.count("cdn") == 10


def test_attempts_without_progress_are_counted_and_end(hub: FakeHub, client: Client, waits: Waits) -> None:
    hub.put(DATASET, {"a.jsonl": LARGE})
    hub.fail("cdn", "drop", after=1000, times=-1)
    with pytest.raises(NetworkError, match="no progress in 6 attempts"):
        client.one("a.jsonl")
    assert len(waits.seconds) == 5
    assert waits.seconds[-1] > waits.seconds[0]
    assert client.leftovers() == ["a.jsonl.part", "a.jsonl.part.json"]
    assert not (client.out / "a.jsonl").exists()


def test_a_stall_is_noticed_and_the_rest_fetched(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"a.jsonl": LARGE})
    hub.fail("cdn", "stall", after=700_000)
    retry = replace(client.options().retry, read_timeout_s=0.4)
    assert client.one("a.jsonl", retry=retry).received_bytes == len(LARGE)


def test_a_drip_is_too_slow(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"a.jsonl": SMALL})
    hub.fail("cdn", "drip")
    retry = replace(client.options().retry, slow_window_s=0.2, slow_bytes_per_s=2000)  # a drip has 800 at most
    assert client.one("a.jsonl", retry=retry).failures == 1
    hub.put(DATASET, {"b.jsonl": SMALL})
    hub.fail("cdn", "drip", times=-1)
    with pytest.raises(NetworkError, match="too slow"):
        client.one("b.jsonl", retry=replace(retry, slow_window_s=0.05))


def test_a_listing_that_hangs_is_given_up(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"a.jsonl": SMALL})
    hub.fail("api", "hang", times=-1)
    with pytest.raises(NetworkError, match="kept silent"):
        client.one("a.jsonl", retry=replace(client.options().retry, read_timeout_s=0.4))
    assert hub.count("api") == 3


@pytest.mark.parametrize("place", ["api", "resolve", "cdn"])
@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again_when_it_says(
    hub: FakeHub, client: Client, waits: Waits, place: str, status: int
) -> None:
    hub.put(DATASET, {"a.jsonl": SMALL})
    hub.fail(place, "status", status=status, headers={"Retry-After": "7"}, times=2)
    client.one("a.jsonl")
    assert waits.seconds == [7, 7]


def test_every_form_of_retry_after_is_honoured_up_to_five_minutes(hub: FakeHub, client: Client, waits: Waits) -> None:
    hub.put(DATASET, {"a.jsonl": SMALL})
    later = email.utils.formatdate(time.time() + 100, usegmt=True)
    for headers in ({"Retry-After": later}, {"RateLimit": '"api";r=0;t=55'}, {"Retry-After": "86400"}):
        hub.fail("resolve", "status", status=429, headers=headers)
    client.one("a.jsonl")
    assert 95 <= waits.seconds[0] <= 100
    assert waits.seconds[1:] == [55, 300]


def test_a_rate_limit_header_counts_only_where_the_limit_was_hit() -> None:
    assert asked_wait({"ratelimit": '"api";r=99;t=55'}) is None
    assert asked_wait({"retry-after": "nonsense"}) is None
    assert asked_wait({"retry-after": "1.5"}) == 1.5


def test_a_server_without_ranges_only_costs_bytes(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"a.jsonl": LARGE})
    hub.fail("cdn", "drop", after=1_000_000)
    hub.fail("cdn", "whole", times=-1)
    client.one("a.jsonl")
    assert client.read("a.jsonl") == LARGE


def test_several_connections_fall_back_to_one_without_ranges(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"a.jsonl": LARGE})
    hub.fail("cdn", "whole", times=-1)
    outcome = client.one("a.jsonl", connections=4)
    assert client.read("a.jsonl") == LARGE
    assert any("one connection" in note for note in outcome.warnings)


@pytest.mark.parametrize(("kind", "by"), [("early", 500), ("late", 500)])
def test_a_range_that_begins_elsewhere_never_shifts_the_data(hub: FakeHub, client: Client, kind: str, by: int) -> None:
    hub.put(DATASET, {"a.jsonl": LARGE})
    hub.fail("cdn", "drop", after=1_000_000)
    hub.fail("cdn", kind, by=by)
    client.one("a.jsonl")
    assert client.read("a.jsonl") == LARGE


def test_an_expired_address_is_renewed_at_the_hub(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"a.jsonl": LARGE})
    hub.fail("cdn", "drop", after=1_000_000)
    hub.fail("cdn", "status", status=403, skip=1)
    client.one("a.jsonl")
    assert client.read("a.jsonl") == LARGE
    assert hub.count("resolve") == 3
    assert hub.sent() == len(LARGE) + 2  # and the two bytes of the refusal


def test_gzip_that_nobody_asked_for_is_unpacked(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"a.jsonl": LARGE})
    hub.fail("cdn", "gzip")
    client.one("a.jsonl")
    assert client.read("a.jsonl") == LARGE
    assert hub.sent() < len(LARGE)


def test_gzip_after_a_break_starts_that_answer_over(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"a.jsonl": LARGE})
    hub.fail("cdn", "drop", after=1_000_000)
    hub.fail("cdn", "gzip", times=1)
    hub.faults[1].skip = 1
    client.one("a.jsonl")
    assert client.read("a.jsonl") == LARGE


def test_a_range_the_server_cannot_satisfy_is_a_contradiction(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"a.jsonl": LARGE})
    hub.fail("cdn", "drop", after=1_000_000)
    hub.fail("cdn", "unsatisfiable", times=-1)
    with pytest.raises(IntegrityError, match="shorter file"):
        client.one("a.jsonl")
    hub.forget()
    assert client.one("a.jsonl").received_bytes == len(LARGE) - 1_000_000


def test_a_circle_of_redirects_is_left(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"a.jsonl": SMALL})
    hub.fail("resolve", "loop", times=-1)
    with pytest.raises(NetworkError, match="circle"):
        client.one("a.jsonl")


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port on which nobody listens; it is bound, so that no other process gets it."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def test_a_proxy_that_refuses_is_named(
    hub: FakeHub, client: Client, closed_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.utils import close_session

    close_session()  # a session reads the proxies when it is made
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{closed_port}")
    monkeypatch.setenv("NO_PROXY", "")
    with pytest.raises(NetworkError, match="cannot be reached") as caught:
        client.one("a.jsonl", endpoint="http://hub.invalid")
    assert "proxies" in caught.value.fix


def test_a_broken_tls_connection_is_not_retried(hub: FakeHub, client: Client, waits: Waits) -> None:
    with pytest.raises(NetworkError, match="certificate"):
        client.one("a.jsonl", endpoint=hub.url.replace("http:", "https:"))
    assert waits.seconds == []


def test_a_hub_that_is_down_is_named(hub: FakeHub, client: Client, closed_port: int) -> None:
    with pytest.raises(NetworkError, match=f"127.0.0.1:{closed_port}") as caught:
        client.one("a.jsonl", endpoint=f"http://127.0.0.1:{closed_port}")
    assert "--endpoint" in caught.value.fix


# --- kills ----------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
from pathlib import Path
from mmdata.hub import fetch, plan
out, endpoint, connections = sys.argv[1:4]
options = plan.FetchOptions(out=Path(out), endpoint=endpoint, connections=int(connections))
try:
    outcomes = fetch.fetch(plan.plan(tuple(sys.argv[4:]), options))
except plan.MMError as error:
    print(error.message)
    sys.exit(error.exit_code)
print(*(outcome.status for outcome in outcomes))
sys.exit(max((outcome.error.exit_code for outcome in outcomes if outcome.error), default=0))
"""


def start(client: Client, *names: str, connections: int = 1) -> subprocess.Popen[str]:
    """A fetch in a process of its own."""
    environment = {**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"}
    arguments = [sys.executable, "-c", SCRIPT, str(client.out), client.hub.url, str(connections), *names]
    return subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def kill_midway(client: Client, sign: signal.Signals, connections: int, at_bytes: int, hold_after: int) -> int:
    """Start a fetch that gets `hold_after` bytes a connection and no more, end it once `at_bytes` lie on disk; gives the exit code."""
    client.hub.hold_after = hold_after
    with start(client, "a.jsonl", connections=connections) as process:
        wait_until(lambda: partial.kept_bytes(client.out / "a.jsonl") >= at_bytes)
        process.send_signal(sign)
        process.communicate(timeout=LONG_S)
    client.hub.hold_after = None
    return process.returncode


def after_a_kill(client: Client, sign: signal.Signals, connections: int) -> int:
    """Kill a fetch of LARGE in its middle, fetch the rest; gives the exit code of the killed one."""
    client.hub.put(DATASET, {"a.jsonl": LARGE})
    code = kill_midway(client, sign, connections, 1_000_000, 1_500_000 if connections == 1 else 500_000)
    assert not (client.out / "a.jsonl").exists()
    kept = partial.kept_bytes(client.out / "a.jsonl")
    assert kept >= 1_000_000
    client.hub.forget()
    outcome = client.one("a.jsonl", connections=connections)
    assert client.read("a.jsonl") == LARGE
    assert outcome.received_bytes == client.hub.sent() == len(LARGE) - kept
    return code


def test_a_killed_fetch_goes_on_where_it_stopped(client: Client) -> None:
    assert after_a_kill(client, signal.SIGKILL, 1) == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("connections", [1, 4])
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_any_end_of_the_process_keeps_what_arrived(client: Client, sign: signal.Signals, connections: int) -> None:
    assert after_a_kill(client, sign, connections) == (InterruptedFetch.exit_code if sign == signal.SIGINT else -sign)


@pytest.mark.slow
def test_killed_six_times_in_a_row_it_still_ends(client: Client) -> None:
    client.hub.put(DATASET, {"a.jsonl": LARGE})
    kept: list[int] = []
    for _ in range(6):
        kill_midway(client, signal.SIGKILL, 1, sum(kept[-1:]) + 2 * CHUNK_BYTES, 3 * CHUNK_BYTES)
        kept.append(partial.kept_bytes(client.out / "a.jsonl"))
    client.one("a.jsonl")
    assert client.read("a.jsonl") == LARGE
    asked = [request.range for request in client.hub.requests if request.place == "cdn"]
    assert asked == [None, *(f"bytes={begin}-" for begin in kept)]  # no byte on disk was asked for again


# --- B: integrity ---------------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_found_and_healed(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"a.jsonl": LARGE})
    hub.fail("cdn", "flip", after=1_234_567)
    outcome = client.one("a.jsonl")
    assert client.read("a.jsonl") == LARGE
    assert outcome.received_bytes == 2 * len(LARGE)
    assert any("damaged" in note for note in outcome.warnings)


def test_a_bit_that_always_flips_leaves_nothing_behind(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"a.jsonl": SMALL})
    hub.fail("cdn", "flip", after=5000, times=-1)
    with pytest.raises(IntegrityError, match="damaged twice"):
        client.one("a.jsonl")
    assert not (client.out / "a.jsonl").exists()
    assert client.leftovers() == []


@pytest.mark.parametrize("kind", ["short", "long"])
def test_a_body_of_the_wrong_length_is_refused(hub: FakeHub, client: Client, kind: str) -> None:
    hub.put(DATASET, {"a.jsonl": SMALL})
    hub.fail("cdn", kind, by=100, times=-1)
    with pytest.raises(IntegrityError, match="published"):
        client.one("a.jsonl")
    assert hub.count("cdn") == 3
    assert not (client.out / "a.jsonl").exists()


@pytest.mark.parametrize("place", ["resolve", "cdn"])
def test_a_web_page_is_refused_at_once(hub: FakeHub, client: Client, place: str) -> None:
    hub.put(DATASET, {"a.jsonl": SMALL})
    hub.fail(place, "page", times=-1)
    with pytest.raises(IntegrityError, match="web page") as caught:
        client.one("a.jsonl")
    assert "browser" in caught.value.fix
    assert hub.count("resolve") == 1


def test_a_portal_in_place_of_the_listing_is_named(hub: FakeHub, client: Client) -> None:
    hub.fail("api", "page", times=-1)
    with pytest.raises(NetworkError, match="not like a hub"):
        client.one("a.jsonl")


def test_a_damaged_part_is_fetched_anew(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"a.jsonl": LARGE})
    leave_a_part(client, 1_000_000)
    part = client.out / "a.jsonl.part"
    part.write_bytes(b"\0" * part.stat().st_size)
    client.one("a.jsonl")
    assert client.read("a.jsonl") == LARGE


def leave_a_part(client: Client, num_bytes: int, name: str = "a.jsonl", **changes: object) -> None:
    """Fetch that much and no more."""
    client.hub.fail("cdn", "drop", after=num_bytes)
    client.hub.fail("resolve", "status", status=418, skip=1, times=-1)
    client.hub.fail("modelscope", "status", status=418, skip=1, name="FilePath", times=-1)
    with pytest.raises(NetworkError):
        client.one(name, **changes)
    client.hub.forget()
    assert partial.kept_bytes(client.out / name) == num_bytes


def test_a_part_of_other_content_is_not_used(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"a.jsonl": LARGE})
    leave_a_part(client, 1_000_000)
    other = lines(30_000, seed="other")
    hub.put(DATASET, {"a.jsonl": other})
    assert client.one("a.jsonl").received_bytes == len(other)
    assert client.read("a.jsonl") == other


def test_a_part_without_its_journal_is_not_used(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"a.jsonl": LARGE})
    leave_a_part(client, 1_000_000)
    (client.out / "a.jsonl.part.json").write_text("{")
    assert client.one("a.jsonl").received_bytes == len(LARGE)


@pytest.mark.parametrize(("first", "second"), [("hf", "modelscope"), ("modelscope", "hf")])
def test_what_one_source_began_another_finishes(hub: FakeHub, client: Client, first: str, second: str) -> None:
    hub.put(DATASET, {"a.jsonl": LARGE})
    hub.put(catalog.DATASET_REPO["modelscope"], {"a.jsonl": LARGE})
    leave_a_part(client, 1_000_000, source=first)
    assert client.one("a.jsonl", source=second).received_bytes == len(LARGE) - 1_000_000
    assert client.read("a.jsonl") == LARGE


def test_a_mirror_without_the_hubs_headers_is_enough(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"a.jsonl": SMALL})
    hub.fail("resolve", "strip", times=-1)
    client.one("a.jsonl")
    assert client.read("a.jsonl") == SMALL


def test_an_empty_file_and_one_without_a_last_newline_arrive(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"empty.jsonl": b"", "cut.jsonl": SMALL[:-1]})
    empty, unfinished = client.all("empty.jsonl", "cut.jsonl")
    assert (empty.status, empty.num_bytes, client.read("empty.jsonl")) == ("fetched", 0, b"")
    assert client.read("cut.jsonl") == SMALL[:-1]
    assert "does not end" in unfinished.warnings[0]


def known(monkeypatch: pytest.MonkeyPatch, data: bytes, **changes: object) -> None:
    """Make the catalog know dpo as these bytes."""
    first = next(file for file in catalog.FILES if file.key == "dpo")
    figures = {
        "num_bytes": len(data),
        "sha256": Bytes(data).sha256,
        "num_rows": data.count(b"\n"),
        "fields": ("text",),
        **changes,
    }
    others = tuple(file for file in catalog.FILES if file.key != "dpo")
    monkeypatch.setattr(catalog, "FILES", (replace(first, **figures), *others))


def test_a_line_count_unlike_the_catalogs_is_said(
    hub: FakeHub, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    known(monkeypatch, SMALL, num_rows=201)
    hub.put(DATASET, {"dpo.jsonl": SMALL})
    assert "200 lines; the catalog knows 201" in client.one("dpo").warnings[0]


def test_a_first_row_of_another_kind_is_said_when_a_checksum_vouches(
    hub: FakeHub, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    known(monkeypatch, SMALL, fields=("chosen", "rejected"))
    hub.put(DATASET, {"dpo.jsonl": SMALL})
    assert "line 1 has no 'chosen' and no 'rejected'" in client.one("dpo").warnings[0]


def test_a_first_row_of_another_kind_is_refused_when_nobody_vouches(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"dpo.jsonl": SMALL})
    with pytest.raises(IntegrityError, match="no checksum was published"):
        client.one("dpo", source=f"{hub.url}/plain")
    assert client.leftovers() == []
    assert not (client.out / "dpo.jsonl").exists()


# --- C: state -------------------------------------------------------------------------------------------------------


def test_a_second_machine_gets_the_locked_bytes(hub: FakeHub, client: Client, tmp_path: Path) -> None:
    hub.put(DATASET, {"a.jsonl": SMALL})
    client.one("a.jsonl")
    hub.put(DATASET, {"a.jsonl": LARGE})
    other = Client(hub, tmp_path / "other", client.waits)
    other.out.mkdir()
    shutil.copy(client.out / LOCK_NAME, other.out / LOCK_NAME)
    hub.forget()
    other.one("a.jsonl")
    assert other.read("a.jsonl") == SMALL
    assert hub.count("api") == 0


def test_a_new_name_comes_from_the_locked_commit_and_update_moves(hub: FakeHub, client: Client) -> None:
    first = hub.put(DATASET, {"a.jsonl": SMALL, "b.jsonl": SMALL})
    client.one("a.jsonl")
    second = hub.put(DATASET, {"a.jsonl": LARGE, "b.jsonl": LARGE})
    assert client.one("b.jsonl").commit == first
    assert client.read("b.jsonl") == SMALL
    outcomes = client.all("a.jsonl", "b.jsonl", update=True)
    assert {outcome.commit for outcome in outcomes} == {second}
    assert client.read("a.jsonl") == client.read("b.jsonl") == LARGE
    assert [outcome.status for outcome in client.all("a.jsonl", "b.jsonl", update=True)] == ["kept", "kept"]


def test_a_revision_overrides_the_lock(hub: FakeHub, client: Client) -> None:
    first = hub.put(DATASET, {"a.jsonl": SMALL})
    hub.put(DATASET, {"a.jsonl": LARGE})
    client.one("a.jsonl")
    client.one("a.jsonl", revision=first)
    assert client.read("a.jsonl") == SMALL
    assert client.one("a.jsonl", revision=first[:8]).status == "kept"


def test_a_failed_update_leaves_the_old_file(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"a.jsonl": SMALL})
    client.one("a.jsonl")
    hub.put(DATASET, {"a.jsonl": LARGE})
    hub.fail("cdn", "flip", after=1000, times=-1)
    with pytest.raises(IntegrityError):
        client.one("a.jsonl", update=True)
    assert client.read("a.jsonl") == SMALL
    assert client.one("a.jsonl").status == "kept"


def test_a_reader_sees_old_bytes_or_new_ones(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"a.jsonl": SMALL})
    client.one("a.jsonl")
    hub.put(DATASET, {"a.jsonl": LARGE})
    hub.bytes_per_s = 20_000_000
    seen: set[int] = set()

    def watch(*_: object) -> None:
        seen.add(len(client.read("a.jsonl")))

    client.one("a.jsonl", update=True, watch=watch)
    assert seen == {len(SMALL)}
    assert client.read("a.jsonl") == LARGE


def rewrite(path: Path, data: bytes, *, keep_mtime: bool) -> None:
    """Write other bytes, with the same or a newer time of writing."""
    stat = path.stat()
    path.write_bytes(data)
    mtime = stat.st_mtime_ns if keep_mtime else stat.st_mtime_ns + 5_000_000_000
    os.utime(path, ns=(mtime, mtime))


def test_a_file_cut_behind_our_back_is_healed(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"a.jsonl": SMALL})
    client.one("a.jsonl")
    rewrite(client.out / "a.jsonl", SMALL[:5000], keep_mtime=True)
    assert client.one("a.jsonl").status == "fetched"
    assert client.read("a.jsonl") == SMALL


def test_times_set_through_floats_are_the_same_times(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"a.jsonl": SMALL})
    client.one("a.jsonl")
    path = client.out / "a.jsonl"
    seconds = path.stat().st_mtime
    path.write_bytes(SMALL[:5000])
    os.utime(path, (seconds, seconds))
    assert client.one("a.jsonl").status == "fetched"


def test_verify_finds_rot_that_no_stat_shows(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"a.jsonl": SMALL})
    client.one("a.jsonl")
    path = client.out / "a.jsonl"
    rewrite(path, SMALL.replace(b"x", b"y", 1), keep_mtime=True)
    lock = json.loads((client.out / LOCK_NAME).read_text())
    lock["files"]["a.jsonl"]["ctime_ns"] = path.stat().st_ctime_ns
    del lock["record_sha256"]
    (client.out / LOCK_NAME).write_text(json.dumps(lock))
    assert client.one("a.jsonl").status == "kept"
    to_do = client.plan(verify=True)  # without names: all that was fetched
    assert "damaged on disk" in to_do.warnings[0]
    assert fetch.fetch(to_do)[0].status == "fetched"
    assert client.read("a.jsonl") == SMALL


def test_an_edited_file_is_never_overwritten(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"a.jsonl": SMALL})
    client.one("a.jsonl")
    mine = SMALL + b'{"text": "mine"}\n'
    rewrite(client.out / "a.jsonl", mine, keep_mtime=False)
    for changes in ({}, {"update": True}, {"verify": True}):
        with pytest.raises(ConflictError):
            client.one("a.jsonl", **changes)
    assert client.read("a.jsonl") == mine
    client.one("a.jsonl", force=True)
    assert client.read("a.jsonl") == SMALL


def test_a_users_own_file_is_never_overwritten(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"a.jsonl": SMALL})
    client.out.mkdir()
    (client.out / "a.jsonl").write_bytes(b"mine")
    with pytest.raises(ConflictError, match="your own"):
        client.one("a.jsonl")
    assert client.read("a.jsonl") == b"mine"
    assert hub.sent() == 0


def test_the_same_bytes_are_adopted(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"a.jsonl": SMALL})
    client.out.mkdir()
    (client.out / "a.jsonl").write_bytes(SMALL)
    assert client.one("a.jsonl").status == "adopted"
    assert hub.sent() == 0
    hub.forget()
    assert client.one("a.jsonl").status == "kept"
    assert hub.requests == []


def test_a_crash_before_the_lock_costs_no_download(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"a.jsonl": SMALL})
    client.one("a.jsonl")
    (client.out / LOCK_NAME).unlink()
    hub.forget()
    assert client.one("a.jsonl").status == "adopted"
    assert hub.sent() == 0


def test_a_broken_lock_is_set_aside_and_said(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"a.jsonl": SMALL})
    client.one("a.jsonl")
    (client.out / LOCK_NAME).write_text('{"format_version": 1, "files": {')
    to_do = client.plan("a.jsonl")
    assert "damaged" in to_do.warnings[0]
    fetch.fetch(to_do)
    assert read_lock(client.out).files["a.jsonl"].num_lines == 200
    assert (client.out / f"{LOCK_NAME}.broken").exists()


def test_offline_is_no_trouble_when_everything_is_there(
    hub: FakeHub, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    hub.put(DATASET, {"a.jsonl": SMALL, "b.jsonl": SMALL})
    client.one("a.jsonl")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert client.one("a.jsonl").status == "kept"
    with pytest.raises(NetworkError, match="HF_HUB_OFFLINE"):
        client.one("b.jsonl")


def test_two_folders_on_different_disks_do_not_touch_each_other(hub: FakeHub, client: Client) -> None:
    if not Path("/dev/shm").is_dir():
        pytest.skip("no second disk here")
    hub.put(DATASET, {"a.jsonl": SMALL})
    other = Client(hub, Path("/dev/shm") / f"mm-test-{os.getpid()}", client.waits)
    try:
        assert client.one("a.jsonl").status == other.one("a.jsonl").status == "fetched"
        assert other.read("a.jsonl") == SMALL
    finally:
        shutil.rmtree(other.out)


def test_a_folder_that_cannot_be_written_is_named(
    hub: FakeHub, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put(DATASET, {"a.jsonl": SMALL})
    (client.out.parent / "file").write_bytes(b"")
    with pytest.raises(DiskError, match="cannot write"):
        client.one("a.jsonl", out=client.out.parent / "file" / "data")

    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    client.out.mkdir()
    monkeypatch.setattr(partial.os, "open", refuse)  # root may write anywhere, so the refusal is played
    with pytest.raises(DiskError):
        client.one("a.jsonl")
    assert hub.sent() == 0


def test_a_moved_folder_stays_whole(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"a.jsonl": SMALL})
    client.one("a.jsonl")
    moved, copied = client.out.with_name("moved"), client.out.with_name("copied")
    shutil.copytree(client.out, copied)
    client.out.rename(moved)
    hub.forget()
    assert client.one("a.jsonl", out=moved).status == "kept"
    assert client.one("a.jsonl", out=copied).status == "kept"  # other times, so hashed once and recorded anew
    assert hub.requests == []


def test_touching_a_file_keeps_where_it_came_from(hub: FakeHub, client: Client) -> None:
    hub.put(catalog.DATASET_REPO["modelscope"], {"a.jsonl": SMALL})
    client.one("a.jsonl", source="modelscope")
    os.utime(client.out / "a.jsonl")
    assert client.one("a.jsonl").status == "kept"
    assert read_lock(client.out).files["a.jsonl"].source == "modelscope"


def test_locked_bytes_that_a_branch_no_longer_has_are_said(hub: FakeHub, client: Client) -> None:
    hub.put(catalog.DATASET_REPO["modelscope"], {"a.jsonl": SMALL})
    client.one("a.jsonl", source="modelscope")
    (client.out / "a.jsonl").unlink()
    hub.put(catalog.DATASET_REPO["modelscope"], {"a.jsonl": LARGE})
    with pytest.raises(NotFoundError, match="no longer has") as caught:
        client.one("a.jsonl", source="modelscope")
    assert "--update" in caught.value.fix
    assert client.one("a.jsonl", source="modelscope", update=True).num_bytes == len(LARGE)


# --- D: limits ------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_too_small_is_said_before_any_body(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"a.jsonl": Filler(1 << 50, sha256="0" * 64)})
    with pytest.raises(DiskError, match="are free"):
        client.one("a.jsonl")
    assert hub.sent() == 0
    assert hub.count("resolve") == 0


def test_a_disk_that_fills_up_keeps_the_part(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"a.jsonl": LARGE})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limit[1]))
    try:
        with pytest.raises(DiskError, match="full"):
            client.one("a.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    hub.forget()
    assert client.one("a.jsonl").received_bytes == len(LARGE) - 1_000_000
    assert client.read("a.jsonl") == LARGE


def test_several_at_once_download_one_file_once(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"a.jsonl": LARGE})
    hub.bytes_per_s = 10_000_000
    statuses: list[str] = []
    threads = [threading.Thread(target=lambda: statuses.append(client.one("a.jsonl").status)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == ["fetched"] + ["kept"] * 5
    assert hub.sent() == len(LARGE)


@pytest.mark.slow
def test_six_processes_download_one_file_once(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"a.jsonl": LARGE})
    hub.bytes_per_s = 1_000_000
    processes = [start(client, "a.jsonl") for _ in range(6)]
    outputs = [process.communicate(timeout=LONG_S) for process in processes]
    assert sorted(out.strip() for out, _ in outputs) == ["fetched"] + ["kept"] * 5, outputs
    assert hub.sent() == len(LARGE)


MEMORY = """
import resource, sys
from pathlib import Path
from mmdata.hub import fetch, plan
options = plan.FetchOptions(out=Path(sys.argv[1]), endpoint=sys.argv[2])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fetch.fetch(plan.plan(("small.jsonl",), options))
idle = peak()
(outcome,) = fetch.fetch(plan.plan(("long.jsonl",), options))
print(outcome.num_bytes, outcome.num_lines, (peak() - idle) // 1024)
"""


@pytest.mark.slow
def test_a_single_line_of_200_mb_takes_no_memory(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"small.jsonl": SMALL, "long.jsonl": Filler(200_000_000, b'{"text": "')})
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(client.out), hub.url],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    num_bytes, num_lines, grown_mb = map(int, done.stdout.split())
    assert (num_bytes, num_lines) == (200_000_000, 0)
    assert grown_mb < 12


class NoHash:
    """Agrees with everything: hashing 4 GiB is not what that test is about."""

    def __init__(self, *_: bytes) -> None: ...

    def update(self, data: bytes) -> None: ...

    def hexdigest(self) -> str:
        return "a" * 64


def test_offsets_beyond_four_gib_are_exact(hub: FakeHub, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part is sparse and has all but three stretches, one beyond 2 GiB and one beyond 4 GiB."""
    size = (4 << 30) + (1 << 20)
    monkeypatch.setattr("mmdata.io.files.hashlib.sha256", NoHash)
    monkeypatch.setattr(partial.PartialFile, "catch_up", lambda part, stop=None: setattr(part.digest, "position", size))
    gaps = [(0, 100), (2 << 30, (2 << 30) + 100), (4 << 30, size)]
    hub.put(DATASET, {"a.bin": Filler(size, sha256="a" * 64)})
    client.out.mkdir()
    part, journal = partial.part_paths(client.out / "a.bin")
    with open(part, "wb") as file:
        file.truncate(size)
    spans = [(100, 2 << 30), ((2 << 30) + 100, 4 << 30), (size, size)]
    journal.write_text(json.dumps({"num_bytes": size, "identity": "a" * 64, "spans": spans}))
    assert client.one("a.bin").num_bytes == size
    with open(client.out / "a.bin", "rb") as file:
        for begin, end in gaps:
            assert os.pread(file.fileno(), 1, begin - 1) == b"\0" if begin else True
            assert os.pread(file.fileno(), end - begin, begin) == b"x" * (end - begin)
    assert {request.range for request in hub.requests if request.place == "cdn"} >= {f"bytes={4 << 30}-"}


# --- E: names and access --------------------------------------------------------------------------------------------


def test_a_gated_repository_needs_the_right_token(
    hub: FakeHub, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put(DATASET, {"a.jsonl": SMALL})
    hub.repos[f"datasets/{DATASET}"].is_gated = True
    for token in ("", "weak"):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(AccessError, match="gated") as caught:
            client.one("a.jsonl")
        assert "hf auth login" in caught.value.fix
    monkeypatch.setenv("HF_TOKEN", "good")
    assert client.one("a.jsonl").status == "fetched"


def test_a_private_repository_and_a_bad_token_are_told_apart_from_absence(
    hub: FakeHub, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put(DATASET, {"a.jsonl": SMALL})
    monkeypatch.setenv("HF_TOKEN", "bad")
    with pytest.raises(AccessError):
        client.one("a.jsonl")
    hub.repos[f"datasets/{DATASET}"].is_private = True
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(AccessError):
        client.one("a.jsonl")
    monkeypatch.setenv("HF_TOKEN", "weak")
    with pytest.raises(NotFoundError):
        client.one("a.jsonl")


def test_the_token_reaches_the_endpoint_and_nobody_else(
    hub: FakeHub, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "good")
    hub.put(DATASET, {"a.jsonl": SMALL})
    hub.put(catalog.DATASET_REPO["modelscope"], {"b.jsonl": SMALL})
    client.one("a.jsonl")
    assert {request.token for request in hub.requests if request.place != "cdn"} == {"Bearer good"}
    assert {request.token for request in hub.requests if request.place == "cdn"} == {None}
    hub.forget()
    client.one("b.jsonl", source="modelscope")
    client.one("a.jsonl", source=f"{hub.url}/plain", force=True, out=client.out / "again")
    assert {request.token for request in hub.requests} == {None}


def test_no_message_shows_a_token_or_a_signature(hub: FakeHub, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "good")
    hub.put(DATASET, {"a.jsonl": SMALL})
    for kind, values in (
        ("status", {"status": 403}),
        ("status", {"status": 418}),
        ("page", {}),
        ("drop", {"after": 10}),
    ):
        hub.fail("cdn", kind, times=-1, **values)
        with pytest.raises(MMError) as caught:
            client.one("a.jsonl")
        text = f"{caught.value.message} {caught.value.fix}"
        assert "good" not in text
        assert "secret" not in text
        hub.forget()


def test_absent_files_revisions_and_repositories_are_not_found(hub: FakeHub, client: Client) -> None:
    with pytest.raises(AccessError, match="absent, or private"):  # the Hub tells nobody which
        client.plan("a.jsonl")
    hub.put(DATASET, {"abcdef.jsonl": SMALL})
    with pytest.raises(NotFoundError) as caught:
        client.plan("abcdeg.jsonl")
    assert "abcdef.jsonl" in caught.value.fix
    with pytest.raises(NotFoundError, match="no such revision"):
        client.plan("abcdef.jsonl", revision="v9")
    with pytest.raises(NotFoundError) as caught:
        client.plan("pretrain_hqq")
    assert "pretrain_hq" in caught.value.fix


def test_a_file_gone_from_main_comes_from_the_last_commit_that_has_it(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"a.jsonl": LARGE})
    last = hub.put(DATASET, {"a.jsonl": SMALL})
    hub.put(DATASET, {"b.jsonl": SMALL}, remove=("a.jsonl",))
    for number in range(60):
        hub.put(DATASET, {"b.jsonl": SMALL + b"\n" * number})
    to_do = client.plan("a.jsonl")
    assert to_do.items[0].commit == last
    assert "gone from main" in to_do.warnings[0]


def test_the_two_dpo_files_are_never_confused(hub: FakeHub, client: Client) -> None:
    v1, v2 = (
        Filler(909_000_000, b'{"', sha256="1" * 64),
        Filler(53_653_322, b'{"', sha256=catalog.find("dpo").sha256 or ""),
    )
    old = hub.put(DATASET, {"dpo.jsonl": v1})
    new = hub.put(DATASET, {"dpo.jsonl": v2})
    to_do = client.plan("dpo_v1", "dpo")
    assert [(item.want.name, item.path, item.commit) for item in to_do.items] == [
        ("dpo_v1.jsonl", "dpo.jsonl", old),
        ("dpo.jsonl", "dpo.jsonl", new),
    ]


def test_a_pinned_revision_is_asked_first(hub: FakeHub, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch, SMALL)
    hub.put(DATASET, {"dpo.jsonl": SMALL}, commit=catalog.T2T["hf"])
    hub.put(DATASET, {"dpo.jsonl": LARGE})
    assert client.one("dpo").commit == catalog.T2T["hf"]
    assert hub.count("api") == 1


def test_a_commit_known_by_its_first_digits_is_found(hub: FakeHub, client: Client) -> None:
    full = "6b952cc5" + "0" * 32
    hub.put(DATASET, {"sft_mini_512.jsonl": Filler(1_232_540_940, sha256="475039fa9b80ad36" + "0" * 48)}, commit=full)
    hub.put(DATASET, {"other.jsonl": SMALL}, remove=("sft_mini_512.jsonl",))
    (item,) = client.plan("sft_mini_512").items
    assert (item.commit, item.state, item.action) == (full, "missing", "get")


def test_the_listing_is_believed_over_the_catalog_and_it_says_so(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"rlaif.jsonl": SMALL})
    to_do = client.plan("rlaif")
    assert "the source is believed" in to_do.warnings[0]
    assert fetch.fetch(to_do)[0].status == "fetched"


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/evil", "a/../../evil", "C:evil", "a\\evil", "evil\0", "a//b", "./a", "", "mm.lock"]
)
def test_a_hostile_name_is_refused(hub: FakeHub, client: Client, name: str) -> None:
    hub.put(DATASET, {name: SMALL, "good.jsonl": SMALL})
    with pytest.raises(UsageError):
        client.plan(name)
    to_do = client.plan(everything=True)
    assert [item.want.name for item in to_do.items] == ["good.jsonl"]
    assert "refused" in to_do.warnings[0]
    assert is_safe(name) is (name == "mm.lock")


def test_unicode_and_nested_names_arrive(hub: FakeHub, client: Client) -> None:
    names = ("深/层/数据 1.jsonl", "a+b&c=#.jsonl", "sub/100%.jsonl")
    hub.put(DATASET, dict.fromkeys(names, SMALL))
    assert [outcome.status for outcome in client.all(*names)] == ["fetched"] * 3
    assert all(client.read(name) == SMALL for name in names)
    assert [outcome.status for outcome in client.all(*names)] == ["kept"] * 3


def test_any_dataset_of_the_hub_is_fetched_into_a_folder_of_its_name(hub: FakeHub, client: Client) -> None:
    files = {
        "data/train-0.jsonl": SMALL,
        "data/train-1.jsonl.gz": LARGE,
        "README.md": b"# x",
        ".git": b"",
        "x.bin": b"x",
    }
    hub.put("anna/talks-1.5", files)
    hub.put("bob/talks-1.5", {"data/train-0.jsonl": LARGE})
    outcomes = client.all("anna/talks-1.5", "bob/talks-1.5")
    names = [f"anna/talks-1.5/data/train-{end}" for end in ("0.jsonl", "1.jsonl.gz")]
    assert [outcome.name for outcome in outcomes] == [*names, "bob/talks-1.5/data/train-0.jsonl"]
    assert [client.read(outcome.name) for outcome in outcomes] == [SMALL, LARGE, LARGE]
    hub.forget()
    assert {outcome.status for outcome in client.all(*names)} == {"kept"} and not hub.requests
    assert {outcome.status for outcome in client.all(verify=True)} == {"kept"} and not hub.requests
    (chosen,) = client.all("anna/talks-1.5", file=("*.md",))
    assert (chosen.name, chosen.status) == ("anna/talks-1.5/README.md", "fetched")
    hub.put("anna/talks-1.5", {"data/train-0.jsonl": LARGE})
    assert client.one("anna/talks-1.5", file=("data/*0.jsonl",)).status == "kept"  # at the commit of mm.lock
    assert client.one("anna/talks-1.5", file=("data/*0.jsonl",), update=True).status == "fetched"
    assert client.read(names[0]) == LARGE


def test_a_dataset_that_is_not_there_and_files_that_it_lacks_are_said(hub: FakeHub, client: Client) -> None:
    hub.put("anna/talks", {"model.bin": SMALL})
    for name, options, message in (
        ("anna/none", {}, "anna/none"),
        ("anna/talks", {}, "no file with rows"),
        ("anna/talks", {"file": ("*.jsonl",)}, r"anna/talks has no \*.jsonl"),
    ):
        with pytest.raises(MMError, match=message):
            client.plan(name, **options)
    with pytest.raises(UsageError, match="--file needs a dataset"):
        client.plan(file=("a.jsonl",))
    with pytest.raises(UsageError, match="anna is no repository"):
        client.plan("anna", file=("a.jsonl",))
    with pytest.raises(UsageError, match="is no repository"):
        client.plan("anna/talks", source=str(client.out.parent))


def test_modelscope_needs_no_hub(hub: FakeHub, client: Client) -> None:
    files = {f"part_{number:03}.jsonl": SMALL for number in range(7)}
    hub.put(catalog.DATASET_REPO["modelscope"], files)
    hub.page = 3
    import mmdata.hub.sources

    mmdata.hub.sources.PAGE, before = 3, mmdata.hub.sources.PAGE
    try:
        hub.fail("modelscope", "status", status=403, skip=1)  # a page that is refused after the first worked
        outcomes = client.all("part_*.jsonl", source="modelscope")
    finally:
        mmdata.hub.sources.PAGE = before
    assert len(outcomes) == 7
    assert all(outcome.status == "fetched" for outcome in outcomes)
    assert hub.count("api") == hub.count("resolve") == 0


def test_a_folder_is_a_source_and_its_lock_vouches(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"a.jsonl": SMALL, "b.jsonl": SMALL})
    client.one("a.jsonl")
    hub.forget()
    other = client.out.with_name("other")
    assert client.one("a.jsonl", source=str(client.out), out=other).status == "fetched"
    assert read_lock(other).files["a.jsonl"].is_verified
    assert (other / "a.jsonl").read_bytes() == SMALL
    (client.out / "own.jsonl").write_bytes(SMALL)
    to_do = client.plan("own.jsonl", source=str(client.out), out=other)
    assert "unverified" in to_do.warnings[0]
    assert fetch.fetch(to_do)[0].status == "fetched"
    assert client.one("own.jsonl", source=str(client.out), out=other).status == "kept"
    assert hub.requests == []
    with pytest.raises(NotFoundError):
        client.one("absent.jsonl", source=str(client.out), out=other)


def test_a_plain_web_folder_is_a_source_and_the_catalog_vouches(
    hub: FakeHub, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    known(monkeypatch, LARGE)
    hub.put(DATASET, {"dpo.jsonl": LARGE})
    hub.fail("resolve", "drop", after=1_000_000, skip=1)
    outcome = client.one("dpo", source=f"{hub.url}/plain")
    assert outcome.received_bytes == len(LARGE)
    assert read_lock(client.out).files["dpo.jsonl"].is_verified


def test_xet_is_never_in_the_way(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"a.jsonl": SMALL})
    hub.repos[f"datasets/{DATASET}"].has_xet = True
    assert client.one("a.jsonl").failures == 0
    assert not any("xet" in request.path for request in hub.requests)


def test_one_bad_file_does_not_stop_the_rest(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"a.jsonl": SMALL, "b.jsonl": LARGE, "c.jsonl": SMALL, "rlaif.jsonl": SMALL})
    client.out.mkdir()
    (client.out / "a.jsonl").write_bytes(b"mine")
    hub.fail("resolve", "status", status=404, name="b.jsonl", times=-1)
    outcomes = client.all("a.jsonl", "b.jsonl", "sft_2048", "c.jsonl")
    assert [type(outcome.error) for outcome in outcomes] == [ConflictError, NotFoundError, NotFoundError, type(None)]
    assert client.read("c.jsonl") == SMALL


def test_globs_mean_the_catalogs_files_or_the_listings(hub: FakeHub, client: Client) -> None:
    hub.put(
        DATASET,
        {"x1.jsonl": SMALL, "x2.jsonl": SMALL, "y.jsonl": SMALL, "agent_rl.jsonl": SMALL, "agent_rl_math.jsonl": SMALL},
    )
    assert [item.want.name for item in client.plan("x*.jsonl").items] == ["x1.jsonl", "x2.jsonl"]
    assert [item.want.name for item in client.plan("agent_*").items] == ["agent_rl.jsonl", "agent_rl_math.jsonl"]
    with pytest.raises(NotFoundError, match="nothing fits"):
        client.plan("z*")


TOKENIZER = {"tokenizer.json": b'{"model": {}}', "tokenizer_config.json": b"{}", "model.bin": b"weights"}


def test_the_plain_command_brings_what_one_needs_to_begin(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {f"{key}.jsonl": SMALL for key in catalog.PRESETS["begin"]})
    hub.put("jingyaogong/minimind-3", {**TOKENIZER, "chat_template.jinja": b"{{ messages }}"}, kind="models")
    outcomes = client.all()
    assert [outcome.name for outcome in outcomes] == [
        "pretrain_t2t_mini.jsonl",
        "sft_t2t_mini.jsonl",
        "dpo.jsonl",
        "tokenizer/chat_template.jinja",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    ]
    assert all(outcome.status == "fetched" for outcome in outcomes)
    assert not (client.out / "tokenizer" / "model.bin").exists()
    hub.forget()
    assert {outcome.status for outcome in client.all()} == {"kept"}
    assert hub.requests == []


def test_another_tokenizer_replaces_the_first_only_when_told(hub: FakeHub, client: Client) -> None:
    hub.put("jingyaogong/minimind-3", TOKENIZER, kind="models")
    hub.put("jingyaogong/MiniMind2", {**TOKENIZER, "tokenizer.json": b'{"older": {}}'}, kind="models")
    client.all(tokenizer="minimind-2")
    assert client.read("tokenizer/tokenizer.json") == b'{"older": {}}'
    hub.put(DATASET, {"pretrain_t2t_mini.jsonl": SMALL, "sft_t2t_mini.jsonl": SMALL})
    to_do = client.plan(preset="zero")
    assert any("it stays" in warning for warning in to_do.warnings)
    with pytest.raises(ConflictError):
        client.plan(tokenizer="minimind-3")
    client.all(tokenizer="minimind-3", force=True)
    assert client.read("tokenizer/tokenizer.json") == TOKENIZER["tokenizer.json"]
    with pytest.raises(UsageError, match="no tokenizer"):
        client.plan(tokenizer="gpt")


def test_a_revision_of_the_data_is_not_asked_of_the_tokenizer(hub: FakeHub, client: Client) -> None:
    commit = hub.put(DATASET, {"pretrain_t2t_mini.jsonl": SMALL, "sft_t2t_mini.jsonl": SMALL})
    hub.put("jingyaogong/minimind-3", TOKENIZER, kind="models")
    outcomes = client.all(preset="zero", revision=commit)
    assert [outcome.status for outcome in outcomes] == ["fetched"] * 4


def test_data_arrives_even_where_the_tokenizer_is_missing(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"pretrain_t2t_mini.jsonl": SMALL, "sft_t2t_mini.jsonl": SMALL})
    outcomes = client.all(preset="zero")
    assert [outcome.status for outcome in outcomes] == ["fetched", "fetched", "failed", "failed"]
    assert isinstance(outcomes[-1].error, AccessError)


def test_a_small_file_in_git_is_verified_too(hub: FakeHub, client: Client) -> None:
    hub.put("jingyaogong/minimind-3", TOKENIZER, kind="models")
    hub.fail("resolve", "flip", after=3, name="tokenizer.json")
    first = client.all(tokenizer="minimind-3")[0]
    assert any("damaged" in note for note in first.warnings)
    assert read_lock(client.out).files["tokenizer/tokenizer.json"].is_verified


# --- F: what people and programs see ---------------------------------------------------------------------------------


@pytest.mark.parametrize("connections", [1, 4])
def test_progress_never_goes_back_not_even_across_a_resume(hub: FakeHub, client: Client, connections: int) -> None:
    hub.put(DATASET, {"a.jsonl": LARGE, "b.jsonl": SMALL})
    leave_a_part(client, 1_000_000)
    hub.fail("cdn", "flip", after=2_000_000)  # and the whole file again
    seen: list[tuple[int, int]] = []
    client.all(
        "a.jsonl",
        "b.jsonl",
        connections=connections,
        watch=lambda name, done, total, all_done, all_total: seen.append((all_done, all_total)),
    )
    done = [pair[0] for pair in seen]
    assert done[0] == 1_000_000
    assert done == sorted(done)
    assert seen[-1] == (len(LARGE) + len(SMALL), len(LARGE) + len(SMALL))


def test_the_overview_asks_nobody_and_knows_four_states(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"rlaif.jsonl": SMALL, "agent_rl.jsonl": LARGE, "own.jsonl": SMALL})
    client.all("rlaif", "own.jsonl")
    leave_a_part(client, 1_000_000, "agent_rl.jsonl")
    (client.out / "lora_medical.jsonl").write_bytes(b"{}")
    (client.out / "dpo.jsonl").write_bytes(b"{}")
    hub.forget()
    states = {row.name: row.state for row in fetch.overview(client.out)}
    assert hub.requests == []
    assert {states[name] for name in ("rlaif", "own.jsonl")} == {"have"}
    assert (states["agent_rl"], states["dpo"], states["pretrain_hq"], states["minimind-3"]) == (
        "part",
        "stale",
        "missing",
        "missing",
    )


def test_clean_removes_leftovers_and_nothing_else(hub: FakeHub, client: Client) -> None:
    hub.put(DATASET, {"a.jsonl": LARGE, "b.jsonl": SMALL})
    client.one("b.jsonl")
    leave_a_part(client, 1_000_000)
    num_files, num_bytes = fetch.clean(client.out)
    assert num_files == 2
    assert num_bytes > 1_000_000
    assert sorted(path.name for path in client.out.iterdir()) == ["b.jsonl", LOCK_NAME]


def test_endpoints_may_come_without_https(client: Client) -> None:
    from mmdata.hub.sources import open_source

    assert open_source("hf", "hf-mirror.com/", RetryPolicy()).endpoint == "https://hf-mirror.com"
    for source, endpoint in (("nowhere", None), ("https://a.example", "https://b.example"), ("hf", "https://")):
        with pytest.raises(UsageError):
            open_source(source, endpoint, RetryPolicy())


# --- arithmetic ------------------------------------------------------------------------------------------------------


def test_spans_and_gaps_make_up_the_file() -> None:
    assert merge([(5, 9), (0, 3), (3, 5), (20, 20), (8, 12)]) == [(0, 12)]
    assert missing([(0, 3), (5, 9)], 12) == [(3, 5), (9, 12)]
    assert missing([], 0) == []
    pieces = cut([(0, 10 << 20), (20 << 20, 21 << 20)], 4)
    assert merge(pieces) == [(0, 10 << 20), (20 << 20, 21 << 20)]
    assert len(pieces) == 11
    assert cut([(3, 5), (9, 12)], 1) == [(3, 5), (9, 12)]


def test_waits_grow_and_are_bounded() -> None:
    waits = Waits()
    retry = RetryPolicy(sleep=waits)
    for failures in range(10):
        retry.wait(failures)
    assert all(low < high for low, high in zip(waits.seconds[:4:2], waits.seconds[2:5:2], strict=False))
    assert max(waits.seconds) <= 30 * 1.25
    assert Repo(commits={"c": {}}).find("main") == "c"


# --- the command ----------------------------------------------------------------------------------------------------


@dataclass
class Ran:
    """What one `mm fetch` said."""

    code: int
    out: str
    err: str


@pytest.fixture
def mm(client: Client, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs `mm fetch …` in this process, without a terminal, in the folder above the client's."""
    import cli

    monkeypatch.chdir(client.out.parent)
    monkeypatch.setenv("HF_ENDPOINT", client.hub.url)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")

    def run(*arguments: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["mm", "fetch", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return Ran(int(ended.value.code or 0), said.out, said.err)

    return run


def test_the_command_says_what_it_will_do_and_what_it_did(hub: FakeHub, client: Client, mm: Callable[..., Ran]) -> None:
    hub.put(DATASET, {"a.jsonl": SMALL})
    ran = mm("a.jsonl")
    assert ran.code == 0
    assert ran.out == "fetched data/a.jsonl: 200 lines, 20.0 kB\n"
    for expected in (
        "missing  a.jsonl (20.0 kB, 20.0 kB to fetch)",
        "licence:",
        "free",
        "1 of 1 files are here",
        "then    mm pack",
    ):
        assert expected in ran.err
    assert "\x1b" not in ran.err  # plain lines without a terminal
    assert "\r" not in ran.err
    again = mm("a.jsonl")
    assert again.out.startswith("kept")
    assert "licence" not in again.err


def test_a_dry_run_sends_no_body(hub: FakeHub, client: Client, mm: Callable[..., Ran]) -> None:
    hub.put(DATASET, {"a.jsonl": SMALL})
    ran = mm("a.jsonl", "--dry-run", "--json")
    values = json.loads(ran.out)
    assert set(values) == {"out", "source", "files", "get_bytes", "free_bytes", "licence", "warnings"}
    assert values["files"][0] | {"commit": ""} == {
        "name": "a.jsonl",
        "stage": "",
        "state": "missing",
        "action": "get",
        "num_bytes": len(SMALL),
        "get_bytes": len(SMALL),
        "num_rows": None,
        "max_len": None,
        "revision": "main",
        "commit": "",
        "error": None,
    }
    assert hub.count("resolve") == 0
    assert not client.out.exists()


def test_json_gives_the_same_figures(hub: FakeHub, client: Client, mm: Callable[..., Ran]) -> None:
    commit = hub.put(DATASET, {"a.jsonl": SMALL})
    ran = mm("a.jsonl", "--json")
    values = json.loads(ran.out)
    (file,) = values["files"]
    assert ran.err == ""
    assert (file["status"], file["num_bytes"], file["num_lines"], file["commit"]) == (
        "fetched",
        len(SMALL),
        200,
        commit,
    )
    assert file["sha256"] == Bytes(SMALL).sha256
    assert mm("a.jsonl", "--quiet") == Ran(0, "", "")


def test_the_list_asks_nobody(hub: FakeHub, client: Client, mm: Callable[..., Ran]) -> None:
    ran = mm("--list")
    assert ran.code == 0
    assert "pretrain_t2t_mini" in ran.out
    rows = {row["name"]: row for row in json.loads(mm("--list", "--json").out)}
    assert rows["dpo"] | {"note": ""} == {
        "name": "dpo",
        "stage": "dpo",
        "state": "missing",
        "num_bytes": 53_653_322,
        "num_rows": 17_166,
        "max_len": 1024,
        "note": "",
    }
    assert mm("--clean").out.startswith("removed 0 files")
    assert hub.requests == []


def test_every_failure_has_its_code_and_one_hint(hub: FakeHub, client: Client, mm: Callable[..., Ran]) -> None:
    hub.put(DATASET, {"a.jsonl": SMALL, "huge.jsonl": Filler(1 << 50, sha256="0" * 64), "page.jsonl": LARGE})
    client.out.mkdir()
    (client.out / "a.jsonl").write_bytes(b"mine")
    hub.fail("resolve", "page", name="page.jsonl", times=-1)
    cases = {
        ("../evil",): 2,
        ("--preset", "none"): 2,
        ("--source", "nowhere"): 2,
        ("b.jsonl",): 3,
        ("page.jsonl",): 6,
        ("huge.jsonl",): 7,
        ("a.jsonl",): 8,
    }
    for arguments, code in cases.items():
        ran = mm(*arguments)
        assert ran.code == code, (arguments, ran)
        assert ran.err.count("error: ") == ran.err.count("fix: ") == 1, ran.err
    hub.repos[f"datasets/{DATASET}"].is_gated = True
    assert mm("huge.jsonl", "page.jsonl", "--out", "elsewhere").code == 7
    hub.faults.clear()
    assert mm("page.jsonl").code == 4
    assert mm("a.jsonl", "--endpoint", hub.url.replace("http:", "https:"), "--revision", "x").code == 5
    assert client.read("a.jsonl") == b"mine"


def test_more_than_a_gigabyte_is_asked_about_on_a_terminal_only(
    hub: FakeHub, client: Client, mm: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmdata.commands import fetch

    asked: list[str] = []
    monkeypatch.setattr(fetch.typer, "confirm", lambda text, **_: asked.append(text))
    assert fetch.agrees_to(10**12)
    monkeypatch.setattr(fetch.sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr(fetch.sys.stderr, "isatty", lambda: True, raising=False)
    assert fetch.agrees_to(10**9)
    assert not asked
    assert not fetch.agrees_to(10**9 + 1)
    assert asked == ["download 1.0 GB?"]


def test_progress_without_a_terminal_is_a_plain_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mmdata.commands import fetch

    now = [0.0]
    monkeypatch.setattr(fetch.time, "monotonic", lambda: now[0])
    with fetch.fetch_progress(quiet=False) as watch:
        assert watch is not None
        for second in range(25):
            now[0] = float(second)
            watch("a.jsonl", second * 1_000_000, 100_000_000, second * 1_000_000, 200_000_000)
    assert capsys.readouterr().err == (
        "a.jsonl: 2.0 MB of 100.0 MB (2.0%), 1.0 MB/s, 3 min left\n"
        "a.jsonl: 12.0 MB of 100.0 MB (12.0%), 1.0 MB/s, 3 min left\n"
        "a.jsonl: 22.0 MB of 100.0 MB (22.0%), 1.0 MB/s, 3 min left\n"
    )


def test_a_tokenizer_that_a_failed_run_left_in_part_is_completed(hub: FakeHub, client: Client) -> None:
    known = catalog.TOKENIZERS["minimind-3"].repo["hf"]
    files = dict.fromkeys(catalog.TOKENIZER_FILES, b"{}") | {"chat_template.jinja": b"{{ messages }}"}
    hub.put(known, files, kind="models")
    whole = client.all(tokenizer="minimind-3")
    assert {outcome.name for outcome in whole} == {f"tokenizer/{name}" for name in files}
    for lost in files:
        shutil.rmtree(client.out)
        planned = client.plan(tokenizer="minimind-3")
        items = tuple(
            replace(item, error=NetworkError("cut")) if item.want.name == f"tokenizer/{lost}" else item
            for item in planned.items
        )
        assert any(outcome.error for outcome in fetch.fetch(replace(planned, items=items)))
        client.all(tokenizer="minimind-3")
        assert {path.name for path in client.out.glob("tokenizer/[!.]*")} == {*files}, lost
