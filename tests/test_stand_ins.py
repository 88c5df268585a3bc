"""What a template asks of texts is recorded: what depends on a text is never taken to hold for others."""

from typing import Any, cast

import pytest

from mmdata.encode.template.stand_ins import Record, RecordingEnvironment, Slot, StandIn, StandInObject, edited
from mmdata.encode.template.traced import template_environment, traced


def rendered(text: str) -> tuple[list[str | Slot], Record]:
    """The pieces that a template writes of the stand-ins t, u (texts) and d (an object), also in `m`, and the record."""
    environment = cast(RecordingEnvironment, template_environment(RecordingEnvironment))
    record = environment.record = Record()
    values: dict[str, Any] = {"t": StandIn.make(record, Slot(0)), "u": StandIn.make(record, Slot(1))}
    values["d"] = StandInObject(record, Slot(2))
    values = {name: traced(value, [], 0, "content") for name, value in values.items()}
    found = environment.from_string(text).render(**values, m={"role": "user", "content": values["t"]})
    return record.pieces(found), record


STRIP = (("strip", None),)
EXACT: dict[str, tuple[list[Any], set[str]]] = {
    "<{{ t }}>": (["<", Slot(0), ">"], set()),
    "{{ t | trim + u.rstrip('\n') }}": (["", Slot(0, STRIP), "", Slot(1, (("rstrip", "\n"),)), ""], set()),
    "{{ t.split('</x>')[-1].lstrip('\n').strip() }}": (["", Slot(0, (("lstrip", "\n"), *STRIP)), ""], {"</x>"}),
    "{{ t.replace('/a', '').replace('/b', 'c') }}": (["", Slot(0), ""], {"/a", "/b"}),
    "{% if '</x>' in t or t.startswith(('y', 'z')) or t == 'w' %}a{% endif %}b": (["b"], {"</x>", "y", "z", "w"}),
    "{% if t and t is string and t != '' and t is not none and d is mapping %}a{% endif %}": (["a"], set()),
    "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(t) }}{% set y %}{{ u }}{% endset %}{{ y | trim }}": (["", Slot(0), "", Slot(1, STRIP), ""], set()),
    "{{ d | tojson(indent=2) }}": (["", Slot(2, (("tojson", (), (("indent", 2),)),)), ""], set()),
    "{{ [m, m] | map(attribute='content') | join(', ') }}": (["", Slot(0), ", ", Slot(0), ""], set()),
    "{% for x in [m] if 'content' in x %}{{ x.role }}{{ x['content'] or u }}{% endfor %}": (["user", Slot(0), ""], set()),
}  # fmt: skip


@pytest.mark.parametrize("text", EXACT)
def test_a_template_may_write_strip_and_search_texts(text: str) -> None:
    pieces, record = rendered(text)
    assert (pieces, record.literals, record.is_exact) == (*EXACT[text], True)


@pytest.mark.parametrize("text", [
    "{{ t | length }}", "{{ t[0] }}", "{{ t[1:] }}", "{{ t.upper() }}", "{{ t | upper }}", "{% for c in t %}a{% endfor %}",
    "{{ t < 'a' }}", "{{ t == u }}", "{{ t in 'abc' }}", "{{ t in [u] }}", "{{ 'a' in [t] }}", "{{ m == {'a': 1} }}", "{{ m == m }}",
    "{{ {t: 1}['a'] }}", "{{ {t: 1, u: 2} | length }}", "{% for x in {t: 1, u: 2} %}a{% endfor %}", "{{ {'a': 1}[t] }}",
    "{{ 'a'.join([t]) }}", "{{ 'abc'.startswith(t) }}", "{{ 'a'.replace('a', t) }}", "{{ '%s' % t }}", "{{ '%s' | format(t) }}",
    "{{ t * 2 }}", "{{ t.strip('a') }}", "{{ t.split() }}", "{{ t.split('') }}", "{{ t.split(u) }}", "{{ (t + 'a').strip() }}",
    "{{ (t + 'a') | trim }}", "{{ 'a' in t + 'a' }}", "{{ t + 'a' == 'ba' }}", "{{ [t, u] | sort }}", "{{ [t, u] | unique | list }}", "{{ t is upper }}",
    "{{ [m] | selectattr('content', 'equalto', u) | list | length }}", "{{ [t] }}", "{{ t | tojson }}", "{{ m | tojson }}", "{{ [t, 'b'] | max }}",
    "{{ d }}", "{{ d.a }}", "{{ d['a'] }}", "{{ d.items() | list }}", "{{ d | length }}", "{% for k in d %}a{% endfor %}", "{{ d == {'x': 0} }}",
    "{{ t | int }}", "{{ range(t | length) | list }}", "{{ t.format(1) }}", "{{ loop is defined and t.isdigit() or t.isdigit() }}", "{{ strftime_now('%Y') }}",
])  # fmt: skip
def test_what_could_depend_on_a_text_is_noticed(text: str) -> None:
    try:
        assert not rendered(text)[1].is_exact
    except TypeError:
        return  # no rendering, as for every other text


def test_edits_are_those_of_the_template() -> None:
    assert edited(" \na\n ", (("strip", None), ("lstrip", "a"))) == ""
    assert edited({"b": "é\n", "a": 1}, (("tojson", (), (("sort_keys", True),)),)) == '{"a": 1, "b": "é\\n"}'
    assert edited({"b": "é"}, (("tojson", (True,), ()),)) == '{"b": "\\u00e9"}'
