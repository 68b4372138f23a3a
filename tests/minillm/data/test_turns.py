"""Conversations with tools: which tokens are learnt, and from where responses go on."""

import pytest

from minillm import terminal
from minillm.config.recipe import load_recipe
from minillm.config.schema import ConfigError, DataConfig, EvalDataConfig
from minillm.data.examples import encode, show
from minillm.data.records import every_turn, to_record
from minillm.data.sources import DataError
from minillm.distillation import load_pair
from minillm.train.preflight import prepare

CHAT, LAST, ANSWER_ALL = EvalDataConfig(), DataConfig(), DataConfig(train_on="all")
TOOLS = (
    "{% if tools %}[tools]{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}<eos>\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
DEFINED = {"tools": [{"type": "function", "function": {"name": "add"}}]}
MARKED = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content.split('</think>')[-1] if not loop.last else m.content }}<eos>{% endgeneration %}"
    "{% else %}{{ m.content }}<eos>{% endif %}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def conversation(*turns, **columns):
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    messages = [turn if isinstance(turn, dict) else {"role": roles[turn[0]], "content": turn[2:]} for turn in turns]
    return to_record({"messages": messages, **columns}, "a.jsonl, record 7")


def shown(record, tokenizer, data=LAST, answers=True):
    return [show(e, tokenizer) for e in encode([record], tokenizer, CHAT, data, "x", answers=answers).examples]


def test_an_answer_that_calls_a_tool_is_learnt_as_the_template_writes_it(tokenizer):
    tokenizer.chat_template = TOOLS
    record = conversation("u:1+1?", CALL, **DEFINED)
    (example,) = encode([record], tokenizer, CHAT, DataConfig(), "x", answers=True).examples
    assert tokenizer.decode(example.response) == 'add{"a": 1}<eos>'
    assert example.record.references == ['add{"a": 1}']  # what a sampled answer is compared with


def test_every_turn_of_a_conversation_with_tools_is_learnt_and_nothing_that_a_tool_says(tokenizer):
    tokenizer.chat_template = TOOLS
    record = conversation("u:1+1?", CALL, "t:2", "a:It is 2.", "u:Sure?", "a:Yes", **DEFINED)
    (text,) = shown(record, tokenizer, ANSWER_ALL)
    assert text.endswith(
        '[user]1+1?<eos>\n[assistant]⟦add{"a": 1}<eos>⟧\n[tool]2<eos>\n[assistant]⟦It is 2.<eos>⟧\n[user]Sure?<eos>\n'
        "[assistant]⟦Yes<eos>⟧"
    )


@pytest.mark.parametrize(
    ("template", "extra", "message"),
    [
        (TOOLS, {"reasoning_content": "hm"}, "leaves out `reasoning_content` of the answer"),
        (TOOLS.replace("m.tool_calls or []", "[]"), {}, "leaves out `tool_calls` of the answer"),
        (TOOLS.replace("%}[assistant]{%", "%}[assistant]\n{%"), {}, "opens an answer otherwise than one with `tool_c"),
    ],
)  # fmt: skip
def test_answers_that_the_template_loses_are_refused(tokenizer, template, extra, message):
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=message):
        shown(conversation("u:1+1?", CALL | extra), tokenizer)
    with pytest.raises(DataError, match="which only a chat template can write"):
        plain = EvalDataConfig(prompt_template="{prompt}")
        encode([conversation("u:1+1?", CALL)], tokenizer, plain, DataConfig(), "x", answers=True)


def test_a_template_that_marks_the_assistants_turns_is_believed(tokenizer):
    """Without its marks the first turn could not be learnt: its thoughts are left out once others follow."""
    record = conversation("u:Hi", "a:hm</think>Ho", "u:é", "a:Hu")
    tokenizer.chat_template = MARKED
    (text,) = shown(record, tokenizer, ANSWER_ALL)
    assert text == "[user]Hi<eos>[assistant]⟦Ho<eos>⟧[user]é<eos>[assistant]⟦Hu<eos>⟧"
    tokenizer.chat_template = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with pytest.raises(DataError, match="renders this turn of the assistant differently"):
        shown(record, tokenizer, ANSWER_ALL)


def test_a_rollout_goes_on_from_any_turn(tokenizer):
    tokenizer.chat_template = TOOLS
    record = conversation("s:be", "u:1+1?", CALL, "t:2", "a:It is 2.", "u:Sure?", "a:Yes", **DEFINED)
    turns = every_turn(record)
    texts = [text for turn in turns for text in shown(turn, tokenizer)]
    assert [text.count("⟦") for text in texts] == [1, 1, 1]
    assert texts[0].endswith('1+1?<eos>\n[assistant]⟦add{"a": 1}<eos>⟧')
    assert texts[1].endswith("[tool]2<eos>\n[assistant]⟦It is 2.<eos>⟧")
    assert texts[2].endswith("Sure?<eos>\n[assistant]⟦Yes<eos>⟧")
    assert [turn.where for turn in turns] == [
        f"a.jsonl, record 7{more}" for more in (", message 3", ", message 5", "")
    ]
    assert every_turn(conversation("u:Hi", "a:Ho")) == [conversation("u:Hi", "a:Ho")]
    with pytest.raises(DataError, match="`teacher_prompt` is for one turn"):
        every_turn(record._replace(teacher_messages=[{}]))


def test_a_stage_that_samples_takes_every_turn_on_demand(files, tokenizer):
    for name in ("student", "teacher"):
        tokenizer.chat_template = TOOLS
        tokenizer.save_pretrained(files / name)
    rows = '{"messages": [' + ", ".join(
        f'{{"role": "{role}", "content": "{text}"}}' for role, text in
        (("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"))) + "]}\n"  # fmt: skip
    (files / "turns.jsonl").write_text(rows * 4)
    flags = [f"--data.train={files / 'turns.jsonl'}", "--data.rollout_turns=all"]
    recipe = load_recipe(files / "recipe.yaml", flags)
    pair = load_pair(recipe.run)
    assert len(prepare(recipe.run, recipe.stages["minillm"], *pair).examples) == 8
    assert len(prepare(recipe.run, recipe.stages["warm-up"], *pair).examples) == 4  # kd samples nothing
    with pytest.raises(ConfigError, match="would learn them once more"):
        load_recipe(files / "recipe.yaml", [*flags, "--data.train_on=all", "--stages.warm-up.method=gkd"])


def test_what_is_learnt_is_coloured_on_a_terminal_alone(monkeypatch, capsys):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for terminal_there, no_colour, coloured in ((True, "", True), (False, "", False), (True, "1", False)):
        monkeypatch.setattr(terminal.sys.stdout, "isatty", lambda there=terminal_there: there)
        monkeypatch.setenv("NO_COLOR", no_colour)
        terminal.say("a ⟦b\nc⟧ \x1b[2J", coloured=True)
        printed = capsys.readouterr().out
        assert printed == ("a \x1b[32m⟦b\nc⟧\x1b[0m \\x1b[2J\n" if coloured else "a ⟦b\nc⟧ \\x1b[2J\n")
