"""Data: records → prompts, answers and text as token ids → batches.

Padding is on the right and masks come from lengths, never from comparing ids with the pad token: where pad and
end-of-sequence are one token, that comparison drops the end of every answer from the loss.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from minillm.config.schema import DataConfig, EvalDataConfig
from minillm.data.privileged import encode_teacher_prompt
from minillm.data.prompts import (
    answer_end,
    check_template,
    earlier_turns,
    encode_prompt,
    encode_turn,
    opens_again,
    token_ids,
)
from minillm.data.records import FORMS, Record, check_characters, to_record
from minillm.data.sources import DataError, locate, rows, whole_text
from minillm.foreign import foreign
from minillm.terminal import printable

if TYPE_CHECKING:
    from concurrent.futures import Future

    from transformers import PreTrainedTokenizerBase


class PolicyConstants(NamedTuple):
    """What a rollout fixes of MiniLLM's loss, [T] of each sampled token: constants of every update that follows."""

    advantages: Tensor
    """R_t of minillm/train/minillm.py."""
    old_logprobs: Tensor
    """log q(y_t) of the student that sampled, in nats."""
    importance_weights: Tensor
    """w_t."""

    @staticmethod
    def concatenate(parts: "Sequence[PolicyConstants]") -> "PolicyConstants":
        """Those of several responses, in the order of their tokens in a batch."""
        return PolicyConstants(*(torch.cat(column) for column in zip(*parts, strict=True)))


class Example(NamedTuple):
    """A prompt and the response to learn from, as token ids.

    A response from the data ends with end-of-sequence unless it was cut. A sampled one may bring what was known when
    it was sampled.
    """

    record: Record
    prompt: list[int]
    response: list[int]
    turns: tuple[tuple[int, int], ...] = ()
    """Spans [start, end) of the prompt that are learnt from as well: earlier turns of the assistant."""
    policy: PolicyConstants | None = None
    teacher_states: Tensor | None = None
    """[T, H] final states of the teacher, each predicting the token of its position."""
    teacher_prompt: list[int] | None = None
    """What the teacher reads before the response, where that is another prompt."""

    @property
    def prompt_of_teacher(self) -> list[int]:
        """What the teacher reads before the response."""
        return self.prompt if self.teacher_prompt is None else self.teacher_prompt


class Encoded(NamedTuple):
    """Examples, and what became of the records that they were made of."""

    examples: list[Example]
    records: int
    overlong: int
    cut: int
    left_out: int
    """Records whose answer is too long."""
    empty: int
    turns: str = ""
    """Which turns of conversations are learnt from, in words."""

    def __str__(self) -> str:
        counts = (
            (self.overlong, "overlong prompts left out"),
            (self.empty, "empty answers left out"),
            (self.left_out, "overlong answers left out"),
            (self.cut, "answers cut"),
        )
        told = ", ".join(f"{count} {what}" for count, what in counts if count)
        return f"{len(self.examples)} of {self.records} records" + (f" ({told})" if told else "") + self.turns


