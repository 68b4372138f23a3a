"""A teacher that is not asked any more: what it said of given data, read from the directory that store.py writes.

Sequences are found by their tokens, and none is ever taken for another: a batch whose sequence is not in the store, or
learns from tokens that the teacher was not asked about, is an error. A prefix of a stored sequence is in it.
"""

import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from minillm.config.schema import ConfigError, LossConfig
from minillm.data.examples import Batch, Example
from minillm.data.sources import DataError
from minillm.model.head import Output, first_columns
from minillm.teacher.store import HEAD, INDEX, SHARD, read_plan
from minillm.teacher.top_k import TopK
from minillm.teacher.wire import DTYPES, FLOAT8, Question
from minillm_kernels import Head


class StoredTeacher:
    """What a directory of `minillm teach --out` holds. Files are mapped, not read: memory holds the tokens alone.

    Raises ConfigError for a directory that is not whole, or damaged.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device, self.plan = folder, device, read_plan(folder)
        plan = self.plan
        there = sum((folder / SHARD.format(i)).exists() for i in range(len(plan.shards)))
        if not (folder / INDEX).exists() or there < len(plan.shards):
            raise ConfigError(
                f"{folder} is not whole: {there} of {len(plan.shards)} shards are there. The command that began it "
                "goes on with it"
            )
        self.ends, self.vocab_size = plan.ends, plan.vocab_size
        self.places: dict[bytes, list[tuple[int, int]]] = {}
        """The stored sequences, as shard and number in it, by their tokens before the first that is learnt from."""
        try:
            self.measured: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            self.files = [safe_open(folder / SHARD.format(i), "pt") for i in range(len(plan.shards))]
            self.parts = [
                {name: file.get_tensor(name) for name in ("ids", "starts", "positions", "rows")} for file in self.files
            ]
            self._head = self._read_head() if plan.kind == "hidden" else None
        except (OSError, SafetensorError, ValueError) as error:
            raise ConfigError(f"{folder} is damaged ({error}): delete the file and write it again") from error
        for shard, part in enumerate(self.parts):
            for i, ids in enumerate(part["ids"].split(torch.diff(part["starts"]).tolist())):
                positions = self._positions(shard, i)
                if len(positions):
                    self.places.setdefault(_key(ids, positions), []).append((shard, i))
        self.pool = ThreadPoolExecutor(1, "teacher")

    def __str__(self) -> str:
        kept = f"top {self.plan.k}" if self.plan.kind == "top_k" else f"hidden states in {self.plan.states}"
        return f"{self.plan.model}, {kept} of {self.plan.data}, stored in {self.folder}"

    @property
    def head(self) -> Head:
        if self._head is None:
            raise ConfigError(f"{self.folder} holds the top {self.plan.k} tokens alone: no head, and no hidden states")
        return self._head

    def to(self, device: torch.device) -> None:
        """From now on, give what is asked there."""
        self.device = device
        if self._head is not None:
            self._head = self._read_head()

    def keep_columns(self, count: int) -> None:
        """Have the first columns of the head alone from here on."""
        self.vocab_size = count
        if self._head is not None:
            self._head = first_columns(self._head, count)

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)

    def check(self, examples: Sequence[Example], loss: LossConfig, vocab_size: int) -> None:
        """Raises DataError for an example that is not here, ConfigError for a loss that needs what was not kept."""
        top_k = self.plan.kind == "top_k"
        if top_k != (loss.support == "top_k"):
            raise ConfigError(
                f"loss.support is {loss.support}, and {self.folder} holds "
                + (
                    f"the top {self.plan.k} tokens: set it to top_k, which is another loss (docs/teachers.md)"
                    if top_k
                    else "hidden states, from which the loss over the whole vocabulary follows: set it to full"
                )
            )
        if top_k and loss.temperature != self.plan.temperature:
            raise ConfigError(
                f"loss.temperature is {loss.temperature:g}, and the top {self.plan.k} tokens were kept at "
                f"{self.plan.temperature:g}: write them again with --temperature, or keep hidden states"
            )
        if top_k and vocab_size < self.plan.vocab_size:
            raise ConfigError(
                f"the student has {vocab_size} columns, and the stored law is over the {self.plan.vocab_size} of its "
                "teacher: keep hidden states, which serve any student"
            )
        self.check_held(examples)

    def check_held(self, examples: Sequence[Example]) -> None:
        """Raises DataError for an example that is not here."""
        for example in examples:
            question = Question.of(Batch.of([example]))
            if self._find(question.ids, question.positions) is None:
                raise DataError(
                    f"{example.record.where}: {self.folder} does not hold what the teacher says of it. It was written "
                    f"of {self.plan.data}, with another template, other limits of length or another data.train_on, or "
                    "the data have changed: write it again with the settings of this recipe (--data.KEY=VALUE)"
                )

    # ---- what was said

    def ask(self, batch: Batch) -> "Future[dict[str, Tensor]]":
        """Read ahead; `output` and `law` take the answer from `batch.asked`."""
        return self.pool.submit(self._read, Question.of(batch))

    def output(self, batch: Batch) -> Output:
        head, found = self.head, self._answer(batch)
        states = found["states"].to(self.device, non_blocking=True)
        if "scale" in found:
            states = states.float() * found["scale"].to(self.device, non_blocking=True)
        return Output(states.to(DTYPES[self.plan.dtype]), head)

    def law(self, batch: Batch) -> TopK:
        """What is known of the law at each position of a batch whose next token counts."""
        found = self._answer(batch)
        return TopK(found["tokens"].long(), found["logprobs"], found["tail"]).to(self.device)

    def _answer(self, batch: Batch) -> dict[str, Tensor]:
        return (batch.asked or self.ask(batch)).result()

    def _read(self, question: Question) -> dict[str, Tensor]:
        names = ["tokens", "logprobs", "tail"] if self.plan.kind == "top_k" else ["states"]
        names += ["scale"] if self.plan.states == "float8" and self.plan.kind == "hidden" else []
        ends = question.lengths.long().cumsum(0)
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        for start, end in zip((ends - question.lengths).tolist(), ends.tolist(), strict=True):
            inside = (question.positions >= start) & (question.positions < end)
            positions = question.positions[inside] - start
            if not len(positions):
                continue
            place = self._find(question.ids[start:end], positions)
            if place is None:
                raise DataError(f"{self.folder} does not hold what the teacher says of a sequence of this batch")
            shard, rows = place
            for name in names:
                part = self.files[shard].get_slice(name)[int(rows[0]) : int(rows[-1]) + 1]
                part = part.view(torch.uint8) if part.dtype == FLOAT8 else part  # which older torch cannot index
                found[name].append(part[rows - rows[0]])
        joined = {name: torch.cat(parts) for name, parts in found.items()}
        return {name: x.view(FLOAT8) if x.dtype == torch.uint8 else x for name, x in joined.items()}

    def _find(self, ids: Tensor, positions: Tensor) -> tuple[int, Tensor] | None:
        """The shard, and its rows [N] of these positions of a sequence; None where it is not here."""
        if not len(positions):
            return 0, positions
        for shard, i in self.places.get(_key(ids, positions), ()):
            part = self.parts[shard]
            stored = part["ids"][part["starts"][i] : part["starts"][i + 1]]
            if len(stored) < len(ids) or not torch.equal(stored[: len(ids)], ids):
                continue
            known = self._positions(shard, i)
            rows = torch.searchsorted(known, positions).clamp(max=len(known) - 1)
            if torch.equal(known[rows], positions):
                return shard, rows + part["rows"][i]
        return None

    def _positions(self, shard: int, i: int) -> Tensor:
        rows = self.parts[shard]["rows"]
        return self.parts[shard]["positions"][rows[i] : rows[i + 1]].long()

    def _read_head(self) -> Head:
        tensors = load_file(self.folder / HEAD, device=str(self.device))
        head = Head(tensors["weight"], tensors.get("bias"), self.plan.softcap, self.plan.scale)
        return first_columns(head, self.vocab_size)


def _key(ids: Tensor, positions: Tensor) -> bytes:
    return ids[: int(positions[0]) + 1].numpy().tobytes()
