"""Data: records of a few usual forms → prompts, answers and text as token ids → batches.

Padding is on the right and masks come from lengths, never from comparing ids with the pad token: where pad and
end-of-sequence are one token, that comparison drops the end of every answer from the loss.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from minillm import packages
from minillm.config import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMS = (
    '{"messages": [{"role": …, "content": …}, …]}, {"prompt": …, "completion": …} or '
    '{"instruction": …, "input": …, "output": …}; the answer may be absent where only prompts are needed'
)
ALPACA = "{instruction}\n\n{input}"


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the record and what was expected."""


class Record(NamedTuple):
    """One conversation up to the answer, and the answer where there is one."""

    messages: list[dict[str, str]]
    answer: str | None

    @property
    def prompt(self) -> str:
        return "\n\n".join(message["content"] for message in self.messages)


class Example(NamedTuple):
    """A record as token ids; the answer ends with end-of-sequence unless it was cut."""

    record: Record
    prompt: list[int]
    response: list[int]


class Batch(NamedTuple):
    """Right-padded sequences; `predict` marks positions whose next token counts, `targets` are those tokens.

    input_ids [B, T], attention_mask [B, T], predict [B, T] bool, targets [N] in the row-major order of `predict`.
    """

    input_ids: Tensor
    attention_mask: Tensor
    predict: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device) for tensor in self))


def read_records(source: str) -> list[Record]:
    """Records of a JSONL file or `package:NAME`.

    Raises FileNotFoundError, or DataError for an empty set or a record of no known form.
    """
    path = _locate(source)
    records = [_record(row, f"{path}, record {i}") for i, row in enumerate(_rows(path), 1)]
    if not records:
        raise DataError(f"{path} is empty: expected one JSON object a line, of the form {FORMS}")
    return records


def read_text(source: str) -> list[str]:
    """Documents of a .txt file (one), of a JSONL file with the key `text`, or of `package:NAME`."""
    path = _locate(source)
    if path.suffix == ".txt":
        documents = [path.read_text()]
    else:
        rows = list(_rows(path))
        for i, row in enumerate(rows, 1):
            if not isinstance(row.get("text"), str):
                raise DataError(f"{path}, record {i}: found the columns {sorted(row)}; plain text needs `text`")
        documents = [row["text"] for row in rows]
    if not any(document.strip() for document in documents):
        raise DataError(f"{path} holds no text")
    return documents


def encode(records: Sequence[Record], tokenizer: "PreTrainedTokenizerBase", data: Data, source: str) -> list[Example]:
    """Tokenise prompts and answers.

    A prompt above data.max_prompt_length is an error or left out, as data.overlong_prompts says; an answer is cut at
    data.max_response_length and then carries no end-of-sequence, so that nothing teaches the model to stop there.
    """
    if data.prompt_template == "chat" and tokenizer.chat_template is None:
        raise DataError(
            "the tokenizer has no chat template: set data.prompt_template to a text with {prompt}, "
            'such as "### Instruction:\\n{prompt}\\n\\n### Response:\\n"'
        )
    examples, overlong = [], []
    for i, record in enumerate(records, 1):
        if data.prompt_template == "chat":
            text = tokenizer.apply_chat_template(record.messages, tokenize=False, add_generation_prompt=True)
        else:
            text = data.prompt_template.replace("{prompt}", record.prompt)
        prompt = tokenizer.encode(text, add_special_tokens=data.prompt_template != "chat")
        if len(prompt) > data.max_prompt_length:
            overlong.append((i, len(prompt)))
            continue
        response: list[int] = []
        if record.answer is not None:
            response = [*tokenizer.encode(record.answer, add_special_tokens=False), tokenizer.eos_token_id]
        examples.append(Example(record, prompt, response[: data.max_response_length]))
    if overlong and data.overlong_prompts == "error":
        i, length = overlong[0]
        raise DataError(
            f"{source}: {len(overlong)} of {len(records)} prompts are longer than data.max_prompt_length = "
            f"{data.max_prompt_length} tokens; the first is record {i} with {length}. Raise the limit, or set "
            "data.overlong_prompts to drop"
        )
    if not examples:
        raise DataError(f"{source}: every prompt is longer than data.max_prompt_length = {data.max_prompt_length}")
    return examples


def chunk_text(documents: Sequence[str], tokenizer: "PreTrainedTokenizerBase", length: int) -> list[list[int]]:
    """Documents joined by end-of-sequence, in chunks of `length` tokens; an incomplete last one is dropped."""
    stream: list[int] = []
    for ids in tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]:
        stream += [*ids, tokenizer.eos_token_id]
    chunks = [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
    if not chunks:
        raise DataError(f"the text has {len(stream)} tokens, fewer than one chunk of objective.pt_length = {length}")
    return chunks


def collate(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Batch:
    """Sequences prompt + response in which every response token counts. Prompts are not empty; a response may be."""
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    shape = (len(lengths), max(lengths))
    input_ids = torch.zeros(shape, dtype=torch.long)  # any id: padding is never attended to and never counts
    attention_mask = torch.zeros(shape, dtype=torch.long)
    predict = torch.zeros(shape, dtype=torch.bool)
    targets: list[int] = []
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        input_ids[row, : lengths[row]] = torch.tensor([*prompt, *response])
        attention_mask[row, : lengths[row]] = 1
        predict[row, len(prompt) - 1 : lengths[row] - 1] = True
        targets += response
    return Batch(input_ids, attention_mask, predict, torch.tensor(targets, dtype=torch.long))


def shuffled(count: int, seed: int) -> Iterator[int]:
    """Indices below `count` without end, in a new random order each epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _record(row: dict, where: str) -> Record:
    if "messages" in row:
        messages = row["messages"]
        if not messages or not all({"role", "content"} <= message.keys() for message in messages):
            raise DataError(f"{where}: `messages` must be a list of objects with `role` and `content`")
        if messages[-1]["role"] == "assistant":
            return Record(messages[:-1], messages[-1]["content"])
        return Record(messages, None)
    if "instruction" in row:
        prompt = row["instruction"]
        if row.get("input"):
            prompt = ALPACA.format(instruction=prompt, input=row["input"])
        answer = row.get("output")
    elif "prompt" in row:
        prompt, answer = row["prompt"], row.get("completion")
    else:
        raise DataError(f"{where}: found the columns {sorted(row)}; expected {FORMS}")
    if not isinstance(prompt, str) or not isinstance(answer, str | None):
        raise DataError(f"{where}: prompt and answer must be text; conversations go into `messages`")
    return Record([{"role": "user", "content": prompt}], answer)


def _rows(path: Path) -> Iterator[dict]:
    with path.open() as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number} is not JSON ({error}): expected one object a line") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number} holds a {type(row).__name__}: expected one object a line")
            yield row


def _locate(source: str) -> Path:
    if source.startswith(packages.PREFIX):
        return packages.data_file(source.removeprefix(packages.PREFIX))
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"no data at {source!r}: give the path of a JSONL file, or package:NAME with NAME one of "
            f"{', '.join(packages.DATA)}"
        )
    return path
