"""How fast rows are validated on one core: `python tests/bench/validate.py [MB]`. Makes its own seeded conversations.

Prints MB/s of validate() and of bare json.loads on the same lines, for short (about 500 bytes) and long rows, and the
memory that the pass adds, which must not grow with the file.
"""

import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

TEXT = "the of and to in is 一 是 不 了 我 有 这 个 model train data token 人 工 智 能 - 1. code: x = y + 1"
WORDS = TEXT.split()


def write_rows(path: Path, num_bytes: int, words_per_message: int) -> None:
    """Conversations of two to six messages until the file has num_bytes."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < num_bytes:
            said = [
                {"role": role, "content": " ".join(rng.choices(WORDS, k=rng.randint(1, 2 * words_per_message)))}
                for role in ("user", "assistant") * rng.choice((1, 1, 1, 2, 3))
            ]
            file.write(json.dumps({"conversations": said}, ensure_ascii=False) + "\n")


def main() -> None:
    from mmdata.encode.validate import validate

    megabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 40
    with tempfile.TemporaryDirectory() as scratch:
        for name, words in (("short", 40), ("long", 400)):
            path = Path(scratch) / f"{name}.jsonl"
            write_rows(path, int(megabytes * 1e6), words)
            size = path.stat().st_size / 1e6
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            start = time.process_time()
            with path.open("rb") as file:
                for line in file:
                    json.loads(line)
            bare = time.process_time() - start
            start = time.process_time()
            found = validate(path)
            taken = time.process_time() - start
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            assert found.num_good == found.num_rows, found.reasons
            print(
                f"{name}: {size:.0f} MB, {found.num_rows:,} rows of {1e6 * size / found.num_rows:.0f} bytes: "
                f"validate {size / taken:.0f} MB/s, json.loads {size / bare:.0f} MB/s "
                f"({bare / taken:.0%} of its speed), memory +{grown:.0f} MiB"
            )


if __name__ == "__main__":
    main()
