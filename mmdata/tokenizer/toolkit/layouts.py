"""Chat templates and added tokens for `mm tokenizer train`. `minimind2` and `minimind3` (templates/*.jinja, written
anew) render every role, tool and option exactly as MiniMind's templates of October 2025 and of 2026; `chatml` writes
<|im_start|> and the role before each message, and <|im_end|> after it."""

from dataclasses import dataclass
from pathlib import Path

from mmdata.tokenizer.chat_template import CHATML

PAD, BOS, EOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


@dataclass(frozen=True, slots=True)
class Layout:
    """A chat template and its added tokens in the order of their ids, from 0 on: `control`, which a user's text never
    becomes, then `plain`, single tokens wherever their text occurs."""

    name: str
    control: tuple[str, ...] = (PAD, BOS, EOS)
    plain: tuple[str, ...] = ()

    @property
    def template(self) -> str:
        """The chat template as it is written to tokenizer_config.json (Jinja)."""
        if self.name == "chatml":
            return CHATML
        return (Path(__file__).parent / "templates" / f"{self.name}.jinja").read_text(encoding="utf-8")

    @property
    def tokens(self) -> tuple[str, ...]:
        """All added tokens, in the order of their ids."""
        return self.control + self.plain


_MEDIA = (
    *(f"<|{what}_{end}|>" for what in ("object_ref", "box", "quad", "vision") for end in ("start", "end")),
    *(f"<|{what}_pad|>" for what in ("vision", "image", "video")),
    *(f"<|audio_{what}|>" for what in ("start", "end", "pad")),
    *(f"<tts_{what}>" for what in ("pad", "text_bos", "text_eod", "text_bos_single")),
)
_TAGS = tuple(f"<{slash}{tag}>" for tag in ("tool_call", "tool_response", "think") for slash in ("", "/"))
_RESERVED = tuple(f"<|buffer{number}|>" for number in range(1, 10))

LAYOUTS = {
    "chatml": Layout("chatml"),
    "minimind2": Layout("minimind2"),
    "minimind3": Layout("minimind3", (PAD, BOS, EOS, *_MEDIA), _TAGS + _RESERVED),
}
