"""Records: rows of a few usual forms → one conversation up to the answer, and the answer where there is one."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from minillm.data.sources import DataError

FORMS = (
    '{"messages": [{"role": …, "content": …}, …]}, {"prompt": …, "completion": …} or '
    '{"instruction": …, "input": …, "output": …}; the answer may be absent where only prompts are needed, or a list '
    'of equally right ones, of which training takes the first; "options" are answers to choose from'
)
BESIDE_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""What an answer may hold beside its content, for a chat template to write."""


class Record(NamedTuple):
    """One conversation up to the answer, and the answer where there is one."""

    messages: list[dict[str, Any]]
    """`role` and `content`, both text, and what else a chat template may read, such as `tool_calls`."""
    answer: str | None
    where: str = "the prompt"
    """The source and number it came from, for messages."""
    input: str = ""
    """What the prompt ends with, where the source keeps instruction and input apart."""
    alternatives: tuple[str, ...] = ()
    """Other answers that are as right."""
    options: tuple[str, ...] = ()
    """Answers to choose from, the right one among them."""
    tools: tuple[dict[str, Any], ...] = ()
    """Definitions of the tools that the conversation may call, for the chat template."""
    teacher_messages: list[dict[str, Any]] | None = None
    """What the teacher reads in the place of `messages`, where it is told more than the student."""
    hint: str = ""
    """What data.teacher_template may tell the teacher."""
    teacher: str = ""
    """Which of several teachers teaches it."""
    turn: dict[str, Any] | None = None
    """The whole message of an answer that has more than content, such as `tool_calls`."""

    @property
    def references(self) -> list[str]:
        """All right answers."""
        return [] if self.answer is None else [self.answer, *self.alternatives]

    @property
    def prompt(self) -> str:
        """The texts of the conversation, without the roles."""
        return "\n\n".join(message["content"] for message in self.messages)


def to_record(row: Mapping[str, Any], where: str) -> Record:
    """A row of one of the FORMS as a record. Raises DataError, which says `where` the row stands."""
    check_characters(row, where)
    extra, tools, turn = "", None, None
    if "messages" in row:
        messages, answer, tools = _conversation(row["messages"], where), None, row.get("tools")
        if messages[-1]["role"] == "assistant":
            turn = messages.pop()
            answer = turn["content"]
            if not messages:
                raise DataError(f"{where}: `messages` holds an answer alone: expected a prompt before it")
    else:
        if "instruction" in row:
            prompt, extra, answer = row["instruction"], row.get("input") or "", row.get("output")
        elif "prompt" in row:
            prompt, answer = row["prompt"], row.get("completion")
        else:
            raise DataError(f"{where}: found the columns {sorted(map(str, row))}; expected {FORMS}")
        if not isinstance(prompt, str) or not isinstance(extra, str):
            raise DataError(f"{where}: prompt and answer must be text; conversations go into `messages`")
        messages = [{"role": "user", "content": f"{prompt}\n\n{extra}" if extra else prompt}]
    first, others = _answers(answer, where)
    options = _options(row.get("options"), first, where)
    told = _teacher_messages(row.get("teacher_prompt"), messages, where)
    hint, teacher = (_text(row, key, where) for key in ("hint", "teacher"))
    turn = turn if turn and any(turn.get(key) for key in BESIDE_CONTENT) else None
    return Record(messages, first, where, extra, others, options, _tools(tools, where), told, hint, teacher, turn)


def every_turn(record: Record) -> list[Record]:
    """A record of each turn of the assistant: the conversation before it, and the turn as the answer. Raises DataError
    for one whose teacher reads a prompt of its own, which is that of one turn."""
    earlier = [i for i, message in enumerate(record.messages) if i > 0 and message["role"] == "assistant"]
    if earlier and record.teacher_messages is not None:
        raise DataError(
            f"{record.where}: `teacher_prompt` is for one turn, and data.rollout_turns asks for all of them: use "
            "data.teacher_template, or set data.rollout_turns to last"
        )
    turns = [
        record._replace(
            messages=record.messages[:i],
            answer=record.messages[i]["content"],
            where=f"{record.where}, message {i + 1}",
            alternatives=(),
            options=(),
            turn=record.messages[i] if any(record.messages[i].get(key) for key in BESIDE_CONTENT) else None,
        )
        for i in earlier
    ]
    return [*turns, record]


