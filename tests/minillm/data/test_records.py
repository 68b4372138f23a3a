"""Rows → records: what messages may hold, and what is refused by file and record instead of being learnt wrongly."""

import json

import pytest

from minillm.data.examples import read_records, read_text
from minillm.data.records import to_record
from minillm.data.sources import DataError

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}


def text(*parts):
    return [{"type": "text", "text": part} for part in parts]


def call(arguments='{"a": 1}', **keys):
    return {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}],
    } | keys


def test_parts_of_text_are_joined():
    messages = [{"role": "user", "content": text("Say ", "hi")}, {"role": "assistant", "content": text("H", "i")}]
    record = to_record({"messages": messages}, "x")
    assert record.messages == [{"role": "user", "content": "Say hi"}] and record.answer == "Hi"


def test_a_call_has_text_and_its_arguments_as_an_object():
    """As chat templates read them; a table's null columns are no keys."""
    messages = [USER, call(content=None, name=None), {"role": "tool", "content": "2", "tool_calls": None}, ANSWER]
    record = to_record({"messages": messages}, "x")
    assert record.messages[1]["content"] == "" and "name" not in record.messages[1]
    assert record.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert record.messages[2] == {"role": "tool", "content": "2"}


def test_tools_are_read_from_objects_or_json():
    tools = [{"type": "function", "function": {"name": "f"}}]
    for given in (tools, json.dumps(tools)):
        assert to_record({"messages": [USER], "tools": given}, "x").tools == tuple(tools)
    assert to_record({"prompt": "a hammer", "tools": "hammer"}, "x").tools == ()


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": None}], r"record 7, message 1 \(user\): `content` is missing or null"),
        ([USER, {"role": "assistant"}], r"message 2 \(assistant\): `content` is missing or null"),
        ([USER, {"role": "assistant", "content": None, "tool_calls": []}], "`content` is missing or null"),
        ([{"role": "user", "content": {"text": "Hi"}}], "`content` is an object; expected text, or a list of parts"),
        ([{"role": "user", "content": 3}], "`content` is 3"),
        ([{"role": "user", "content": [{"type": "image", "image": "a.png"}]}], "holds a part of type 'image'; only"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "holds a part of type 'text'"),
        ([{"role": "user", "content": ["Hi"]}], "`content` holds a text"),
        ([{"role": "user", "content": [{"text": "Hi"}]}], "`content` holds an object"),
        ([{"role": None, "content": "Hi"}], "message 1: `role` is None; expected text"),
        ([{"role": 1, "content": "Hi"}], "message 1: `role` is 1; expected text"),
        ([{"content": "Hi"}], "message 1: `role` is None"),
        (["Hi"], "must be a list of objects"),
        ("Hi", "must be a list of objects"),
        (None, "must be a list of objects"),
        ({"role": "user", "content": "Hi"}, "must be a list of objects"),
        ([], "at least one"),
        ([ANSWER], "`messages` holds an answer alone"),
        ([USER, call("{"), ANSWER], r"message 2: the arguments of f are not JSON"),
        ([USER, {"role": "assistant", "tool_calls": [{}]}, ANSWER], "message 2: a tool call must be"),
        ([USER, {"role": "assistant", "tool_calls": "f()"}, ANSWER], "message 2: a tool call must be"),
        ([{"role": "user", "content": "\ud83d"}], r"record 7 holds '\\ud83d', half of a surrogate pair"),
    ],
)  # fmt: skip
def test_other_messages_are_refused_by_record(messages, message):
    with pytest.raises(DataError, match=message) as error:
        to_record({"messages": messages}, "a.jsonl, record 7")
    assert str(error.value).startswith("a.jsonl, record 7")


@pytest.mark.parametrize(
    "row", [{"prompt": "\ud83d"}, {"prompt": "a", "completion": ["b", "\ude00"]}, {"text": "\ud83d"}]
)
def test_half_of_a_surrogate_pair_is_no_text(tmp_path, row):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(DataError, match=r"a.jsonl, record 1 holds '\\ud[0-9a-f]{3}', half of a surrogate pair"):
        read_text(str(path)) if "text" in row else read_records(str(path))
