"""Data: records of a few usual forms → prompts, answers and text as token ids → batches.

Padding is on the right and masks come from lengths, never from comparing ids with the pad token: where pad and
end-of-sequence are one token, that comparison drops the end of every answer from the loss.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from minillm.config.schema import DataConfig
from minillm.data.sources import DataError, locate, rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMS = (
    '{"messages": [{"role": …, "content": …}, …]}, {"prompt": …, "completion": …} or '
    '{"instruction": …, "input": …, "output": …}; the answer may be absent where only prompts are needed, or a list '
    'of equally right ones, of which training takes the first; "options" are answers to choose from'
)
ALPACA = (  # of the paper, for records without and with input
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n",
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
)


class Record(NamedTuple):
    """One conversation up to the answer, and the answer where there is one."""

    messages: list[dict[str, str]]
    answer: str | None
    where: str = "the prompt"
    """The source and number it came from, for messages."""
    input: str = ""
    """What the prompt ends with, where the source keeps instruction and input apart."""
    alternatives: tuple[str, ...] = ()
    """Other answers that are as right."""
    options: tuple[str, ...] = ()
    """Answers to choose from, the right one among them."""

    @property
    def references(self) -> list[str]:
        """All right answers."""
        return [] if self.answer is None else [self.answer, *self.alternatives]

    @property
    def prompt(self) -> str:
        return "\n\n".join(message["content"] for message in self.messages)


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
    policy: PolicyConstants | None = None
    teacher_states: Tensor | None = None
    """[T, H] final states of the teacher, each predicting the token of its position."""


class Encoded(NamedTuple):
    """Examples, and what became of the records that they were made of."""

    examples: list[Example]
    records: int
    overlong: int
    cut: int
    empty: int

    def __str__(self) -> str:
        counts = (
            (self.overlong, "overlong prompts left out"),
            (self.empty, "empty answers left out"),
            (self.cut, "answers cut"),
        )
        told = ", ".join(f"{count} {what}" for count, what in counts if count)
        return f"{len(self.examples)} of {self.records} records" + (f" ({told})" if told else "")


class Batch(NamedTuple):
    """Right-padded rows; `predict` marks the positions whose next token counts, `targets` are those tokens.

    input_ids [B, T], attention_mask [B, T], predict [B, T] bool, targets [N] in the row-major order of `predict`.
    position_ids [B, T] where rows hold several sequences: each counts from 0 and attends to itself alone.
    policy [N] each and teacher_states [N, H], in the order of `targets`, where the responses were sampled and the
    method needs them.
    """

    input_ids: Tensor
    attention_mask: Tensor
    predict: Tensor
    targets: Tensor
    position_ids: Tensor | None = None
    policy: PolicyConstants | None = None
    teacher_states: Tensor | None = None

    @classmethod
    def of(cls, examples: Sequence[Example], row_length: int = 0) -> "Batch":
        """Examples side by side, as in `collate`, with what their rollout fixed."""
        batch = collate([e.prompt for e in examples], [e.response for e in examples], row_length)
        policies = [e.policy for e in examples if e.policy is not None]
        states = [e.teacher_states for e in examples if e.teacher_states is not None]
        return batch._replace(
            policy=PolicyConstants.concatenate(policies) if policies else None,
            teacher_states=torch.cat(states) if states else None,
        )

    def to(self, device: torch.device) -> "Batch":
        tensors: dict[str, Any] = {k: x.to(device) for k, x in self._asdict().items() if isinstance(x, Tensor)}
        policy = None if self.policy is None else PolicyConstants(*(x.to(device) for x in self.policy))
        return self._replace(policy=policy, **tensors)

    def inputs(self) -> dict[str, Any]:
        """What a model reads. Without a mask, transformers separates packed sequences where positions restart."""
        if self.position_ids is None:
            return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return {"input_ids": self.input_ids, "attention_mask": None, "position_ids": self.position_ids}


def read_records(source: str) -> list[Record]:
    """Records of any source that minillm/data/sources.py knows.

    Raises FileNotFoundError, or DataError for an empty set or a record of no known form.
    """
    records = [_record(row, where) for where, row in rows(source)]
    if not records:
        raise DataError(f"{source} is empty: expected records of the form {FORMS}")
    return records


def read_text(source: str) -> list[str]:
    """Documents of a .txt file (one), or of the column `text` of any other source."""
    path = locate(source)
    if path is not None and path.suffix == ".txt":
        documents = [path.read_text()]
    else:
        documents = []
        for where, row in rows(source):
            if not isinstance(row.get("text"), str):
                raise DataError(f"{where}: found the columns {sorted(row)}; plain text needs `text`")
            documents.append(row["text"])
    if not any(document.strip() for document in documents):
        raise DataError(f"{source} holds no text")
    return documents


def encode(
    records: Sequence[Record],
    tokenizer: "PreTrainedTokenizerBase",
    template: str,
    data: DataConfig,
    source: str,
    answers: bool = False,
) -> Encoded:
    """Tokenise prompts, in the template, and answers; with `answers`, only records that have one.

    A prompt above data.max_prompt_length, and an answer of nothing but white space, is an error or left out, as
    data.overlong_prompts and data.empty_answers say. An answer is cut at data.max_response_length and then carries no
    end-of-sequence, so that nothing teaches the model to stop there.
    """
    if template == "chat" and tokenizer.chat_template is None:
        raise DataError(
            "the tokenizer has no chat template: set data.prompt_template to alpaca, or to a text with {prompt}, "
            'such as "### Instruction:\\n{prompt}\\n\\n### Response:\\n"'
        )
    examples, overlong, empty, cut = [], [], [], 0
    for record in records:
        prompt = encode_prompt(record, tokenizer, template)
        if len(prompt) > data.max_prompt_length:
            overlong.append((record, len(prompt)))
            continue
        if answers and not (record.answer or "").strip():
            empty.append(record)
            continue
        response: list[int] = []
        if record.answer is not None:
            response = [*tokenizer.encode(record.answer, add_special_tokens=False), tokenizer.eos_token_id]
        cut += len(response) > data.max_response_length
        examples.append(Example(record, prompt, response[: data.max_response_length]))
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
        why = f"every prompt is longer than data.max_prompt_length = {data.max_prompt_length}"
        raise DataError(f"{source}: {why if overlong else 'no record has an answer'}")
    return Encoded(examples, len(records), len(overlong), cut, len(empty))


def encode_prompt(record: Record, tokenizer: "PreTrainedTokenizerBase", template: str) -> list[int]:
    """Token ids of the prompt in a template. Chat templates and the paper's bring all special tokens themselves."""
    if template == "chat":
        text = tokenizer.apply_chat_template(record.messages, tokenize=False, add_generation_prompt=True)
    elif template == "alpaca":
        instruction = record.prompt.removesuffix(f"\n\n{record.input}") if record.input else record.prompt
        text = ALPACA[bool(record.input)].replace("{instruction}", instruction).replace("{input}", record.input)
    else:
        text = template.replace("{prompt}", record.prompt)
    return tokenizer.encode(text, add_special_tokens=template not in ("chat", "alpaca"))


