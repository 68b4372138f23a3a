"""Prompts: a record's conversation in a template, as token ids.

One rule of special tokens for every template. A chat template brings all of them itself, as transformers has it. Any
other template is plain text, which gets what the tokenizer puts in front of a text (its begin-of-sequence), unless
the template begins with it already, and never what the tokenizer puts behind one: a prompt that ends with
end-of-sequence asks for nothing. No prompt begins with two begin-of-sequence tokens.
"""

import json
import re
from typing import TYPE_CHECKING, Any

from minillm.config.schema import EvalDataConfig
from minillm.data.records import BESIDE_CONTENT, Record
from minillm.data.sources import DataError
from minillm.data.templates import MARKED, TemplateError, marked, render
from minillm.foreign import foreign

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALPACA = (  # of the paper, for records without and with input
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n",
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
)
PLACE = re.compile(r"\{(?:prompt|instruction|input)\}")
TAG = re.compile(r"\s*(<[^<>\s]+>)")


def check_template(tokenizer: "PreTrainedTokenizerBase", settings: EvalDataConfig) -> None:
    """Raises DataError for a template that the tokenizer does not have, or settings that it does not read."""
    if settings.prompt_template != "chat":
        return
    if not isinstance(tokenizer.chat_template, (str, dict)):
        raise DataError(
            "the tokenizer has no chat template: set data.prompt_template to alpaca, or to a text with {prompt}, "
            'such as "### Instruction:\\n{prompt}\\n\\n### Response:\\n"'
        )
    for name in settings.chat_template_kwargs:
        if not re.search(rf"\b{re.escape(name)}\b", str(tokenizer.chat_template)):
            raise DataError(
                f"data.chat_template_kwargs.{name}: the tokenizer's chat template does not read {name!r}, so it would "
                "change nothing. Mend the name, or leave it out"
            )


def encode_prompt(record: Record, tokenizer: "PreTrainedTokenizerBase", settings: EvalDataConfig) -> list[int]:
    """Token ids of the prompt in the template of `data.prompt_template`; special tokens as the file's head says.

    Raises DataError, which names the record, where the template refuses the conversation or would lose part of it.
    """
    if settings.prompt_template == "chat":
        text = chat_text(record, record.messages, tokenizer, settings)
        _check_complete(text, record, tokenizer, settings)
    else:
        text = _plain_text(record, settings.prompt_template)
    return _ids(text, record, tokenizer, settings)


def encode_turn(
    record: Record, prompt: list[int], tokenizer: "PreTrainedTokenizerBase", settings: EvalDataConfig
) -> list[int]:
    """Token ids of an answer that has more than content, as the chat template writes it behind the prompt, up to what
    ends it: tool calls and thoughts included.

    Raises DataError, which names the record, where the template leaves part of it out, or writes the prompt otherwise
    once the answer follows.
    """
    assert record.turn is not None
    beside = [key for key in BESIDE_CONTENT if record.turn.get(key)]
    if settings.prompt_template != "chat":
        raise DataError(
            f"{record.where}: the answer has `{beside[0]}`, which only a chat template can write: set "
            "data.prompt_template to chat, or write it into `content` as the model is to say it"
        )
    conversation = [*record.messages, record.turn]
    text = chat_text(record, conversation, tokenizer, settings, open_answer=False)
    for key in beside:
        less = [*record.messages, {name: value for name, value in record.turn.items() if name != key}]
        if chat_text(record, less, tokenizer, settings, open_answer=False) == text:
            raise DataError(_left_out(record, f"`{key}` of the answer"))
    whole = _ids(text, record, tokenizer, settings)
    if whole[: len(prompt)] != prompt:
        raise DataError(
            f"{record.where}: the tokenizer's chat template opens an answer otherwise than one with `{beside[0]}`, "
            f"so that it would not be learnt where it is sampled: write it into `content` as the model "
            "is to say it, or leave the record out"
        )
    return whole[len(prompt) : _without_blanks(whole, len(prompt), tokenizer)]


def _without_blanks(ids: list[int], start: int, tokenizer: "PreTrainedTokenizerBase") -> int:
    """Where a turn that begins at `start` ends, without white space between it and the next."""
    end = len(ids)
    while end > start and not str(tokenizer.decode(ids[end - 1])).strip():
        end -= 1
    return end


