"""The dataset files and tokenizers that `mm fetch` knows, with their sizes, checksums, rows and revisions. The figures
come from projects that pinned the same revisions and from the upstream READMEs; None: nobody published one. Where the
source lists other figures, `fetch` uses those and prints a warning."""

import difflib
import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, field

DATASET_REPO = {"hf": "jingyaogong/minimind_dataset", "modelscope": "gongjy/minimind_dataset"}
LICENCE = (
    "Apache-2.0 and CC-BY-NC-2.0 on the Hub's card, CC-BY-NC-4.0 reported from ModelScope's: "
    "treat the data as non-commercial"
)

# T2T: the dataset's main branch in 2026, with the t2t files. OLD: a commit after 2025-10-26 that has the files of 2025.
T2T = {"hf": "312afb4f76391145c6902f765bb51691c09a12f5", "modelscope": "74aad49fa4443e7ed640d44bc4e9c7d1fe71ada5"}
OLD = {"hf": "84983ed4dec7836d240577760c1d6be5d4cabcf9"}
FEBRUARY = {"hf": "9f9f5d75020d4e36f9af87d303a3690ceba6d5c6"}  # 2025-02, when the jsonl files first appeared

DOCUMENT, CONVERSATION, PAIR = ("text",), ("conversations",), ("chosen", "rejected")


@dataclass(frozen=True, slots=True)
class KnownFile:
    """A jsonl file of the dataset repository. `sha256` and the revisions may be abbreviated to their first digits."""

    key: str  # what users type
    stage: str  # training stage that the file is for
    fields: tuple[str, ...]  # keys that every row has
    repo_path: str = ""  # path in the repository; empty if it is the same as `name`
    num_bytes: int | None = None  # exact
    about_bytes: int | None = None  # rounded, from a README
    num_rows: int | None = None
    sha256: str | None = None
    max_len: int | None = None  # in tokens, as upstream recommends for training
    revisions: dict[str, str] = field(default_factory=dict)  # source (hf, modelscope) -> commit that has the file
    note: str = ""

    @property
    def name(self) -> str:
        """The local file name; it differs from the path, because two different published files are named dpo.jsonl."""
        return f"{self.key}.jsonl"

    @property
    def path(self) -> str:
        return self.repo_path or self.name


@dataclass(frozen=True, slots=True)
class KnownTokenizer:
    """A tokenizer in a model repository. `revision` is a commit on the Hugging Face Hub; None means the main branch."""

    name: str
    repo: dict[str, str]  # source (hf, modelscope) -> repository id
    revision: str | None
    note: str


