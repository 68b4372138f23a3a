"""Prompts that the teacher alone reads."""

from concurrent.futures import Future

import pytest
import torch

from minillm.config.schema import DataConfig, EvalDataConfig
from minillm.data.examples import Batch, Example, encode
from minillm.data.records import Record, to_record
from minillm.data.sources import DataError

ROW = {"prompt": "2+2?", "completion": "4", "hint": "even"}


def encoded(rows, tokenizer, **data):
    records = [to_record(row, f"row {i}") for i, row in enumerate(rows, 1)]
    return encode(records, tokenizer, EvalDataConfig(), DataConfig(**data), "rows", answers=True).examples


def text(tokenizer, ids):
    return None if ids is None else tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("row", "template", "expected"),
    [
        ({}, "", None),
        ({"teacher_prompt": "4. 2+2?"}, "", "[user]4. 2+2?>"),
        ({"teacher_prompt": "4. 2+2?"}, "{prompt} ({answer})", "[user]4. 2+2?>"),
        ({}, "{prompt} ({answer}, {hint})", "[user]2+2? (4, even)>"),
        ({"prompt": "{answer}?"}, "{prompt} {answer}", "[user]{answer}? 4>"),
        ({"teacher_prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]}, "",
         "[system]S[user]U>"),
        ({"prompt": None, "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "2+2?"},
          {"role": "assistant", "content": "4"}]}, "{prompt}={answer}", "[system]S[user]2+2?=4>"),
    ],
)  # fmt: skip
def test_what_the_teacher_reads(tokenizer, row, template, expected):
    row = {key: value for key, value in {**ROW, **row}.items() if value is not None}
    (example,) = encoded([row], tokenizer, teacher_template=template)
    assert text(tokenizer, example.teacher_prompt) == expected
    assert tokenizer.decode(example.response) == "4<eos>"  # whatever the teacher is told


@pytest.mark.parametrize("row_length", [0, 40])
def test_the_teacher_predicts_the_same_tokens_behind_its_own_prompt(tokenizer, row_length):
    rows = [{"prompt": "a" * n, "completion": "xyz"[: n % 3 + 1]} for n in (3, 1, 7, 2)]
    rows[0]["teacher_prompt"], rows[2]["teacher_prompt"] = "b" * 11, "c"
    examples = encoded(rows, tokenizer)
    batch = Batch.of(examples, row_length).to(torch.device("cpu"))
    teacher = batch.for_teacher
    assert torch.equal(teacher.targets, batch.targets)
    for one in (batch, teacher):
        assert torch.equal(one.input_ids.flatten()[one.positions + 1], batch.targets)
    told = [len(e.teacher_prompt) if e.teacher_prompt else len(e.prompt) for e in examples]
    lengths = [n + len(e.response) for n, e in zip(told, examples, strict=True)]
    assert int(teacher.attention_mask.sum()) == sum(lengths)
    plain = Batch.of([e._replace(teacher_prompt=None) for e in examples])
    assert plain.for_teacher is plain


@pytest.mark.parametrize(
    ("row", "data", "message"),
    [
        ({"hint": ""}, {"teacher_template": "{prompt} {hint}"}, r"row 1: data.teacher_template asks for \{hint\}"),
        ({"teacher_prompt": 3}, {}, "`messages` must be a list"),
        ({"teacher_prompt": [{"role": "assistant", "content": "4"}]}, {}, "ends with an answer"),
        ({"teacher": 3}, {}, "`teacher` is 3; expected text"),
        ({"prompt": None, "teacher_prompt": "x", "messages": [{"role": r, "content": c} for r, c in
          (("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"))]}, {"train_on": "all"},
         "the teacher reads another prompt, in which the earlier turns"),
    ],
)  # fmt: skip
def test_records_that_cannot_be(tokenizer, row, data, message):
    tokenizer.chat_template = tokenizer.chat_template.replace(">", "[assistant]")  # turns stay as they are
    row = {key: value for key, value in {**ROW, **row}.items() if value is not None}
    with pytest.raises(DataError, match=message):
        encoded([row], tokenizer, **data)


def test_what_was_asked_ahead_goes_with_the_batch_that_the_teacher_reads():
    """An answer that is lost here would be asked for again, about the prompts of the student."""
    answer: Future = Future()
    batch = Batch.of([Example(Record([], None, "x"), [1, 2], [3, 4], teacher_prompt=[5, 6, 7])])._replace(asked=answer)
    assert batch.for_teacher.asked is answer
    assert batch.for_teacher.input_ids.tolist() == [[5, 6, 7, 3, 4]]
    assert batch.for_teacher.targets.tolist() == batch.targets.tolist() == [3, 4]
