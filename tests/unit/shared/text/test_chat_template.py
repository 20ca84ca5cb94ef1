import json
from datetime import UTC, datetime

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from shared.errors import InvalidRequest, UnsupportedCheckpoint
from shared.text.chat_template import ChatTemplate, read_template_source
from shared.wire.openai import ChatMessage

NOW = datetime(2026, 3, 4, 5, 6, tzinfo=UTC)
CHAT = [ChatMessage("system", "Be <brief> & kind."), ChatMessage("user", "Grüße 🙂")]


def render(source, messages=CHAT, **kwargs):
    return ChatTemplate(source, {"bos_token": "<s>"}, **kwargs).render(messages, now=NOW)


@pytest.mark.parametrize(
    "source",
    [
        "{{ bos_token }}{% for m in messages %}\n    [{{ m['role'] }}] {{ m.content | trim }}\n{% endfor %}\nend",
        "{{ messages | tojson }} {{ messages | tojson(indent=2) }}",
        "{%- if tools is none %}no tools{% endif %}{% if unset is defined %}x{% endif %}{{ unset }}",
        "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{% for m in messages %}{% generation %}\n{{ m.content }}{% endgeneration %}{% endfor %}",
        "{% macro show(m) %}{{ m.content }}{% endmacro %}{{ show(messages[-1]) }}{{ add_generation_prompt }}",
    ],
)
def test_renders_as_transformers_does(source):
    conversation = [{"role": message.role, "content": message.content} for message in CHAT]
    (expected,), _ = render_jinja_template(
        [conversation], chat_template=source, add_generation_prompt=True, bos_token="<s>"
    )
    assert render(source) == expected


def test_the_time_is_the_one_given():
    assert render("{{ strftime_now('%d %b %Y %H:%M') }}") == "04 Mar 2026 05:06"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].nothing.deeper }}", "no attribute"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages.append(1) }}", "unsafe|not safely"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "OverflowError|[Rr]ange too big"),
    ],
)
def test_a_failing_template_is_the_messages_fault_and_quotes_no_prompt(source, reason):
    with pytest.raises(InvalidRequest, match=reason) as caught:
        render(source)
    assert caught.value.param == "messages"
    assert "Grüße" not in caught.value.message


@pytest.mark.parametrize(
    "content",
    [
        "{{ 7 * 7 }}",
        "{% for m in messages %}{{ m }}{% endfor %}",
        "{% set messages = [] %}",
        "{# gone #}",
        "{% raw %}{{ x }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception('no') }}",
        "%} {{ unclosed",
    ],
)
@pytest.mark.parametrize(
    "source", ["{{ messages[0].content }}", "{% for m in messages %}{{ m['content'] }}{% endfor %}"]
)
def test_template_syntax_in_a_message_is_only_text(content, source):
    template = ChatTemplate(source, {})
    assert template.render([ChatMessage("user", content)], now=NOW) == content


def test_a_runaway_loop_is_cut_off_at_the_limit():
    source = "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxx{% endfor %}{% endfor %}"
    with pytest.raises(InvalidRequest, match="more than 1000 characters"):
        render(source, max_chars=1000)
    assert render("{% for i in range(10) %}x{% endfor %}", max_chars=10) == "x" * 10


def test_a_template_that_does_not_parse_is_refused_at_load():
    with pytest.raises(UnsupportedCheckpoint, match="line 2"):
        ChatTemplate("ok\n{% for %}", {})


def test_the_file_goes_before_the_config(tmp_path):
    assert read_template_source(tmp_path, {}) is None
    assert read_template_source(tmp_path, {"chat_template": "from config"}) == "from config"
    (tmp_path / "chat_template.jinja").write_text("from file ü", encoding="utf-8")
    assert read_template_source(tmp_path, {"chat_template": "from config"}) == "from file ü"


def test_of_named_templates_the_default_is_taken(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert read_template_source(tmp_path, json.loads(json.dumps({"chat_template": named}))) == "plain"


@pytest.mark.parametrize("value", [[{"name": "rag", "template": "x"}], 3])
def test_other_shapes_are_refused(tmp_path, value):
    with pytest.raises(UnsupportedCheckpoint, match="chat_template"):
        read_template_source(tmp_path, {"chat_template": value})
