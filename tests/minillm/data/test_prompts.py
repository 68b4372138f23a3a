"""Templates: what is filled in stays as it is, roles are not lost, special tokens follow one rule."""

import pytest
from tokenizers.processors import TemplateProcessing

from minillm.config.schema import DataConfig, EvalDataConfig
from minillm.data.examples import Batch, collate, encode, show
from minillm.data.prompts import encode_prompt
from minillm.data.records import to_record
from minillm.data.sources import DataError

CHAT, ALPACA = EvalDataConfig(), EvalDataConfig(prompt_template="alpaca")
RAW = EvalDataConfig(prompt_template="{prompt}")
ANSWER_ALL = DataConfig(train_on="all")
TOOLS = (
    "{% if tools %}[tools]{{ tools | tojson }}{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}<eos>\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def conversation(*turns, **columns):
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    messages = [turn if isinstance(turn, dict) else {"role": roles[turn[0]], "content": turn[2:]} for turn in turns]
    return to_record({"messages": messages, **columns}, "a.jsonl, record 7")


def prompt(record, tokenizer, settings=CHAT):
    return tokenizer.decode(encode_prompt(record, tokenizer, settings))


# ---- what is filled in


@pytest.mark.parametrize(
    "text", ["{input}", "{instruction} {prompt}", "str.format('{input}', {0})", r"\1 \g<0>", "{{ x }}"]
)
def test_braces_in_a_record_are_text(tokenizer, text):
    for settings in (ALPACA, EvalDataConfig(prompt_template="<{prompt}|{input}>")):
        for row in ({"instruction": text}, {"instruction": text, "input": text}, {"instruction": "a", "input": text}):
            found = prompt(to_record(row, "x"), tokenizer, settings)
            assert found.count(text) == list(row.values()).count(text) + (text == "{input}" and settings != ALPACA)
    assert prompt(to_record({"instruction": "Add {input}"}, "x"), tokenizer, ALPACA).endswith(
        "Add {input}\n\n### Response:\n"
    )


@pytest.mark.parametrize("settings", [ALPACA, RAW], ids=["alpaca", "raw"])
@pytest.mark.parametrize(
    ("turns", "roles"),
    [("s:be u:Hi a:Ho", "system, user"), ("u:Hi a:Ho u:He a:Hu", "user, assistant, user"), ("s:be", "system")],
)
def test_a_plain_template_takes_one_turn_of_the_user(tokenizer, settings, turns, roles):
    with pytest.raises(
        DataError, match=rf"a.jsonl, record 7 is a conversation \({roles}\).*data.prompt_template to chat"
    ):
        encode([conversation(*turns.split())], tokenizer, settings, DataConfig(), "x")
    assert "Hi" in prompt(conversation("u:Hi", "a:Ho"), tokenizer, settings)


# ---- chat templates that refuse, or leave out


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('No system role') }}", r"\(system, user, assistant, user\): No system role"),
        ("{% for m in messages %}{{ m.nothing.more }}{% endfor %}", "has no attribute 'nothing'"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ messages[9].content }}", "has no element 9"),
        ("{{ 'a' + messages }}", "can only concatenate"),
        ("{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}",
         r"leaves out the text of message 1 \(system\)"),
        ("{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}",
         r"leaves out the text of message 3 \(assistant\)"),
        ("hello", r"leaves out the text of message 1 \(system\)"),
    ],
)  # fmt: skip
def test_a_template_that_does_not_render_a_record_names_it(tokenizer, template, message):
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=f"a.jsonl, record 7: the tokenizer's chat template .*{message}"):
        encode([conversation("s:be", "u:Hi", "a:earlier", "u:He", "a:Ho")], tokenizer, CHAT, DataConfig(), "x")


def test_calls_and_tools_are_rendered_or_refused(tokenizer):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]}
    tools = [{"type": "function", "function": {"name": "f"}}]
    with pytest.raises(DataError, match="record 7: the tokenizer's chat template leaves out its tool calls"):
        prompt(conversation("u:Hi", call, "t:2", "a:Ho"), tokenizer)
    with pytest.raises(DataError, match="record 7: the tokenizer's chat template leaves out its `tools`"):
        prompt(conversation("u:Hi", "a:Ho", tools=tools), tokenizer)
    tokenizer.chat_template = TOOLS
    assert prompt(conversation("u:Hi", call, "t:2", "a:Ho", tools=tools), tokenizer) == (
        '[tools][{"type": "function", "function": {"name": "f"}}][user]Hi<eos>\n'
        '[assistant]f{"a": 1}<eos>\n[tool]2<eos>\n[assistant]'
    )
    with pytest.raises(DataError, match=r"is a conversation \(user, with tools\)"):
        prompt(conversation("u:Hi", "a:Ho", tools=tools), tokenizer, RAW)