def show(example: Example, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The example as its tokens read, what is learnt from between ⟦ and ⟧: by the mask of its batch, not by intent."""
    batch = collate([example.prompt], [example.response])
    learnt = [False, *batch.predict[0, :-1].tolist()]
    pieces: list[tuple[bool, list[int]]] = []
    for token, counts in zip(batch.input_ids[0].tolist(), learnt, strict=True):
        if not pieces or pieces[-1][0] != counts:
            pieces.append((counts, []))
        pieces[-1][1].append(token)
    texts = [(counts, str(tokenizer.decode(ids))) for counts, ids in pieces]
    return "".join(f"⟦{text}⟧" if counts else text for counts, text in texts)


def chunk_text(documents: Sequence[str], tokenizer: "PreTrainedTokenizerBase", length: int) -> list[list[int]]:
    """Documents joined by end-of-sequence, in chunks of `length` tokens; an incomplete last one is dropped."""
    stream: list[int] = []
    for ids in tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]:
        stream += [*ids, tokenizer.eos_token_id]
    chunks = [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
    if not chunks:
        raise DataError(f"the text has {len(stream)} tokens, fewer than one chunk of objective.pt_length = {length}")
    return chunks


def collate(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], row_length: int = 0) -> Batch:
    """Sequences prompt + response in which every response token counts. Prompts are not empty; a response may be.

    With `row_length`, neighbours share a row as long as they fit into that many tokens; the order stays.
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
    predict = torch.zeros(shape, dtype=torch.bool)
    for r, row in enumerate(layout):
        start = 0
        for i in row:
            end = start + lengths[i]
            input_ids[r, start:end] = torch.tensor([*prompts[i], *responses[i]])
            attention_mask[r, start:end] = 1
            position_ids[r, start:end] = torch.arange(lengths[i])
            predict[r, start + len(prompts[i]) - 1 : end - 1] = True
            start = end
    targets = torch.tensor([token for response in responses for token in response], dtype=torch.long)
    return Batch(input_ids, attention_mask, predict, targets, position_ids if row_length else None)


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


def _record(row: dict[str, Any], where: str) -> Record:
    extra = ""
    if "messages" in row:
        messages, answer = row["messages"], None
        if not messages or not all({"role", "content"} <= message.keys() for message in messages):
            raise DataError(f"{where}: `messages` must be a list of objects with `role` and `content`")
        if messages[-1]["role"] == "assistant":
            messages, answer = messages[:-1], messages[-1]["content"]
    else:
        if "instruction" in row:
            prompt, extra, answer = row["instruction"], row.get("input") or "", row.get("output")
        elif "prompt" in row:
            prompt, answer = row["prompt"], row.get("completion")
        else:
            raise DataError(f"{where}: found the columns {sorted(row)}; expected {FORMS}")
        if not isinstance(prompt, str) or not isinstance(extra, str):
            raise DataError(f"{where}: prompt and answer must be text; conversations go into `messages`")
        messages = [{"role": "user", "content": f"{prompt}\n\n{extra}" if extra else prompt}]
    answers, options = answer if isinstance(answer, list) else [answer], row.get("options") or []
    if not answers or not all(isinstance(text, str) for text in answers if answers != [None]):
        raise DataError(f"{where}: prompt and answer must be text, or the answer a list of texts")
    if not isinstance(options, list) or not all(isinstance(option, str) and option for option in options):
        raise DataError(f"{where}: `options` must be a list of texts to choose the answer from")
    if options and (len(set(options)) < 2 or answers[0] not in options):
        raise DataError(f"{where}: `options` must be at least two, and hold the answer {answers[0]!r}")
    return Record(messages, answers[0], where, extra, tuple(map(str, answers[1:])), tuple(options))
