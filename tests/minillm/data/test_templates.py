"""Chat templates are programs of others: whatever they do, rendering ends soon, in a text or in one error."""

import doctest
import os
import time

import pytest

from minillm.data import templates
from minillm.data.templates import TemplateError, render
from minillm.model.load import load_tokenizer

USER = [{"role": "user", "content": "hello"}]
LONG = "{% for i in range(99999) %}"
DOUBLING = "{% set ns = namespace(s='ab') %}" + LONG + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LONG * 2 + "{% endfor %}" * 2, "longer than 2 seconds"),
        ("{% set n = messages|length * 10 %}{{ n ** (n ** 9) }}", "longer than 2 seconds"),  # one operation
        ("{{ 'a' * 10 ** 12 }}", "MemoryError"),
        ("{{ '%1000000000000d' % 1 }}", "MemoryError"),
        (DOUBLING, "MemoryError"),
        (LONG + "x" * 999 + "{% endfor %}", "it writes 99899001 characters, of which at most"),
        ("{# " + "x" * 2_000_000 + " #}", "it has 2000006 characters, of which at most"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}", "recursion"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% for %}", "Expected"),
        ("{{ raise_exception('no such role') }}", "^no such role$"),
        ("{{ messages[3].content }}", "list object has no element 3"),
    ],
    ids=["endless", "one-operation", "memory", "format", "doubling", "long", "giant", "recursive", "nested", "sandbox",
         "include", "syntax", "refusal", "undefined"],
)  # fmt: skip
def test_a_template_that_is_no_use_ends_in_an_error(template, message):
    started = time.perf_counter()
    with pytest.raises(TemplateError, match=message):
        render(template, USER)
    assert time.perf_counter() - started < 60  # of which two are given to the template; the machine may be busy
    assert render("{{ messages[0].content }}", USER) == "hello"  # the next one is rendered again


def test_the_text_is_that_of_transformers(tokenizer):
    tokenizer.chat_template = (
        "{{ eos_token }}{% generation %}{{ messages | tojson }}{% endgeneration %}{% if tools %}{{ tools[0].name }}"
        '{% endif %}{% if add_generation_prompt %}>{% endif %}{{ "ü\u2028" }}{% break %}'.replace("{% break %}", "")
    )
    for tools in (None, [{"name": "find"}]):
        for answers in (True, False):
            expected = tokenizer.apply_chat_template(USER, tools=tools, tokenize=False, add_generation_prompt=answers)
            variables = dict(tools=tools, add_generation_prompt=answers, **tokenizer.special_tokens_map)
            assert render(tokenizer.chat_template, USER, **variables) == expected


def test_a_forked_process_has_a_renderer_of_its_own():
    assert render("{{ 1 }}", USER) == "1"
    child = os.fork()
    if not child:
        os._exit(render("{{ 2 }}", USER) != "2")
    assert os.waitpid(child, 0)[1] == 0
    assert render("{{ 3 }}", USER) == "3"


def test_the_example_in_the_docstring():
    (example, *_) = doctest.DocTestFinder().find(templates.render, "render", module=templates, globs={})
    assert doctest.DocTestRunner().run(example) == (0, 2 + 1)


def test_the_record_is_named(files, capsys):
    from minillm.cli import main

    (files / "student" / "chat_template.jinja").write_text(LONG * 2 + "{% endfor %}" * 2)
    assert main(["generate", str(files / "student"), "--prompt", "a"]) == 2
    error = capsys.readouterr().err
    assert "the prompt: the tokenizer's chat template cannot render these turns (user): it took longer" in error
    assert load_tokenizer(str(files / "student")).chat_template