FILES = (
    KnownFile("pretrain_t2t_mini", "pretrain", DOCUMENT, revisions=T2T, num_bytes=1_241_043_656,
              num_rows=1_270_238, max_len=768,
              sha256="6dd6716c84ab36897bdbfc7f88e04f4441c48c1ab7ecee88ce0b0e7d4685560c"),
    KnownFile("pretrain_t2t", "pretrain", DOCUMENT, revisions=T2T, num_bytes=8_275_074_893, num_rows=8_468_827,
              max_len=380, sha256="31efc9a6fa7430769c0e78cde1c8ec0273ac7bbad20614c0ee58bccef327cc9d",
              note="the upstream README says 10 GB; the published bytes are 8.3 GB"),
    KnownFile("sft_t2t_mini", "sft", CONVERSATION, revisions=T2T, num_bytes=1_739_201_170, num_rows=905_718,
              max_len=768, sha256="abb1e76b2056e14728beb78db96b7b3c491a0bef1ed3e34a9b381b28f29fa518"),
    KnownFile("sft_t2t", "sft", CONVERSATION, revisions=T2T, num_bytes=14_096_018_369,
              sha256="b5dab3d590b3b4ae3bfeec891ba0c76b0de5acbec4f4b078dcd3912eb1735c79"),
    KnownFile("dpo", "dpo", PAIR, revisions=T2T, num_bytes=53_653_322, num_rows=17_166, max_len=1024,
              sha256="ee934a8a455ccc99d1334d63e1254dd1d64f497fd067cfcbb71e3043f5b46768",
              note="the dpo.jsonl published since 2025-10-26; the one before it is dpo_v1"),
    KnownFile("rlaif", "rl", CONVERSATION, revisions=T2T, num_bytes=23_754_740, num_rows=19_502, max_len=768,
              sha256="8c6634db971fa34b0217f7db4f7c30684f57d20bbb771eb717f1b5aeacb089ba"),
    KnownFile("agent_rl", "rl", CONVERSATION, revisions=T2T, num_bytes=82_036_930, num_rows=39_988, max_len=1024,
              sha256="cb96bcc8096aecc5eccaab858f75d5ace1dc22da2302c2230457e29744a761ab"),
    KnownFile("agent_rl_math", "rl", CONVERSATION, revisions=T2T, num_bytes=18_372_683, max_len=1024,
              sha256="5f2f6f8e90d8d5c698561b7540ec8b4bc8cb0a568e329cd4e7fc4d378ccd60cb"),
    KnownFile("pretrain_hq", "pretrain", DOCUMENT, revisions=OLD, num_bytes=1_669_750_047, num_rows=1_413_103,
              max_len=320, sha256="9801b0d2210c61c2e4bc130f6dc4b3c870698a88d04af8f103c23dd5f0ce2440",
              note="gone from main; rows hold several documents between <s> and </s>, which `mm pack` takes apart"),
    KnownFile("sft_512", "sft", CONVERSATION, revisions=OLD, num_bytes=7_531_517_862, max_len=350,
              sha256="053b7d09574e48a86232e929211434ff9e5016c6ed13312e63687dd52edcbebf",
              note="gone from main; 512 counts characters, not tokens"),
    KnownFile("sft_mini_512", "sft", CONVERSATION, revisions={"hf": "6b952cc5"}, num_bytes=1_232_540_940,
              max_len=340, sha256="475039fa9b80ad36", note="gone from main; 512 counts characters, not tokens"),
    KnownFile("sft_1024", "sft", CONVERSATION, about_bytes=5_600_000_000, max_len=650,
              note="gone from main, found through the history; all its rows are in sft_2048 too"),
    KnownFile("sft_2048", "sft", CONVERSATION, about_bytes=9_000_000_000, max_len=1400,
              note="gone from main, found through the history; 2048 counts characters"),
    KnownFile("dpo_v1", "dpo", PAIR, repo_path="dpo.jsonl", about_bytes=909_000_000, max_len=1024,
              note="the dpo.jsonl of February to October 2025, about 200k English pairs; found through the history"),
    KnownFile("r1_mix_1024", "sft", CONVERSATION, about_bytes=340_000_000, max_len=720,
              note="found through the history"),
    KnownFile("lora_identity", "lora", CONVERSATION, revisions=FEBRUARY, about_bytes=22_800, max_len=340),
    KnownFile("lora_medical", "lora", CONVERSATION, revisions=FEBRUARY, about_bytes=34_000_000, num_rows=25_276,
              max_len=340, sha256="abf66d2bf14bf5704f6c9f1a166061f55d95e4dfd03c29a3c33d085ccaca593f"),
    KnownFile("lora_exam", "lora", CONVERSATION,
              note="holds test questions of C-Eval and MMLU: a model trained on it cannot be judged by them"),
    KnownFile("tokenizer_train", "tokenizer", DOCUMENT, revisions=FEBRUARY, about_bytes=1_030_000_000,
              num_rows=600_000, note="gone from main since 2025-10-26"),
    KnownFile("rlaif_mini", "rl", CONVERSATION, repo_path="rlaif-mini.jsonl", about_bytes=1_000_000, max_len=66,
              note="gone from main since 2026-03; found through the history"),
)  # fmt: skip

# Names of files with rows, in any repository, without the suffix of a compression.
DATA_FILES = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".feather", ".csv", ".tsv", ".txt")
PACKED = (".gz", ".zst", ".xz", ".bz2", ".zip")

PRESETS = {
    "begin": ("pretrain_t2t_mini", "sft_t2t_mini", "dpo"),  # what `mm fetch` without names downloads
    "zero": ("pretrain_t2t_mini", "sft_t2t_mini"),
    "full": ("pretrain_t2t", "sft_t2t", "dpo", "rlaif", "agent_rl"),
    "seed": ("pretrain_hq", "sft_512", "sft_1024", "sft_2048", "dpo_v1"),  # what the walkthroughs of 2025 train on
    "zero-seed": ("pretrain_hq", "sft_mini_512"),
}
PRESET_TOKENIZER = {preset: "minimind-2" if "seed" in preset else "minimind-3" for preset in PRESETS}