def token_ids(text: str, record: Record, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Of text alone, without special tokens around it. Raises DataError, which names the record."""
    with foreign(f"{record.where}: the tokenizer cannot encode it", DataError):
        return tokenizer.encode(text, add_special_tokens=False)


def chat_text(
    record: Record,
    messages: list[dict[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    settings: EvalDataConfig,
    open_answer: bool = True,
) -> str:
    """Some messages of the record in the chat template; with `open_answer`, also what opens the model's turn."""
    return _rendered(record, messages, tokenizer, settings, open_answer)[0]


def _rendered(
    record: Record,
    messages: list[dict[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    settings: EvalDataConfig,
    open_answer: bool,
) -> tuple[str, list[tuple[int, int]]]:
    """The text, and the spans of its characters that the template marks as the assistant's."""
    names = {**tokenizer.special_tokens_map, **settings.chat_template_kwargs}
    names |= {"tools": list(record.tools) or None, "add_generation_prompt": open_answer}
    template = _template(record, tokenizer)
    try:
        return render(template, messages, **names), marked(template, messages, **names)
    except TemplateError as error:
        raise DataError(f"{_failed(record)}: {error}. Change the record, or set data.prompt_template") from error


def _template(record: Record, tokenizer: "PreTrainedTokenizerBase") -> str:
    with foreign(_failed(record), DataError):
        return tokenizer.get_chat_template(tools=list(record.tools) or None)


def _failed(record: Record) -> str:
    return f"{record.where}: the tokenizer's chat template cannot render these turns ({_roles(record)})"


def _roles(record: Record) -> str:
    return ", ".join(message["role"] for message in record.messages)


def answer_end(tokenizer: "PreTrainedTokenizerBase", settings: EvalDataConfig) -> list[int]:
    """The token ids behind an answer, up to the special token that ends it: of the chat template, where it writes one,
    which need not be the tokenizer's end-of-sequence; else that."""
    if settings.prompt_template == "chat":
        mark = "An answer."
        turns = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": mark}]
        try:
            behind = chat_text(Record(turns, None), turns, tokenizer, settings, open_answer=False).rpartition(mark)[2]
        except DataError:  # such a template is for other conversations, or is refused with the first record
            behind = ""
        ids = token_ids(behind, Record(turns, None), tokenizer)
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        for count, token in enumerate(ids, 1):
            if token in special:
                return ids[:count]
    return [tokenizer.eos_token_id]


def opens_again(record: Record, tokenizer: "PreTrainedTokenizerBase", settings: EvalDataConfig) -> str:
    """What the template has written and the record's answer writes once more, such as `<think>`; "" for nothing."""
    answer = (record.answer or "").strip()
    if settings.prompt_template == "chat":
        opened, closed = (chat_text(record, record.messages, tokenizer, settings, o) for o in (True, False))
        opening = opened.removeprefix(closed)
        if opening in ("", opened):  # a template that opens every answer or none: its last line, where it is a tag
            last_line = opened.rstrip().rpartition("\n")[2]
            opening = last_line * last_line.startswith("<")
    else:
        opening = PLACE.split(_plain_template(record, settings.prompt_template))[-1]
    tag = TAG.match(answer)
    if tag and tag[1] in opening:
        return tag[1]
    endings = (opening[mark.end() :].strip() for mark in re.finditer(r"^|\n|(?=<)|(?=\[)", opening))
    return next((text for text in endings if len(text) > 1 and answer.startswith(text)), "")


def earlier_turns(
    record: Record, prompt: list[int], tokenizer: "PreTrainedTokenizerBase", settings: EvalDataConfig
) -> list[tuple[int, int]]:
    """Where the assistant's earlier turns stand in the token ids of the prompt: [start, end) each, what ends the turn
    included.

    They come from rendering the conversation up to each turn and comparing token ids, never from searching for text;
    of a template that marks them itself ({% generation %}), from its marks.
    Raises DataError, which names the record, where the template renders a turn differently once more turns follow.
    """
    if settings.prompt_template != "chat":
        return []
    if MARKED.search(_template(record, tokenizer)):
        return _marked_turns(record, prompt, tokenizer, settings)
    spans = []
    for i, message in enumerate(record.messages):
        if message["role"] != "assistant":
            continue
        before, after = (
            _ids(chat_text(record, messages, tokenizer, settings, open_answer), record, tokenizer, settings)
            for messages, open_answer in ((record.messages[:i], True), (record.messages[: i + 1], False))
        )
        start, end = len(before), len(after)
        if not 0 < start < end or prompt[:start] != before or prompt[:end] != after:
            raise DataError(
                f"{record.where}, message {i + 1}: the tokenizer's chat template renders this turn of the assistant "
                "differently when others follow, so it cannot be learnt within the conversation. Split the record "
                "into one for each turn, or set data.train_on to last"
            )
        spans.append((start, _without_blanks(prompt[:end], start, tokenizer)))
    return spans


def _marked_turns(
    record: Record, prompt: list[int], tokenizer: "PreTrainedTokenizerBase", settings: EvalDataConfig
) -> list[tuple[int, int]]:
    """Spans of the prompt's token ids whose characters the template marks."""
    text, characters = _rendered(record, record.messages, tokenizer, settings, open_answer=True)
    with foreign(f"{record.where}: this tokenizer does not tell where its tokens stand in a text", DataError):
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    dropped = len(found["input_ids"]) - len(prompt)  # a begin-of-sequence that stood there twice
    inside = [
        any(first < end and last > start for start, end in characters)
        for first, last in found["offset_mapping"][dropped:]
    ]
    edges = [i for i in range(len(inside) + 1) if ([*inside, False])[i] != ([False, *inside])[i]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _plain_template(record: Record, template: str) -> str:
    return ALPACA[bool(record.input)] if template == "alpaca" else template


def _plain_text(record: Record, template: str) -> str:
    if [message["role"] for message in record.messages] != ["user"] or record.tools:
        raise DataError(
            f"{record.where} is a conversation ({_roles(record)}{', with tools' * bool(record.tools)}), and the "
            "template has a place for one prompt of the user alone: set data.prompt_template to chat, or write the "
            "record as one `prompt`"
        )
    prompt = record.prompt
    fields = {"prompt": prompt}
    if template == "alpaca":
        instruction = prompt.removesuffix(f"\n\n{record.input}") if record.input else prompt
        fields = {"instruction": instruction, "input": record.input}
    # one pass: what was filled in is text of the record, in which braces mean nothing
    return re.sub(rf"\{{({'|'.join(fields)})\}}", lambda match: fields[match[1]], _plain_template(record, template))


def _ids(text: str, record: Record, tokenizer: "PreTrainedTokenizerBase", settings: EvalDataConfig) -> list[int]:
    ids = token_ids(text, record, tokenizer)
    if settings.prompt_template != "chat":
        opening = _in_front(tokenizer)
        if ids[: len(opening)] != opening:
            ids = [*opening, *ids]
    while tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        ids = ids[1:]
    return ids


def _in_front(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """What the tokenizer puts in front of a text of its own accord."""
    bare, framed = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    starts = range(len(framed) - len(bare) + 1)
    return next((framed[:k] for k in starts if framed[k : k + len(bare)] == bare), [])


def _check_complete(text: str, record: Record, tokenizer: "PreTrainedTokenizerBase", settings: EvalDataConfig) -> None:
    """Raises DataError for turns, tool calls or tools that the chat template leaves out without a word."""
    for i, message in enumerate(record.messages, 1):
        content = message["content"].strip()
        if message["role"] == "assistant":  # many templates leave the thoughts of earlier turns out, as they should
            content = content.rpartition("</think>")[2].strip()
        quoted = json.dumps(content, ensure_ascii=False)[1:-1]
        if content not in text and quoted not in text:
            raise DataError(_left_out(record, f"the text of message {i} ({message['role']})"))
    for what, less in (
        ("its tool calls", record._replace(messages=[_without_calls(message) for message in record.messages])),
        ("its `tools`", record._replace(tools=())),
    ):
        if less != record and chat_text(less, less.messages, tokenizer, settings) == text:
            raise DataError(_left_out(record, what))


def _left_out(record: Record, what: str) -> str:
    return (
        f"{record.where}: the tokenizer's chat template leaves out {what}, so the model would learn from another "
        "conversation. Write what it is to read into turns that the template knows, or leave the record out"
    )


def _without_calls(message: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key not in ("tool_calls", "function_call")}
