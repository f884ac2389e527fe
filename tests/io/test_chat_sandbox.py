"""Chat templates that are broken or hostile: operations that are refused, limits that hold, and one-line errors."""

from __future__ import annotations

import re
import time

import pytest

from fastllama.errors import CheckpointError
from fastllama.io.chat import ChatFormat, chat_format
from tests.io import chat_templates as samples


def of(template: str) -> ChatFormat:
    return chat_format(samples.tokenizer(template, "bytes"))


GROWTH = (  # what doubles a value each time
    "[n.x, n.x]",
    "(n.x, n.x)",
    "{'a': n.x, 'b': n.x}",
    "dict(a=n.x, b=n.x)",
    "[n.x] * 2",
    "[n.x] + [n.x]",
    "n.x | string | replace('x', 'xx')",
    "[n.x, n.x] | join",
    "'%s%s' | format(n.x, n.x)",
    "'%s%s' % (n.x, n.x)",
    "'{0}{0}'.format(n.x)",
    "(n.x | string).replace('x', 'xx')",
)
GROWING = (
    *(
        f"{{% set n = namespace(x='x') %}}{{% for i in range(60) %}}{{% set n.x = {grown} %}}{{% endfor %}}{{{{n.x}}}}"
        for grown in GROWTH
    ),
    *(
        f"{{{{ ({call}) | length }}}}"
        for call in (
            "'x' | center(999999999)",
            "'x'.ljust(999999999)",
            "'1'.zfill(999999999)",
            "'%999999999d' % 1",
            "'%*d' % (999999999, 1)",
            "'%999999999d' | format(1)",
            "'{:999999999}'.format(1)",
            "'x' | indent(999999999)",
            "[1] | tojson(indent=999999999)",
            "[1] | batch(999999999, 'x') | list",
            "[1] | slice(9999999) | list",
            "range(9000) | join('y' * 9000)",
            "('x' * 9000) | replace('x', 'y' * 9000)",
        )
    ),
    "{% for i in range(5000) %}{% set x = range(9999) | list %}{% endfor %}",
    "{% for i in range(5000) %}{{ range(9999) | sum and '' }}{% endfor %}",
)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", r"is broken at line 1: "),
        ("a\n\n{{ messages[0].content }", r"is broken at line 3: "),
        ("{% import 'os' as os %}", "fails: no loader"),
        ("{% include '/etc/passwd' %}", "fails: no loader"),
        ("{{ messages[9].content.x }}", "fails: "),
        ("{{ nothing.here }}", "fails: 'nothing' is undefined"),
        ("{{ 1 / 0 }}", "fails: division by zero"),
        ("{{ messages[0].content + 1 }}", "fails: "),
        ("{{ no() }}", "fails: 'no' is undefined"),
        ("{{ messages | nofilter }}", "is broken at line 1: No filter named 'nofilter'"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "is nested or recurses too deeply"),
        ("{% for m in messages %}" * 30 + "{% endfor %}" * 30, "fails: too many statically nested blocks"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "is nested or recurses too deeply"),
        ("{{ ''.__class__ }}", "fails: the attribute '__class__' of a str is forbidden in templates"),
        ("{{ ''['__class__'] }}", "the attribute '__class__'"),
        ("{{ messages | attr('__class__') }}", "the attribute '__class__'"),
        ("{{ messages | map(attribute='__class__') | list }}", "the attribute '__class__'"),
        ("{{ '{0.__class__}'.format(1) }}", "the attribute '__class__'"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "the attribute '__class__'"),
        ("{{ raise_exception.__globals__ }}", "the attribute '__globals__'"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "the attribute '__init__'"),
        ("{{ namespace.__init__ }}", "the attribute '__init__'"),
        ("{{ self.__dict__ }}", "the attribute '__dict__'"),
        ("{{ messages.append(1) }}", "the attribute 'append'"),
        ("{{ messages[0].update({'role': 'x'}) }}", "the attribute 'update'"),
        ("{{ dict.update(messages[0], {'role': 'x'}) }}", "fails: "),
        ("{{ namespace(__class__=1) }}", "a namespace cannot hold '__class__'"),
        ("{% set n = namespace() %}{% set n._x = 1 %}", "a namespace cannot hold '_x'"),
        ("{{ lipsum(n=9) }}", "fails: 'lipsum' is undefined"),
        ("{% for i in range(10000000) %}{% endfor %}", "beyond reason"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "beyond reason"),
        ("{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}", "beyond reason"),
        ("{% for i in range(99999) %}" + "long " * 100 + "{% endfor %}", "beyond reason"),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", "beyond reason"),
        ("{{ 'x' * 9999999999 }}", "beyond reason"),
        ("{{ ([0] * 9999) * 9999 }}", "beyond reason"),
        ("{{ 7 ** 9999999999 }}", "beyond reason"),
        (
            "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
            "beyond reason",
        ),
        (
            "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "beyond reason",
        ),
        ("{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}", "beyond reason"),
        *((template, "beyond reason") for template in GROWING),
    ],
)
def test_a_template_that_is_broken_or_hostile_is_one_line(template: str, message: str) -> None:
    start = time.perf_counter()
    tokenizer = samples.tokenizer(template, "bytes")
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        chat_format(tokenizer)
    assert re.fullmatch(r"\S*/tokenizer_config.json: the chat template [^\n]+", str(caught.value))
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert time.perf_counter() - start < 20


def test_a_templates_own_refusal_is_shown_without_control_characters() -> None:
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('no\\n \x1b[31mway') }}{% endif %}{{ messages }}"
    with pytest.raises(
        ValueError, match=r"tokenizer_config.json: the chat template refuses it: no \[31mway$"
    ) as caught:
        of(template).encode([{"role": "tool", "content": "a"}, {"role": "user", "content": "a"}])
    assert not isinstance(caught.value, CheckpointError)


def test_undefined_names_that_are_printed_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    of("{{ messages[0].content }}{{ system_prompt }}{{ messages[0].name }}{{ 'x' if false }}")
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "the chat template prints 'name', 'system_prompt', undefined here, as nothing" in record.getMessage()