# The repository names are from public pages; their files were not opened, so `fetch` relies on the source's listing.
_TOKENIZERS = (
    KnownTokenizer("minimind-3", {"hf": "jingyaogong/minimind-3", "modelscope": "gongjy/minimind-3"}, None,
                   "for the t2t files: tools, tool calls, thinking"),
    KnownTokenizer("minimind-2", {"hf": "jingyaogong/MiniMind2", "modelscope": "gongjy/MiniMind2"},
                   "d18103e50a735dfb8ab801183be734bc635dfc22", "for the files of 2025: <|im_start|> and <|im_end|>"),
    KnownTokenizer("minimind-2-seed", {"hf": "jingyaogong/MiniMind2-R1", "modelscope": "gongjy/MiniMind2-R1"}, "4399eb0",
                   "for weights of early 2025: <s> and </s> (revision from a public page, unverified)"),
)  # fmt: skip
TOKENIZERS = {tokenizer.name: tokenizer for tokenizer in _TOKENIZERS}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
TOKENIZER_EXTRAS = ("chat_template.jinja",)  # newer repositories have the template in a file of its own


def find(name: str) -> KnownFile | None:
    """Return the known file whose key, local name or repository path is `name` (tried in this order); else None."""
    by_name = next((known for known in FILES if name in (known.key, known.name)), None)
    return by_name or next((known for known in FILES if name == known.path), None)


def find_glob(pattern: str) -> list[KnownFile]:
    """Return the known files whose key or local name matches a shell pattern, case-sensitively, in catalog order."""
    return [f for f in FILES if fnmatch.fnmatchcase(f.key, pattern) or fnmatch.fnmatchcase(f.name, pattern)]


def holds_rows(path: str) -> bool:
    """Return whether a file of this name is one that `mm pack` reads: by its suffix, and not a hidden or metadata file."""
    parts = path.lower().split("/")
    name = next((parts[-1].removesuffix(end) for end in PACKED if parts[-1].endswith(end)), parts[-1])
    is_metadata = any(part.startswith(".") for part in parts) or name in ("dataset_infos.json", "state.json")
    return name.endswith(DATA_FILES) and not is_metadata


def licence_of(repos: Iterable[str]) -> str:
    """Return what is known of the licences of dataset repositories."""
    others = sorted({repo for repo in repos if repo and repo not in DATASET_REPO.values()})
    known = [LICENCE] if not others or len(others) < len({*repos} - {""}) else []
    return "; ".join([*known, *(f"see the page of {repo}" for repo in others)])


def nearest(name: str, others: tuple[str, ...] = ()) -> list[str]:
    """Return up to three names similar to `name`, among the catalog's keys and `others`, most similar first."""
    return difflib.get_close_matches(name.removesuffix(".jsonl"), [*(f.key for f in FILES), *others], n=3, cutoff=0.5)


def fits(known: KnownFile, num_bytes: int | None, sha256: str | None) -> bool:
    """Return whether the size and sha256 that a source lists (None: not listed) can belong to this known file. If both
    checksums are known, they decide; otherwise an exact known size must be equal, and a rounded one may differ by a
    tenth."""
    if known.sha256 and sha256:
        return sha256.startswith(known.sha256)
    if known.num_bytes and num_bytes is not None:
        return num_bytes == known.num_bytes
    if known.about_bytes and num_bytes is not None:
        return abs(num_bytes - known.about_bytes) <= known.about_bytes / 10
    return True


def is_namesake(known: KnownFile, num_bytes: int | None, sha256: str | None) -> bool:
    """Return whether the file listed at `known.path` is probably another known file with that path, as several versions
    of dpo.jsonl were: the listed size and checksum do not fit `known`, and they fit the other file or the exact size of
    `known` is not recorded."""
    others = [other for other in FILES if other.path == known.path and other.key != known.key]
    if not others or fits(known, num_bytes, sha256):
        return False
    return known.num_bytes is None or any(fits(other, num_bytes, sha256) for other in others)