def check_characters(row: Mapping[str, Any], where: str) -> None:
    """Raises DataError for half of a surrogate pair: JSON can write it (\\ud83d), but it is no character."""
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise DataError(
            f"{where} holds {half!a}, half of a surrogate pair, which is no character: the text was cut inside a "
            "character or wrongly decoded. Write it anew, or leave the record out"
        ) from error


def _conversation(messages: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages or not all(isinstance(m, Mapping) for m in messages):
        raise DataError(f"{where}: `messages` must be a list of objects with `role` and `content`, at least one")
    return [_message(message, f"{where}, message {i}") for i, message in enumerate(messages, 1)]


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    found = {key: value for key, value in message.items() if value is not None}  # a table fills columns with null
    role, content = found.get("role"), found.get("content")
    if not isinstance(role, str):
        raise DataError(f"{where}: `role` is {role!r}; expected text, such as user or assistant")
    calls = found.pop("tool_calls", None)
    if calls:
        found["tool_calls"] = [_call(call, where) for call in (calls if isinstance(calls, list) else [calls])]
    if content is None and calls:
        content = ""
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in content)
    if not isinstance(content, str):
        raise DataError(
            f"{where} ({role}): `content` is {_kind(content)}; expected text, or a list of parts of the form "
            '{"type": "text", "text": …}'
        )
    return {**found, "content": content}


def _part(part: Any, where: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = f"a part of type {part['type']!r}" if isinstance(part, Mapping) and "type" in part else _kind(part)
    raise DataError(f'{where}: `content` holds {kind}; only text is learnt: expected {{"type": "text", "text": …}}')


def _call(call: Any, where: str) -> dict[str, Any]:
    """With its arguments as an object: chat templates write them as JSON, and text would be quoted once more."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f'{where}: a tool call must be {{"function": {{"name": …, "arguments": …}}}}')
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise DataError(f"{where}: the arguments of {function['name']} are not JSON ({error})") from error
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def _answers(answer: Any, where: str) -> tuple[str | None, tuple[str, ...]]:
    """The answer, and the others that are as right."""
    if answer is None or answer == [None]:
        return None, ()
    answers = answer if isinstance(answer, list) else [answer]
    if not answers or not all(isinstance(text, str) for text in answers):
        raise DataError(f"{where}: prompt and answer must be text, or the answer a list of texts")
    return answers[0], tuple(answers[1:])


def _options(options: Any, answer: str | None, where: str) -> tuple[str, ...]:
    options = options or []
    if not isinstance(options, list) or not all(isinstance(option, str) and option for option in options):
        raise DataError(f"{where}: `options` must be a list of texts to choose the answer from")
    if options and (len(set(options)) < 2 or answer not in options):
        raise DataError(f"{where}: `options` must be at least two, and hold the answer {answer!r}")
    return tuple(options)


def _teacher_messages(told: Any, messages: list[dict[str, Any]], where: str) -> list[dict[str, Any]] | None:
    """A text takes the place of the last message, a list that of the whole conversation."""
    if told is None:
        return None
    if isinstance(told, str):
        return [*messages[:-1], {**messages[-1], "content": told}]
    found = _conversation(told, f"{where}, teacher_prompt")
    if found[-1]["role"] == "assistant":
        raise DataError(f"{where}: `teacher_prompt` ends with an answer; expected what the teacher reads before one")
    return found


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    found = row.get(key)
    if found is None or isinstance(found, str):
        return found or ""
    raise DataError(f"{where}: `{key}` is {_kind(found)}; expected text")


def _tools(tools: Any, where: str) -> tuple[dict[str, Any], ...]:
    if isinstance(tools, str) and tools.strip():  # of a table, whose columns cannot hold objects of any form
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise DataError(f"{where}: `tools` is not JSON ({error})") from error
    tools = tools or []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"{where}: `tools` must be a list of objects that each define a function")
    return tuple(map(dict, tools))


def _kind(value: Any) -> str:
    if value is None:
        return "missing or null"
    return {"dict": "an object", "list": "a list", "str": "a text"}.get(type(value).__name__, repr(value))
