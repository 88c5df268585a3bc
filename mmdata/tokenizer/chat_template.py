"""The chat templates in the files of a tokenizer, and the changes of `mm pack` to them: a token after each answer, a
fixed date, and a generation prompt. A changed template is part of the dataset's tokenizer, and so of runs and exports.
A change is a line in front of the template, ending with a newline, which jinja2 drops after a tag, or an expression
after it."""

import datetime
import json
import re
from collections.abc import Callable, Mapping

from mmdata.errors import TokenizerError, UsageError
from mmdata.io.records import JsonObject

FILE, FOLDER = "chat_template.jinja", "additional_chat_templates"  # where transformers stores templates
DEFAULT, TOOL_USE = "default", "tool_use"  # the names that transformers chooses from; the second for rows with tools
DATE = "2024-07-26"  # default of --date, and the date that Llama 3.1's template writes where there is no clock

# The chat template for tokenizers that have none: <|im_start|> and role before each message, <|im_end|> after it.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_END_OF_TURN = (
    "{%%- set mm = namespace(messages=[]) -%%}{%%- for m in messages -%%}"
    "{%%- if m.role == 'assistant' and m.content is string and not m.tool_calls -%%}"
    "{%%- set mm.messages = mm.messages + [dict(m, content=m.content + %s)] -%%}"
    "{%%- else -%%}{%%- set mm.messages = mm.messages + [m] -%%}{%%- endif -%%}{%%- endfor -%%}"
    "{%%- set messages = mm.messages %%}\n"
)
_AFTER_CALLS = "{{ %s if messages[-1].role == 'assistant' and messages[-1].tool_calls else '' }}"
_DATE = "{%%- macro strftime_now(format) -%%}{{ %s[format] }}{%%- endmacro %%}\n"
_DEFINITION = "macro strftime_now"
_CALL = re.compile(r"\bstrftime_now\s*\(\s*(?:\"([^\"]*)\"|'([^']*)')?")


def templates_in(config: JsonObject, files: Mapping[str, bytes]) -> dict[str, str]:
    """Return the chat templates by name, empty for none; a tokenizer with a single template has it as DEFAULT. As in
    transformers, chat_template.jinja and the files of FOLDER replace those in tokenizer_config.json. config: the
    content of tokenizer_config.json. files: contents by path in the tokenizer's directory."""
    if FILE in files:
        names = {name.removeprefix(f"{FOLDER}/"): name for name in files if name.startswith(f"{FOLDER}/")}
        found = {DEFAULT: FILE} | {name.removesuffix(".jinja"): path for name, path in sorted(names.items())}
        return {name: files[path].decode("utf-8", errors="replace") for name, path in found.items()}
    template = config.get("chat_template") or {}
    if isinstance(template, list):
        pairs = [(item.get("name"), item.get("template")) for item in template if isinstance(item, dict)]
        return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}
    return {DEFAULT: template} if isinstance(template, str) else {}


def changed(config: JsonObject, files: Mapping[str, bytes], change: Callable[[str], str]) -> dict[str, bytes]:
    """Return a copy of a tokenizer's files with `change` applied to every chat template; see `templates_in`."""
    copy = {
        name: change(content.decode("utf-8", errors="replace")).encode() if name.endswith(".jinja") else content
        for name, content in files.items()
    }
    if FILE not in files and (texts := templates_in(config, files)):
        new = {name: change(text) for name, text in texts.items()}
        is_list = isinstance(config.get("chat_template"), list)
        template = [{"name": name, "template": text} for name, text in new.items()] if is_list else new[DEFAULT]
        config = {**config, "chat_template": template}
        copy["tokenizer_config.json"] = json.dumps(config, ensure_ascii=False, indent=2).encode()
    return copy


def with_end_of_turn(template: str, token: str) -> str:
    """Return a template that writes `token` after each answer, after tool calls only if they end the conversation: the
    header of a tool's answer ends others."""
    line, after_calls = (part % json.dumps(token, ensure_ascii=False) for part in (_END_OF_TURN, _AFTER_CALLS))
    if line in template:
        return template
    return line + (_appended(template, after_calls) if "tool_calls" in template else template)


def with_generation_prompt(template: str, header: str) -> str:
    """Return a template that writes `header`, the beginning of an answer, at the end of prompts, if it wrote none."""
    if "add_generation_prompt" in template:
        return template
    text = json.dumps(header, ensure_ascii=False)
    return _appended(template, "{{ " + text + " if add_generation_prompt else '' }}")


def _appended(template: str, expression: str) -> str:
    """Return a template with an expression after it. jinja2 drops one newline at the end of a template."""
    return template.removesuffix("\n") + expression


def asks_for_date(template: str) -> bool:
    """Return whether a template uses `strftime_now`, the function of chat templates that formats the current time."""
    return "strftime_now" in template and _DEFINITION not in template


def with_date(template: str, date: str) -> str:
    """Return a template in which `strftime_now` formats the beginning of the day `date` (YYYY-MM-DD; else UsageError).
    Raises TokenizerError if a format is not a constant string."""
    if not asks_for_date(template):
        return template
    try:
        day = datetime.datetime.strptime(date, "%Y-%m-%d")
    except ValueError:
        raise UsageError(f"--date {date} is no date", "--date YYYY-MM-DD") from None
    formats = {match[1] or match[2] for match in _CALL.finditer(template)}
    if None in formats:
        raise TokenizerError(
            "the chat template computes the format of the date, so that it cannot be fixed",
            "write the formats of strftime_now in the template as constant strings",
        )
    return _DATE % json.dumps({format: day.strftime(format) for format in sorted(map(str, formats))}) + template
