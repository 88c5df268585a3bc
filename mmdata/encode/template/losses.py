"""What a chat template leaves out of a conversation, and what that means: strings that a rendering does not show are
losses, for which a row is set aside (`rows.LOST`), or left out on purpose, which is only counted (`rows.LEFT_OUT`)."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jinja2 import nodes

from mmdata.encode.rows import EARLIER_REASONING, TOOL_REFERENCES, Message
from mmdata.encode.template.traced import SourceText

SEARCHES = frozenset({"split", "startswith", "endswith", "replace"})  # methods that search a text for a string
_SCHEMA_WORDS = frozenset({"type", "required", "format", "title", "$schema", "$ref"})  # keys of JSON schemas


class Loss(NamedTuple):
    """A part of a conversation that the template does not write. reason: of `rows.LOST` or `rows.LEFT_OUT`. detail:
    what is missing, where."""

    reason: str
    detail: str


def loss_of(
    source: SourceText, part: str, messages: Sequence[Message], writes_last_reasoning: Mapping[str, bool]
) -> Loss | None:
    """Return what it means that a part of a string is not written; None if the string says nothing that is not
    expressed otherwise, such as the type of a tool's parameter. writes_last_reasoning: whether the template writes the
    reasoning of a last answer, so that it leaves out that of earlier ones on purpose, as Qwen3's does."""
    key, quoted = source.path[-1] if source.path else "", repr(part.strip()[:40])
    if source.field == "tools":
        is_said = key == "properties" if source.is_key else key not in _SCHEMA_WORDS
        is_said |= source.path == ("type",) and source.text != "function"  # such as OpenAI's own tools
        return Loss("tools lost", quoted) if is_said else None
    message, where = messages[source.message], f"message {source.message + 1}"
    if source.field == "tool_calls":
        if key == "id" and not source.is_key:
            return Loss(TOOL_REFERENCES, where)
        is_said = "arguments" in source.path or not (source.is_key or key == "type")
        return Loss("tool calls lost", f"{where}: {quoted}") if is_said else None
    if source.field in ("name", "tool_call_id"):
        if _is_told_by_order(messages, source.message, source.field):
            return Loss(TOOL_REFERENCES, where)
        return Loss("name lost" if source.field == "name" else "tool calls lost", f"{where}: {quoted}")
    is_reasoning = source.field != "content" or (message.role == "assistant" and part.rstrip().endswith("</think>"))
    is_earlier = message.role == "assistant" and source.message < len(messages) - 1
    if is_reasoning and is_earlier and writes_last_reasoning[source.field]:
        return Loss(EARLIER_REASONING, where)
    return Loss("reasoning lost" if is_reasoning else "content lost", f"{where} ({message.role}): {quoted}")


def _is_told_by_order(messages: Sequence[Message], index: int, field: str) -> bool:
    """Return whether the id or name of a tool's answer only says that it answers the call at its place, the first the
    first, and so on. Templates that write none of them rely on this order."""
    asked = max((i for i in range(index) if messages[i].role == "assistant"), default=index)
    place = index - asked - 1
    if messages[index].role != "tool" or place >= len(messages[asked].tool_calls):
        return field == "tool_call_id"
    call = messages[asked].tool_calls[place]
    if field == "name":
        return (call.get("function") or call)["name"] == messages[index].name
    return call.get("id") in (None, messages[index].tool_call_id)


def markup_of(tree: nodes.Template) -> re.Pattern[str]:
    """Return a pattern of white space and the strings that a template searches texts for, to split or replace them."""
    searches = [call for call in tree.find_all(nodes.Call) if getattr(call.node, "attr", "") in SEARCHES]
    searches += [one for one in tree.find_all(nodes.Filter) if one.name == "replace"]
    found = {const.value for one in searches for const in one.find_all(nodes.Const) if isinstance(const.value, str)}
    strings = sorted(filter(str.strip, found), key=len, reverse=True)
    return re.compile("(?:" + "|".join([r"\s", *map(re.escape, strings)]) + ")*")
