"""The forms in which chat templates take tools and tool calls."""

import json
from typing import NamedTuple

from mmdata.io.records import JsonObject


class CallForm(NamedTuple):
    """The form in which a template takes tool calls. is_nested: name and arguments in an object `function`, as OpenAI
    writes them, not as in the row. is_text: arguments as JSON text, as DeepSeek's template does."""

    is_nested: bool = False
    is_text: bool = False

    def of(self, call: JsonObject) -> JsonObject:
        """Return a tool call in this form."""
        if self.is_nested:
            call = nested(call)
        if not self.is_text:
            return call
        function = {**call["function"]}
        if not isinstance(arguments := function.get("arguments", {}), str):
            function["arguments"] = json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": function}


def nested(value: JsonObject) -> JsonObject:
    """Return a tool or a tool call in OpenAI's form: what says more than id and type in an object `function`."""
    if "function" in value:
        return value
    function = {key: item for key, item in value.items() if key not in ("id", "type")}
    return {"type": "function", "function": function} | ({"id": value["id"]} if "id" in value else {})
