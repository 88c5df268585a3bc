"""Sampling settings of one answer, and the options of `mm serve` and `mm eval`. Does not import torch."""

from dataclasses import dataclass
from pathlib import Path

from mmdata.errors import UsageError
from mmdata.options import INT64, check, option, redeclared

GROUP = "Sampling"  # heading in --help
LOSS, QUESTIONS, HARNESS = "Loss on packed data", "Questions", "EleutherAI's harness"  # headings of mm eval


@dataclass(frozen=True, slots=True)
class Sampling:
    """Settings of one answer, greedy by default. Raise UsageError for a value out of range or an empty stop string.

    logprobs: n reports the log-probability of each generated token and the n most likely tokens with theirs, from the
    model's logits before any other setting is applied; None reports none. frequency_penalty, presence_penalty: as in
    OpenAI's API, subtracted from the logit of a token of the answer so far, the first once for each time it occurs.
    logit_bias: (token id, number to add to its logit) pairs. json_schema: what the answer must be JSON of, as a JSON
    schema in JSON; empty for any text (`sampling.Guide`).
    """

    temperature: float = option(0.0, "Sampling temperature; 0 always takes the most likely token.", GROUP, least=0)
    top_p: float = option(
        1.0, "Draw from the most likely tokens whose probabilities together reach this sum.", GROUP, above=0, most=1
    )
    top_k: int = option(0, "Draw from this many of the most likely tokens; 0: from all.", GROUP, least=0)
    min_p: float = option(
        0.0, "Draw from tokens with at least this share of the most likely token's probability.", GROUP, least=0, most=1
    )
    repetition_penalty: float = option(
        1.0, "Values above 1 make tokens that occurred already less likely.", GROUP, above=0
    )
    stop: tuple[str, ...] = option((), "End an answer at this text; may be repeated.", GROUP, metavar="TEXT")
    max_new_tokens: int = option(512, "Longest answer in tokens.", GROUP, least=1)
    seed: int = option(0, "Seed of the random draws; the same seed gives the same answers.", GROUP, **INT64)
    logprobs: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    json_schema: str = ""

    def __post_init__(self) -> None:
        check(self)
        if not all(self.stop):
            raise UsageError("a stop string must not be empty", "leave --stop out, or give it a text")
        if self.logprobs is not None and self.logprobs < 0:
            raise UsageError(f"logprobs {self.logprobs} must be at least 0", "leave it out for none")


@dataclass(frozen=True, slots=True)
class ChatSampling(Sampling):
    """`Sampling` with the defaults of `mm chat`: temperature 0.7 and top_p 0.9."""

    temperature: float = redeclared(Sampling, "temperature", default=0.7)
    top_p: float = redeclared(Sampling, "top_p", default=0.9)


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """The options of `mm serve`. origins: of web pages that may use the interface (CORS)."""

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0: every address of this machine.")
    port: int = option(8000, "Port to listen on; 0: a free one.", least=0, most=65535)
    api_key: str | None = option(None, "Key that clients must send.", envvar="MM_API_KEY")
    origins: tuple[str, ...] = option(
        (),
        "Origin of a web page that may use the interface, such as https://example.org; may be repeated; *: all.",
        flag="--cors",
        metavar="ORIGIN",
    )
    name: str | None = option(None, "Model name that clients see.", default_text="the run's")
    window: int = option(2048, "Largest number of tokens of a conversation and its answer.", least=16)
    max_tokens: int | None = option(
        None, "Longest answer in tokens.", least=1, default_text="what the window has room for"
    )
    max_rows: int = option(16, "Largest number of answers generated at once.", least=1)
    max_waiting: int = option(64, "Largest number of waiting requests; further ones are refused.", least=1)
    max_body: int = option(2**20, "Largest request body in bytes.", least=1024)
    timeout: float = option(600, "Longest time that one request may take, in seconds.", least=1)


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """The options of `mm eval`."""

    data: tuple[Path, ...] = option(
        (), "Packed dataset; may be repeated.", LOSS, metavar="DIR", default_text="the run's own"
    )
    split: str = option("val", "Split of the datasets.", LOSS, choices=("val", "train", "all"))
    per_sequence: Path | None = option(
        None, "Write file, line, tokens and nll of each sequence, as JSON lines or .parquet.", LOSS, metavar="FILE"
    )
    noisiest: int = option(
        0, "Show this many rows that the model finds least likely: those of highest loss per token.", LOSS, least=0
    )
    questions: Path | None = option(
        None,
        "jsonl file of questions and answers; answers are compared word for word, ignoring case.",
        QUESTIONS,
        metavar="FILE",
    )
    choices: Path | None = option(
        None,
        "jsonl file of questions, choices and answers; the model's answer is the most likely choice.",
        QUESTIONS,
        metavar="FILE",
    )
    plain: bool = option(
        False, "Ask questions without the chat template.", QUESTIONS, default_text="only for pretrain runs"
    )
    max_new_tokens: int = option(64, "With --questions: longest answer in tokens.", QUESTIONS, least=1)
    lm_eval: str | None = option(
        None, "Tasks to run, separated by commas: ceval-valid, cmmlu, arc_easy, ...", HARNESS, metavar="TASKS"
    )
    limit: int | None = option(
        None, "With --lm-eval: number of questions per task.", HARNESS, least=1, default_text="all"
    )

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that are measured."""
        return ("train", "val") if self.split == "all" else (self.split,)

    @property
    def has_task(self) -> bool:
        """Whether anything but the loss on packed data is asked for."""
        return bool(self.questions or self.choices or self.lm_eval)
