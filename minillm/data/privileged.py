"""What the teacher reads in the place of a record's prompt, where it is told more than the student."""

import re
from typing import TYPE_CHECKING

from minillm.config.schema import EvalDataConfig
from minillm.data.prompts import encode_prompt
from minillm.data.records import Record
from minillm.data.sources import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACE = re.compile(r"\{(prompt|answer|hint)\}")


def encode_teacher_prompt(
    record: Record, template: str, tokenizer: "PreTrainedTokenizerBase", settings: EvalDataConfig
) -> list[int] | None:
    """Token ids of what the teacher reads before the response; None where it is the student's prompt.

    Args:
        record: its own `teacher_prompt` goes before the template.
        template: data.teacher_template; in it {prompt} is the last message, {answer} the record's answer, {hint} its
            column. The result takes the place of the last message.
        tokenizer, settings: as for the student's prompt: the same template of the conversation around it.

    Raises DataError for a record without what the template asks for.
    """
    messages = record.teacher_messages
    if messages is None and template:
        *earlier, last = record.messages
        known = {"prompt": last["content"], "answer": record.answer or "", "hint": record.hint}
        for name in PLACE.findall(template):
            if not known[name].strip():
                raise DataError(
                    f"{record.where}: data.teacher_template asks for {{{name}}}, which it has not: give it one, "
                    "or its own `teacher_prompt`"
                )
        # one pass: what was filled in is text of the record, in which braces mean nothing
        messages = [*earlier, {**last, "content": PLACE.sub(lambda place: known[place[1]], template)}]
    if messages is None:
        return None
    return encode_prompt(record._replace(messages=messages, input=""), tokenizer, settings)
