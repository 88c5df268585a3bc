"""Chat templates and control tokens that `mm tokenizer train` can give a new tokenizer.

`minimind2` and `minimind3` render every role, tool and option exactly as the templates of MiniMind's tokenizers of October
2025 and of 2026 do; they are written anew here. `chatml` writes a header before each message and nothing else.
"""

from dataclasses import dataclass

from mmdata.tokenizer.tokenizer import CHATML

PAD, BOS, EOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


@dataclass(frozen=True, slots=True)
class Layout:
    """A chat template and its added tokens in the order of their ids, from 0 on: control tokens first, then plain ones.

    Only templates write control tokens. Plain ones are single tokens wherever their text occurs.
    """

    template: str
    control: tuple[str, ...]
    plain: tuple[str, ...] = ()

    @property
    def tokens(self) -> tuple[str, ...]:
        return self.control + self.plain


# The system block that both of MiniMind's templates begin with: the first message, if it is a system message, and the tools.
_TOOLS_HEAD = (
    "# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n"
    "You are provided with function signatures within <tools></tools> XML tags:\\n<tools>"
)
_TOOLS_TAIL = (
    "\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\\n<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n'
    "</tool_call><|im_end|>\\n"
)
_OPENING = (
    """
{%- set told = messages[0].role == 'system' %}
{%- if tools %}
  {{- '<|im_start|>system\\n' }}
  {%- if told %}{{- messages[0].content + '\\n\\n' }}{% endif %}
  {{- '"""
    + _TOOLS_HEAD
    + """' }}
  {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{% endfor %}
  {{- '"""
    + _TOOLS_TAIL
    + """' }}
{%- elif told %}
  {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
DEFAULT
{%- endif %}"""
)
# One block for each message; consecutive tool messages share one user block.
_MESSAGES = """
{%- for message in messages %}
  {%- set role = message.role %}
  {%- set content = message.content if message.content is string else '' %}
  {%- if role == 'user' or (role == 'system' and not loop.first) %}
    {{- '<|im_start|>' + role + '\\n' + content + '<|im_end|>\\n' }}
  {%- elif role == 'assistant' %}
ANSWER
    {%- for call in message.tool_calls or [] %}
      {%- if content or not loop.first %}{{- '\\n' }}{% endif %}
      {%- set call = call.function or call %}
      {{- '<tool_call>\\n{"name": "' }}{{- call.name }}{{- '", "arguments": ' }}
      {%- if call.arguments is string %}{{- call.arguments }}{% else %}{{- call.arguments | tojson }}{% endif %}
      {{- '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
  {%- elif role == 'tool' %}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
    {{- '\\n<tool_response>\\n' }}{{- content }}{{- '\\n</tool_response>' }}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{% endif %}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|im_start|>assistant\\n' }}
PROMPT
{%- endif %}"""

_DEFAULT_SYSTEM = "{%- else %}\n  {{- '<|im_start|>system\\nYou are a helpful assistant<|im_end|>\\n' }}"
_ANSWER_2 = "    {{- '<|im_start|>assistant\\n' + content }}"
_PROMPT_2 = (
    "  {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
)
# Reasoning is in its own field or inside the content; every answer gets a think block, if need be an empty one.
_ANSWER_3 = """
    {%- set thought = '' %}
    {%- if message.reasoning_content is string %}
      {%- set thought = message.reasoning_content %}
    {%- elif '</think>' in content %}
      {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
      {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}"""
_PROMPT_3 = (
    "  {%- if open_thinking is defined and open_thinking is true %}{{- '<think>\\n' }}"
    "{% else %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
)


def _template(*, default: str, answer: str, prompt: str) -> str:
    filled = _OPENING.replace("DEFAULT", default) + _MESSAGES.replace("ANSWER", answer).replace("PROMPT", prompt)
    return "\n".join(line for line in filled.splitlines() if line.strip())


_MEDIA = (
    *(f"<|{what}_{end}|>" for what in ("object_ref", "box", "quad", "vision") for end in ("start", "end")),
    *(f"<|{what}_pad|>" for what in ("vision", "image", "video")),
    *(f"<|audio_{what}|>" for what in ("start", "end", "pad")),
    *(f"<tts_{what}>" for what in ("pad", "text_bos", "text_eod", "text_bos_single")),
)
_TAGS = tuple(f"<{slash}{tag}>" for tag in ("tool_call", "tool_response", "think") for slash in ("", "/"))
_RESERVED = tuple(f"<|buffer{number}|>" for number in range(1, 10))

LAYOUTS = {
    "chatml": Layout(CHATML, (PAD, BOS, EOS)),
    "minimind2": Layout(
        _template(default=_DEFAULT_SYSTEM, answer=_ANSWER_2, prompt=_PROMPT_2), (PAD, BOS, EOS)
    ),
    "minimind3": Layout(
        _template(default="", answer=_ANSWER_3, prompt=_PROMPT_3), (PAD, BOS, EOS, *_MEDIA), _TAGS + _RESERVED
    ),
}  # fmt: skip
