"""The client of `minillm teach`: a teacher on one server, or on several that serve the same model.

Questions about the next micro-batches travel while the current one is learnt from. A server that is busy, slow or gone
is asked again, or the next one is; when none has answered for `teacher.patience` seconds, ServerLost ends the run.
"""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor

from minillm.config.schema import ConfigError, TeacherConfig
from minillm.data.examples import Batch
from minillm.data.packages import cache_directory
from minillm.files import sha256, whole_or_absent
from minillm.lost import ServerLost
from minillm.model.head import Output, first_columns
from minillm.model.sampling import Decoding
from minillm.teacher.network import Answer, Servers
from minillm.teacher.sessions import RemoteDecoder
from minillm.teacher.wire import (
    DTYPES,
    FLOAT8,
    MODEL_HEADER,
    Question,
    Refused,
    read_tensors,
    unpack_states,
    write_tensors,
)
from minillm_kernels import Head

ABOUT = {
    "model", "fingerprint", "dtype", "hidden_size", "vocab_size", "embeddings", "ends", "tokenizer", "head", "longest",
    "reads_blocks", "request_tokens",
}  # fmt: skip
"""What a server says of its model."""


class ServedTeacher:
    """A teacher behind HTTP. `head` is fetched once and kept in the cache directory, by its digest.

    Raises ConfigError where servers serve different models, or something that is no teacher; ServerLost.
    """

    def __init__(self, urls: Sequence[str], settings: TeacherConfig, device: torch.device) -> None:
        self.urls, self.settings, self.device = list(urls), settings, device
        self.servers = Servers(urls, settings)
        self.about = self._agreed()
        self.fingerprint: str = self.about["fingerprint"]
        self.dtype = DTYPES[self.about["dtype"]]
        chosen = self.about["dtype"] if settings.wire == "auto" else settings.wire
        self.wire_name, self.wire = chosen, FLOAT8 if chosen == "float8" else DTYPES[chosen]
        self.vocab_size: int = self.about["vocab_size"]
        self.ends: list[int] = self.about["ends"]
        self.head = self._fetch_head()
        self.pool = ThreadPoolExecutor(settings.prefetch, "teacher")

    def __str__(self) -> str:
        return f"{self.about['model']} on {', '.join(self.urls)} ({self.wire_name} on the wire)"

    def to(self, device: torch.device) -> None:
        """From now on, give states and head there."""
        bias = None if self.head.bias is None else self.head.bias.to(device)
        assert self.head.weight is not None
        self.device, self.head = device, Head(self.head.weight.to(device), bias, self.head.softcap, self.head.scale)

    def keep_columns(self, count: int) -> None:
        """Have the first columns of the head alone from here on."""
        self.vocab_size, self.head = count, first_columns(self.head, count)

    def check(self, tokens: int, largest: int, takes_turns: bool = False) -> None:
        """Raises ConfigError for sequences or ids beyond what the model reads, and for turns that it cannot take."""
        if takes_turns and not self.about["reads_blocks"]:
            raise ConfigError(
                f"the teacher at {self.urls[0]} reads tokens behind its cache by another law than its forward pass "
                "has: set rollout.alpha to 0"
            )
        if tokens > self.about["longest"]:
            raise ConfigError(
                f"prompt and answer may reach {tokens} tokens, but the teacher at {self.urls[0]} reads "
                f"{self.about['longest']}: lower data.max_prompt_length, data.max_response_length or "
                "rollout.max_new_tokens"
            )
        if largest >= self.about["embeddings"]:
            raise ConfigError(
                f"the data holds the token id {largest}, but the teacher at {self.urls[0]} has "
                f"{self.about['embeddings']} embeddings: use a student of its family"
            )

    def ask(self, batch: Batch) -> "Future[Tensor]":
        """Ask about a batch without waiting; `output` takes the answer from `batch.asked`."""
        return self.pool.submit(self._states, Question.of(batch))

    def output(self, batch: Batch) -> Output:
        asked = batch.asked or self.ask(batch)
        return Output(asked.result().to(self.device, non_blocking=True), self.head)

    def sample(
        self, prompts: Sequence[Sequence[int]], decoding: Decoding, uniforms: Tensor, vocab_size: int
    ) -> list[list[int]]:
        """The teacher's own answers, the same as `minillm.model.sampling.sample` draws from these uniforms
        [T, B, 2]; as many at once as one question may have."""
        at_once = max(1, self.about["request_tokens"] // (max(map(len, prompts), default=0) + decoding.max_new_tokens))
        if len(prompts) > at_once:
            starts = range(0, len(prompts), at_once)
            parts = [(prompts[i : i + at_once], uniforms[:, i : i + at_once]) for i in starts]
            return [answer for some, drawn in parts for answer in self.sample(some, decoding, drawn, vocab_size)]
        flat = [token for prompt in prompts for token in prompt]
        body = write_tensors(
            {
                "ids": torch.tensor(flat, dtype=torch.int32),
                "lengths": torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32),
                "ends": torch.tensor(list(decoding.ends), dtype=torch.int32),
                "uniforms": uniforms.double().cpu().flatten(),
            }
        )
        path = (
            f"/sample?temperature={decoding.temperature}&top_k={decoding.top_k}&top_p={decoding.top_p}"
            f"&vocab_size={vocab_size}"
        )

        def read(answer: bytes) -> list[list[int]]:
            found = read_tensors(answer, {"ids": torch.int32, "lengths": torch.int32})
            return [part.tolist() for part in found["ids"].split(found["lengths"].tolist())]

        return self._call(path, read, body)

    def decoder(self, exists: Tensor, padded: bool) -> RemoteDecoder:
        """What reads rows bit by bit, so that the teacher takes its turns in a rollout."""
        return RemoteDecoder(self, exists)

    def logits(self, states: Tensor) -> Tensor:
        with torch.no_grad():
            return self.head.logits(states)

    def read_on(self, session: str, past: int, ids: Tensor, exists: Tensor, keep: Tensor) -> Tensor:
        """As `Sessions.read`, on `device`."""
        room = exists.byte() if past == 0 else exists.byte()[:, :0]
        body = write_tensors({"ids": ids.flatten(), "exists": room.flatten(), "keep": keep})
        rows, new = ids.shape
        path = f"/read?wire={self.wire_name}&session={session}&past={past}&rows={rows}"
        read = lambda answer: unpack_states(answer, self.wire, self.dtype, (rows * new, self.about["hidden_size"]))
        states = self._call(path, read, body, start=int(session[:8], 16))
        return states.view(rows, new, -1).to(self.device, non_blocking=True)

    def close(self) -> None:
        """Stop asking. Nothing waits for servers that do not answer."""
        self.servers.close()
        self.pool.shutdown(wait=False, cancel_futures=True)

    # ---- what travels

    def _states(self, question: Question) -> Tensor:
        shape = (len(question.positions), self.about["hidden_size"])
        if not shape[0]:
            return torch.zeros(shape, dtype=self.dtype)
        found, compress = [], self.settings.compress
        for part in question.parts(self.about["request_tokens"]):
            if len(part.positions):
                expected = (len(part.positions), shape[1])
                read = partial(unpack_states, wire=self.wire, dtype=self.dtype, shape=expected, compressed=compress)
                path = f"/states?wire={self.wire_name}&compress={int(compress)}"
                found.append(self._call(path, read, write_tensors(part._asdict())))
        return torch.cat(found)

    def _agreed(self) -> dict[str, Any]:
        """What all servers say of themselves. One that is not there yet is waited for."""
        read = lambda answer: dict(json.loads(answer.body))
        found = {url: self.servers.call("GET", "/about", read, only=url) for url in self.urls}
        self.servers.started = True
        first, *others = self.urls
        for url in others:
            if found[url].get("fingerprint") != found[first].get("fingerprint"):
                raise ConfigError(f"{first} and {url} serve different models: name servers of one model")
        if ABOUT - found[first].keys() or found[first]["dtype"] not in DTYPES:
            raise ConfigError(f"{first} is no teacher of this version: start it by `minillm teach MODEL`")
        return found[first]

    def _fetch_head(self) -> Head:
        told = self.about["head"]
        path = cache_directory() / "heads" / f"{told['sha256']}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                self.servers.call("GET", "/head", lambda answer: _keep(path, answer.body, told["sha256"]))
        tensors = load_file(path, device=str(self.device))
        return Head(tensors["weight"], tensors.get("bias"), told["softcap"], told["scale"])

    def _call(self, path: str, read: Callable[[bytes], Any], body: bytes, start: int | None = None) -> Any:
        def of_this_model(answer: Answer) -> Any:
            if answer.headers.get(MODEL_HEADER, "") != self.fingerprint:
                raise ServerLost(
                    f"{answer.url} serves another model than at the start of this run: start the teacher again"
                )
            return read(answer.body)

        return self.servers.call("POST", path, of_this_model, body, start=start)


def _keep(path: Path, body: bytes, wanted: str) -> None:
    """Raises Refused where the digest is another."""
    with whole_or_absent(path) as partial:
        partial.write_bytes(body)
        if sha256(partial) != wanted:
            raise Refused("the head is not the one that /about describes")