def test_settings_reach_the_chat_template_or_are_refused(tokenizer):
    tokenizer.chat_template += "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    off = EvalDataConfig(chat_template_kwargs={"enable_thinking": False})
    assert prompt(conversation("u:Hi"), tokenizer, off) == "[user]Hi><think></think>"
    assert prompt(conversation("u:Hi"), tokenizer) == "[user]Hi>"
    wrong = EvalDataConfig(chat_template_kwargs={"enable_thinking": False, "thinking": True})
    with pytest.raises(DataError, match=r"data.chat_template_kwargs.thinking: .* does not read 'thinking'"):
        encode([conversation("u:Hi")], tokenizer, wrong, DataConfig(), "x")


# ---- special tokens


@pytest.mark.parametrize(
    ("frame", "text", "expected"),
    [
        ("$A <eos>", "Q: {prompt} A:", "Q: Hi A:"),
        ("<bos> $A", "Q: {prompt} A:", "<bos>Q: Hi A:"),
        ("<bos> $A <eos>", "Q: {prompt} A:", "<bos>Q: Hi A:"),
        ("<bos> $A <eos>", "<bos>Q: {prompt} A:", "<bos>Q: Hi A:"),
        ("<bos> $A", "<bos><bos>{prompt}", "<bos>Hi"),
        ("$A", "{prompt}", "Hi"),
    ],
)
def test_a_plain_prompt_has_the_tokenizers_beginning_once_and_never_its_end(make_tokenizer, frame, text, expected):
    tokenizer = with_bos(make_tokenizer)
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=frame, special_tokens=[("<bos>", 257), ("<eos>", 0)]
    )
    assert prompt(conversation("u:Hi"), tokenizer, EvalDataConfig(prompt_template=text)) == expected
    head = "<bos>" * frame.startswith("<bos>")
    assert prompt(conversation("u:Hi"), tokenizer, ALPACA).startswith(f"{head}Below is")
    assert prompt(conversation("u:Hi"), tokenizer, ALPACA).endswith("### Response:\n")
    assert prompt(conversation("u:Hi"), tokenizer) == "[user]Hi>"  # a chat template brings all of them itself


def test_a_chat_prompt_does_not_begin_twice(make_tokenizer):
    tokenizer = with_bos(make_tokenizer)
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    assert prompt(conversation("u:Hi"), tokenizer) == "<bos>[user]Hi>"
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    assert prompt(conversation("u:Hi"), tokenizer) == "<bos>[user]Hi>"


def with_bos(make_tokenizer):
    tokenizer = make_tokenizer("<bos>")
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    return tokenizer


@pytest.mark.parametrize(
    ("opening", "answer", "again"),
    [
        ("<think>\n", "<think>\nhm</think>Ho", "<think>"),
        ("<think>\n", " <think> hm</think>Ho", "<think>"),
        ("[assistant]<think>\n\n</think>\n\n", "<think>\nhm\n</think>\nHo", "<think>"),
        ("<|assistant|>\n", "<|assistant|>\nHo", "<|assistant|>"),
        ("\nAnswer:", "Answer: Ho", "Answer:"),
        ("[/INST]", "[/INST]Ho", r"[/INST]"),
    ],
)
def test_what_the_template_has_opened_is_not_opened_again(tokenizer, opening, answer, again):
    tokenizer.chat_template = f"{{{{ messages[-1].content }}}}{{% if add_generation_prompt %}}{opening}{{% endif %}}"
    plain = EvalDataConfig(prompt_template="{prompt}" + opening)
    for settings in (CHAT, plain):
        with pytest.raises(DataError, match="record 7: the answer begins with") as error:
            encode([conversation("u:think", f"a:{answer}")], tokenizer, settings, DataConfig(), "x")
        assert repr(again) in str(error.value)
        encode([conversation("u:think", "a:hm</think>Ho")], tokenizer, settings, DataConfig(), "x")