class Batch(NamedTuple):
    """Right-padded rows; `predict` marks the positions whose next token counts, `targets` are those tokens.

    input_ids [B, T], attention_mask [B, T], predict [B, T] bool, targets [N] in the row-major order of `predict`, and
    positions [N], where it is true in the flattened rows.
    position_ids [B, T] where rows hold several sequences: each counts from 0 and attends to itself alone.
    asked: what a teacher that is not here has been asked about this batch.
    policy [N] each and teacher_states [N, H], in the order of `targets`, where the responses were sampled and the
    method needs them.
    teacher holds the same targets in the same order behind the prompts that the teacher reads, where it reads others.
    """

    input_ids: Tensor
    attention_mask: Tensor
    predict: Tensor
    targets: Tensor
    positions: Tensor
    position_ids: Tensor | None = None
    policy: PolicyConstants | None = None
    teacher_states: Tensor | None = None
    asked: "Future[Any] | None" = None
    teacher: "Batch | None" = None

    @classmethod
    def of(cls, examples: Sequence[Example], row_length: int = 0) -> "Batch":
        """Examples side by side, as in `collate`, with what their rollout fixed."""
        responses, turns, teacher = [e.response for e in examples], [e.turns for e in examples], None
        batch = collate([e.prompt for e in examples], responses, row_length, turns)
        if any(e.teacher_prompt is not None for e in examples):
            teacher = collate([e.prompt_of_teacher for e in examples], responses, row_length, turns)
        policies = [e.policy for e in examples if e.policy is not None]
        states = [e.teacher_states for e in examples if e.teacher_states is not None]
        return batch._replace(
            policy=PolicyConstants.concatenate(policies) if policies else None,
            teacher_states=torch.cat(states) if states else None,
            teacher=teacher,
        )

    def to(self, device: torch.device) -> "Batch":
        """The batch there. Nothing waits for it."""

        def moved(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        tensors: dict[str, Any] = {name: moved(x) for name, x in self._asdict().items() if isinstance(x, Tensor)}
        policy = None if self.policy is None else PolicyConstants(*map(moved, self.policy))
        teacher = None if self.teacher is None else self.teacher.to(device)
        return self._replace(policy=policy, teacher=teacher, **tensors)

    @property
    def for_teacher(self) -> "Batch":
        """What the teacher reads."""
        return self if self.teacher is None else self.teacher._replace(asked=self.asked)

    def inputs(self) -> dict[str, Any]:
        """What a model reads. Without a mask, transformers separates packed sequences where positions restart."""
        if self.position_ids is None:
            return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return {"input_ids": self.input_ids, "attention_mask": None, "position_ids": self.position_ids}


def read_records(source: str) -> list[Record]:
    """Records of any source that minillm/data/sources.py knows.

    Raises FileNotFoundError, or DataError for an empty set or a record of no known form.
    """
    records = [to_record(row, where) for where, row in rows(source)]
    if not records:
        raise DataError(f"{source} is empty: expected records of the form {FORMS}")
    return records


def read_text(source: str) -> list[str]:
    """Documents of a .txt file (one), or of the column `text` of any other source."""
    path = locate(source)
    if path is not None and path.suffix == ".txt":
        documents = [whole_text(path)]
    else:
        documents = []
        for where, row in rows(source):
            if not isinstance(row.get("text"), str):
                raise DataError(f"{where}: found the columns {sorted(row)}; plain text needs `text`")
            check_characters({"text": row["text"]}, where)
            documents.append(row["text"])
    if not any(document.strip() for document in documents):
        raise DataError(f"{source} holds no text")
    return documents


def encode(
    records: Sequence[Record],
    tokenizer: "PreTrainedTokenizerBase",
    prompts: EvalDataConfig,
    data: DataConfig,
    source: str,
    answers: bool = False,
) -> Encoded:
    """Tokenise prompts, in the template of `prompts`, and answers; with `answers`, only records that have one.

    A prompt above data.max_prompt_length, and an answer of nothing but white space, is an error or left out, as
    data.overlong_prompts and data.empty_answers say. An answer is cut at data.max_response_length, and then carries no
    end-of-sequence, so that nothing teaches the model to stop there; or its record is left out, as
    data.overlong_answers says. With `answers` and data.train_on = all, the
    assistant's earlier turns are learnt from too.
    """
    check_template(tokenizer, prompts)
    end = answer_end(tokenizer, prompts)
    examples, overlong, empty, cut, left_out = [], [], [], 0, 0
    for record in records:
        prompt = encode_prompt(record, tokenizer, prompts)
        if not prompt:
            raise DataError(
                f"{record.where}: the prompt is empty, and there is nothing before the first token of the answer to "
                "predict it from. Leave the record out, or put text into data.prompt_template"
            )
        if len(prompt) > data.max_prompt_length:
            overlong.append((record, len(prompt)))
            continue
        if answers and record.turn is None and not (record.answer or "").strip():
            empty.append(record)
            continue
        response: list[int] = []
        if record.turn is not None:
            response = encode_turn(record, prompt, tokenizer, prompts)
            record = record._replace(answer=str(tokenizer.decode(response, skip_special_tokens=True)))
        elif record.answer is not None:
            response = [*token_ids(record.answer, record, tokenizer), *end]
            again = opens_again(record, tokenizer, prompts)
            if again:
                raise DataError(
                    f"{record.where}: the answer begins with {again!r}, which the prompt's template has written "
                    "already, so it would stand there twice. Take it out of the answers, or change the template "
                    "(data.prompt_template, data.chat_template_kwargs)"
                )
        if len(response) > data.max_response_length:
            if data.overlong_answers == "drop":
                left_out += 1
                continue
            cut += 1
        learnt = earlier_turns(record, prompt, tokenizer, prompts) if answers and data.train_on == "all" else []
        told = encode_teacher_prompt(record, data.teacher_template, tokenizer, prompts)
        if learnt and told is not None:
            raise DataError(
                f"{record.where}: the teacher reads another prompt, in which the earlier turns of the assistant stand "
                "elsewhere or not at all: set data.train_on to last"
            )
        kept = response[: data.max_response_length]
        examples.append(Example(record, prompt, kept, tuple(learnt), teacher_prompt=told))
    if overlong and data.overlong_prompts == "error":
        record, length = overlong[0]
        raise DataError(
            f"{source}: {len(overlong)} of {len(records)} prompts are longer than data.max_prompt_length = "
            f"{data.max_prompt_length} tokens; the first is {record.where} with {length}. Raise the limit, or set "
            "data.overlong_prompts to drop"
        )
    if empty and data.empty_answers == "error":
        raise DataError(
            f"{source}: {len(empty)} of {len(records)} records have no answer or an empty one, the first "
            f"{empty[0].where}. This stage learns from answers: mend the data, or set data.empty_answers to drop"
        )
    if not examples:
        why = "no record has an answer"
        if overlong or left_out:
            why = (
                f"every prompt is longer than data.max_prompt_length = {data.max_prompt_length} tokens, or its answer "
                f"than data.max_response_length = {data.max_response_length}"
            )
        raise DataError(f"{source}: {why}")
    turns = _turns(examples, data.train_on) if answers else ""
    return Encoded(examples, len(records), len(overlong), cut, left_out, len(empty), turns)


def show(example: Example, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The example as its tokens read, what is learnt from between ⟦ and ⟧: by the mask of its batch, not by intent.

    Control characters are shown by their codes: a terminal obeys some of them.
    """
    batch = collate([example.prompt], [example.response], turns=[example.turns])
    learnt = [False, *batch.predict[0, :-1].tolist()]
    pieces: list[tuple[bool, list[int]]] = []
    for token, counts in zip(batch.input_ids[0].tolist(), learnt, strict=True):
        if not pieces or pieces[-1][0] != counts:
            pieces.append((counts, []))
        pieces[-1][1].append(token)
    texts = [(counts, printable(str(tokenizer.decode(ids)))) for counts, ids in pieces]
    return "".join(f"⟦{text}⟧" if counts else text for counts, text in texts)


def chunk_text(documents: Sequence[str], tokenizer: "PreTrainedTokenizerBase", length: int) -> list[list[int]]:
    """Documents joined by end-of-sequence, in chunks of `length` tokens; an incomplete last one is dropped."""
    stream: list[int] = []
    with foreign("the tokenizer cannot encode the text", DataError):
        encoded = tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
    for ids in encoded:
        stream += [*ids, tokenizer.eos_token_id]
    chunks = [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
    if not chunks:
        raise DataError(f"the text has {len(stream)} tokens, fewer than one chunk of objective.pt_length = {length}")
    return chunks


def collate(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    row_length: int = 0,
    turns: Sequence[Sequence[tuple[int, int]]] | None = None,
) -> Batch:
    """Sequences prompt + response in which every response token counts. Prompts are not empty; a response may be.

    With `row_length`, neighbours share a row as long as they fit into that many tokens; the order stays. With `turns`,
    the tokens of these spans of each prompt count too.
    """
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    layout: list[list[int]] = []  # the sequences of each row
    used = 0
    for i, length in enumerate(lengths):
        if layout and used + length <= row_length:
            layout[-1].append(i)
            used += length
        else:
            layout.append([i])
            used = length
    shape = (len(layout), max(sum(lengths[i] for i in row) for row in layout))
    input_ids = torch.zeros(shape, dtype=torch.long)  # any id: padding is never attended to and never counts
    attention_mask = torch.zeros(shape, dtype=torch.long)
    position_ids = torch.zeros(shape, dtype=torch.long)
    predicting: list[int] = []
    for r, row in enumerate(layout):
        start = 0
        for i in row:
            end = start + lengths[i]
            input_ids[r, start:end] = torch.tensor([*prompts[i], *responses[i]])
            attention_mask[r, start:end] = 1
            position_ids[r, start:end] = torch.arange(lengths[i])
            before = r * shape[1] + start - 1
            for first, last in (*(turns[i] if turns else ()), (len(prompts[i]), lengths[i])):
                predicting += range(before + first, before + last)
            start = end
    positions = torch.tensor(predicting, dtype=torch.long)
    predict = torch.zeros(shape, dtype=torch.bool)
    predict.view(-1)[positions] = True
    targets = input_ids.view(-1)[positions + 1]
    return Batch(input_ids, attention_mask, predict, targets, positions, position_ids if row_length else None)


class Shuffled:
    """Indices below `count` without end, in a new random order each epoch: a function of the seed and the position."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self.drawn, self.order, self.generator = 0, [0], torch.Generator().manual_seed(seed)

    def take(self, start: int, number: int) -> list[int]:
        """Indices at the positions start … start + number - 1; quick when positions grow."""
        return [self._epoch(i // self.count)[i % self.count] for i in range(start, start + number)]

    def _epoch(self, number: int) -> list[int]:
        if number < self.drawn - 1:
            self.drawn, self.generator = 0, self.generator.manual_seed(self.seed)
        while self.drawn <= number:
            self.order = torch.randperm(self.count, generator=self.generator).tolist()
            self.drawn += 1
        return self.order


def _turns(examples: Sequence[Example], train_on: str) -> str:
    """Which turns are learnt from, in words, where conversations have several."""
    earlier = sum(message["role"] == "assistant" for example in examples for message in example.record.messages)
    how = "and" if train_on == "all" else "alone, not"
    told = (
        f"; learnt from: the last answers {how} {earlier} earlier turns of the assistant (data.train_on: {train_on})"
    )
    return told if earlier else ""
