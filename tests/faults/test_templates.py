"""Templates of strangers: bounded in what they make and in time, and what they do otherwise is what jinja2 does."""

import json
import shutil
import time
from pathlib import Path

import jinja2.sandbox
import pytest

from mmdata.encode.template import Template, limits
from mmdata.encode.template.traced import template_environment
from mmdata.errors import TokenizerError, UsageError
from mmdata.tokenizer.tokenizer import Tokenizer

GREEDY = [
    "{{ 'x'|center(10**9) }}",
    "{{ messages[0].content|center(1000000000) }}",
    "{{ 'x'.center(1000000000) }}",
    "{{ 'x'.zfill(1000000000) }}",
    "{{ 'x' * 10**9 }}",
    "{{ 10**9 * 'x' }}",
    "{{ [0] * 10**9 }}",
    "{{ 10**(10**10) }}",
    "{{ 2|round(1000000000, 'ceil') }}",
    "{{ 'x'|slice(1000000000000)|list }}",
    "{{ [1]|slice(1000000000000)|list }}",
    "{{ [1]|batch(1000000000, 'x')|list }}",
    "{% for i in [1]|slice(10**12) %}{% endfor %}",
    "{% for i in range(10**12) %}{% endfor %}",
    "{{ range(10**12)|list }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '{:1000000000d}'.format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    "{{ '%1000000000d'|format(1) }}",
    "{{ ('a\\t' * 1000000).expandtabs(1000000) }}",
    "{{ ('a\\n' * 1000000)|indent(1000000) }}",
    "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "{{ ('a' * 1000000)|replace('a', 'b' * 1000000) }}",
    "{{ ('b' * 1000000).join('a' * 1000000) }}",
    "{{ ('a' * 1000000)|join('b' * 1000000) }}",
    "{{ ('a' * 1000000).translate({97: 'b' * 1000000}) }}",
    "{{ ('a,' * 10000000).split(',')|length }}",
    "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x|tojson }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x|string }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x ~ '' }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ '%s' % ns.x }}",
    "{% set big = 'x' * 1000000 %}{% for i in range(99999) %}{{ big }}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for x in [[[1]]] recursive %}{{ loop(x * 99999) if x is iterable }}{% endfor %}",
    "{{ lipsum(n=1000000000) }}",
]


def rendered(template: str) -> str:
    with limits.bounded(100):
        return (
            template_environment()
            .from_string(template)
            .render(messages=[{"role": "user", "content": "hi"}], a="é", n=[1, 2])
        )


@pytest.mark.parametrize("template", GREEDY)
def test_a_greedy_template_is_refused_by_name(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MM_TEMPLATE_SECONDS", "0.05")
    begun = time.process_time()
    with pytest.raises((jinja2.TemplateError, OverflowError, RecursionError, ValueError)) as caught:
        rendered(template)
    assert str(caught.value) and not isinstance(caught.value, MemoryError)
    assert time.process_time() - begun < 10


PLAIN = [
    "{% for m in messages %}{{ loop.index ~ m.role + ': ' + m.content }}{% if not loop.last %},{% endif %}{% else %}none{% endfor %}",
    "{% for i in range(3) if i != 1 %}{{ i }}{{ loop.length }}{{ loop.first }}{% endfor %}",
    "{% for k, v in {'a': 1, 'b': [2, 3]}.items() %}{{ k }}={{ v }};{% endfor %}",
    "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}",
    "{{ messages|map(attribute='role')|join(', ') }}|{{ n|sum }}|{{ n|last }}|{{ 'a b'.split()|length }}",
    "{{ '%s is %d' % ('a', 3) }}|{{ '{} {:>5}'.format('a', 3) }}|{{ 'x'|center(9) }}|{{ 'a\nb'|indent(2) }}",
    "{{ 7 % 3 }}|{{ 2 ** 10 }}|{{ 10**9 * 2.5 }}|{{ 'ab' * 3 }}|{{ [1] * 2 + [3] }}|{{ none }}|{{ true }}|{{ undefined_name }}|{{ 1.5 }}",
    "{% macro f(x) %}<{{ x }}{{ caller() if caller }}>{% endmacro %}{{ f(1) }}{% call f(2) %}in{% endcall %}",
    "{% set ns = namespace(n=0) %}{% for i in range(5) %}{% if i == 3 %}{% break %}{% endif %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}",
    "{% filter upper %}abc{{ a }}{% endfilter %}{% set b %}x{{ a }}{% endset %}{{ b * 2 }}",
    "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}{{ 'abc'[::-1] }}{{ a|tojson if false else a|string }}",
]


@pytest.mark.parametrize("template", PLAIN)
def test_other_templates_write_what_jinja2_writes(template: str) -> None:
    plain = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    expected = plain.from_string(template).render(messages=[{"role": "user", "content": "hi"}], a="é", n=[1, 2])
    assert rendered(template) == expected


def test_a_time_limit_holds_whatever_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MM_TEMPLATE_SECONDS", "1e-9")
    with pytest.raises(limits.TemplateLimitError, match=r"takes longer than 1e-09 s \(MM_TEMPLATE_SECONDS"):
        rendered("{% for i in range(9999) %}{% endfor %}")


def test_the_environment_sets_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{{ ('x' * 2000000)|length }}"
    assert rendered(template) == "2000000"
    monkeypatch.setenv("MM_TEMPLATE_MB", "1")
    with pytest.raises(limits.TemplateLimitError, match=r"more than 1,054,976 characters \(MM_TEMPLATE_MB"):
        rendered(template)
    monkeypatch.setenv("MM_TEMPLATE_MB", "200")
    assert rendered("{{ ('x' * 100000000)|length }}") == "100000000"
    for value in ("many", "0", "-1", "nan"):
        monkeypatch.setenv("MM_TEMPLATE_MB", value)
        with pytest.raises(UsageError, match="MM_TEMPLATE_MB is"):
            rendered(template)


@pytest.mark.parametrize(
    "template",
    [
        "a\0{{ messages[0].content }}",
        "{{ 'x'|center(10**9) }}",
        "{% for m in messages %}{{ m.content * 10**9 }}{% endfor %}",
    ],
)
def test_a_tokenizer_with_such_a_template_is_refused(tokenizer_dir: Path, tmp_path: Path, template: str) -> None:
    copy = Path(shutil.copytree(tokenizer_dir, tmp_path / "tokenizer"))
    config = json.loads((copy / "tokenizer_config.json").read_bytes())
    (copy / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    with pytest.raises(TokenizerError, match="its chat template cannot be used: "):
        Template(Tokenizer.load(copy))