def test_an_answer_that_only_resembles_the_template_is_none(tokenizer):
    for answer in ("> quoted", "user", "t", "<b>bold</b>"):
        assert encode([conversation("u:Hi", f"a:{answer}")], tokenizer, CHAT, DataConfig(), "x").examples


# ---- empty prompts


@pytest.mark.parametrize("empty", ["", None])
def test_a_prompt_of_no_token_names_its_record(tokenizer, empty):
    records = [
        to_record({"prompt": text, "completion": "b"}, f"a.jsonl, record {i}")
        for i, text in ((1, "a"), (2, empty or ""))
    ]
    with pytest.raises(DataError, match=r"a.jsonl, record 2: the prompt is empty"):
        encode(records, tokenizer, RAW, DataConfig(overlong_prompts="drop"), "x")


# ---- which turns are learnt from


LONG = ("u:Hi", "a:Ho", "s:be", "u:He ", "a:Hu\n", "u:X", "a:Y")


def test_every_turn_of_the_assistant_is_learnt_from_on_demand(tokenizer):
    tokenizer.chat_template = TOOLS
    records = [conversation(*LONG), conversation("u:Hi", "a:Ho")]
    last = encode(records, tokenizer, CHAT, DataConfig(), "x", answers=True)
    every = encode(records, tokenizer, CHAT, ANSWER_ALL, "x", answers=True)
    assert show(last.examples[0], tokenizer).count("⟦") == 1
    assert show(every.examples[0], tokenizer) == (
        "[user]Hi<eos>\n[assistant]⟦Ho<eos>⟧\n[system]be<eos>\n[user]He <eos>\n[assistant]⟦Hu\n<eos>⟧\n[user]X<eos>\n"
        "[assistant]⟦Y<eos>⟧"
    )
    assert "; learnt from: the last answers alone, not 2 earlier turns of the assistant (data.train_on: last)" in str(
        last
    )
    assert "; learnt from: the last answers and 2 earlier turns of the assistant (data.train_on: all)" in str(every)
    sampled = encode(records, tokenizer, CHAT, ANSWER_ALL, "x")  # for methods that sample the last turn
    assert not sampled.examples[0].turns and "learnt" not in str(sampled)


@pytest.mark.parametrize("row_length", [0, 400])
def test_targets_are_the_tokens_that_follow_in_the_order_of_the_rows(tokenizer, row_length):
    tokenizer.chat_template = TOOLS
    records = [conversation("u:Hi", "a:Ho"), conversation(*LONG), conversation("u:1", "a:2", "u:3", "a:4")]
    examples = encode(records, tokenizer, CHAT, ANSWER_ALL, "x", answers=True).examples
    batch: Batch = collate(
        [e.prompt for e in examples], [e.response for e in examples], row_length, [e.turns for e in examples]
    )
    assert tokenizer.decode(batch.targets) == "Ho<eos>Ho<eos>Hu\n<eos>Y<eos>2<eos>4<eos>"
    assert batch.input_ids.roll(-1, dims=1)[batch.predict].tolist() == batch.targets.tolist()


def test_a_turn_that_later_turns_change_cannot_be_learnt(tokenizer):
    """As templates do that leave the thoughts of earlier turns out."""
    tokenizer.chat_template = TOOLS.replace(
        "{{ m.content }}", "{{ m.content if loop.last else m.content.split('</think>')[-1] }}"
    )
    record = conversation("u:Hi", "a:hm</think>Ho", "u:He", "a:Hu")
    assert encode([record], tokenizer, CHAT, DataConfig(), "x", answers=True).examples
    with pytest.raises(DataError, match=r"record 7, message 2: .* renders this turn of the assistant differently"):
        encode([record], tokenizer, CHAT, ANSWER_ALL, "x", answers=True)


def test_control_characters_of_an_example_do_not_reach_the_terminal(tokenizer):
    (example,) = encode([conversation("u:\x1b[2Ja\tb", "a:\x9b1m\x07")], tokenizer, CHAT, DataConfig(), "x").examples
    assert show(example, tokenizer) == "[user]\\x1b[2Ja\tb>⟦\\x9b1m\\x07<eos>⟧"
