"""An S3 server on this machine (moto), which the commands reach as they reach any other: by the usual variables."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from command_line import Run, fine, refused
from waiting import wait_until

from mmdata.shards.manifest import every_file
from mmdata.shards.verify import verify

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}


def bucket() -> Any:
    import boto3

    return boto3.client("s3")


def started(port: int) -> Any:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
    server.start()
    return server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A server with the empty bucket "ours", for which this process has credentials."""
    from s3fs import S3FileSystem

    server = started(0)
    host, port = server.get_host_and_port()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        **KEYS,
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()
    urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
    bucket().create_bucket(Bucket="ours")
    yield server
    S3FileSystem.clear_instance_cache()
    server.stop()


def keys() -> list[str]:
    listed = bucket().list_objects_v2(Bucket="ours").get("Contents", [])
    return [each["Key"] for each in listed]


def brought(directory: Path) -> Path:
    for key in keys():
        (directory / key).parent.mkdir(parents=True, exist_ok=True)
        bucket().download_file("ours", key, str(directory / key))
    return directory / "ds"


def test_missing_credentials_and_a_mistyped_bucket_are_said_before_anything_is_packed(
    home: Path, mm: Run, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from s3fs import S3FileSystem

    pack = "pack data/pretrain_hq.jsonl --no-report --out"
    assert (
        "s3://ours-too/ds cannot be written: The specified bucket does not exist"
        in refused(mm(f"{pack} s3://ours-too/ds")).err
    )
    assert "s3://ours-too/a.jsonl: no such file" in refused(mm("pack s3://ours-too/a.jsonl")).err
    for name in KEYS:
        monkeypatch.delenv(name)
    S3FileSystem.clear_instance_cache()
    for command in (f"{pack} s3://ours/ds", "pack s3://ours/a.jsonl", "validate s3://ours/a.jsonl"):
        assert "Unable to locate credentials" in refused(mm(command)).err
    assert not (home / "shards").exists()
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    assert [each["Name"] for each in bucket().list_buckets()["Buckets"]] == ["ours"] and not keys()


def test_a_server_that_goes_away_while_a_dataset_is_sent_gets_the_rest_from_the_same_command(
    home: Path, mm: Run, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from s3fs import S3FileSystem

    bucket().upload_file("data/pretrain_hq.jsonl", "ours", "rows.jsonl")
    sent: list[str] = []
    real = S3FileSystem.put_file

    def put_file(self: S3FileSystem, source: str, target: str, **more: Any) -> Any:
        if len(sent) == 5:
            server.stop()
        sent.append(target)
        return real(self, source, target, **more)

    monkeypatch.setattr(S3FileSystem, "put_file", put_file)
    command = "pack s3://ours/rows.jsonl --part-size 2000 --workers 1 --out s3://ours/ds"
    assert "s3://ours/ds cannot be written: " in refused(mm(command)).err
    assert verify(home / "shards" / "ds") == [] and len(sent) == 6
    again = started(int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2]))
    try:
        there = len(keys()) - 1
        assert there == 5 and "ds/manifest.json" not in keys()
        sent.clear()
        fine(mm(command))
        assert len(sent) == len(every_file(home / "shards" / "ds")) - there and sent[-1].endswith("manifest.json")
        assert verify(brought(tmp_path / "back")) == []
    finally:
        again.stop()


def test_a_command_that_is_killed_while_it_sends_goes_on_where_it_was(
    home: Path, mm: Run, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = "pack data/pretrain_hq.jsonl --part-size 500 --workers 1 --out s3://ours/ds"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "cli.py"), *command.split()], cwd=home, stderr=subprocess.DEVNULL
    )
    wait_until(lambda: len(keys()) > 10 or process.poll() is not None)
    process.kill()
    process.wait()
    there = set(keys())
    assert 10 < len(there) < len(every_file(home / "shards" / "ds")) and "ds/manifest.json" not in there
    fine(mm(command))
    assert verify(brought(tmp_path / "back")) == []
