"""A teacher whose final hidden states a server of vLLM gives: a language model that it runs as an embedding model, one
state for each token, after the final norm and without the normalisation of embeddings.

    vllm serve MODEL --runner pooling --convert embed --pooler-config '{"task": "token_embed"}' --dtype …

vLLM sends no head. It is read from the model's files, alone.
"""

import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from minillm.config.schema import ConfigError, TeacherConfig
from minillm.data.examples import Batch
from minillm.model.check import PROBE
from minillm.model.head import CausalLM, Output, first_columns, read_head
from minillm.model.layers import shrunk
from minillm.model.load import load_tokenizer, unread_model
from minillm.teacher.network import Answer, Servers
from minillm.teacher.wire import DTYPES, Question, Refused, tokenizer_fingerprint
from minillm_kernels import Head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HOW_TO_START = 'vllm serve MODEL --runner pooling --convert embed --pooler-config \'{"task": "token_embed"}\''
AT_ONCE = 16384
"""Tokens of a request."""


class VllmTeacher:
    """A teacher behind servers of vLLM that serve the same model. It scores what is given, and draws nothing.

    Raises ConfigError where a server serves something else, or where the head cannot be read; ServerLost.
    """

    def __init__(self, urls: Sequence[str], settings: TeacherConfig, device: torch.device) -> None:
        self.urls, self.device, self.servers = list(urls), device, Servers(urls, settings)
        told = {url: self.servers.call("GET", "/v1/models", _first_model, only=url) for url in urls}
        self.servers.started = True
        if len({(model["id"], model["root"]) for model in told.values()}) > 1:
            raise ConfigError(f"{' and '.join(urls)} serve different models: name servers of one model")
        first = told[self.urls[0]]
        self.name, self.longest = first["id"], min(model["max_model_len"] for model in told.values())
        files = settings.files or first["root"]
        try:
            self.head, model = head_of(files)
            tokenizer = load_tokenizer(files)
        except ConfigError as error:
            raise ConfigError(
                f"{error}. The server at {self.urls[0]} serves {first['root']!r}: name a copy of its files, or its "
                "hub id, in teacher.files"
            ) from error
        assert self.head.weight is not None
        self.dtype, self.hidden_size = self.head.weight.dtype, self.head.weight.shape[1]
        self.vocab_size, self.head = len(self.head.weight), _on(self.head, device)
        self.tokenizer = tokenizer_fingerprint(tokenizer)
        ends = model.generation_config.eos_token_id if model.generation_config is not None else None
        self.ends: list[int] = ends if isinstance(ends, list) else [] if ends is None else [ends]
        self.embeddings: int = model.get_input_embeddings().weight.size(0)  # type: ignore[operator]
        by_name = {value: name for name, value in DTYPES.items()}
        self.wire_name = by_name[self.dtype] if settings.wire == "auto" else settings.wire
        ids = torch.tensor(tokenizer.encode(PROBE), dtype=torch.int32)
        tried = Question(ids, torch.tensor([len(ids)], dtype=torch.int32), torch.arange(len(ids)))
        self._states(tried)  # what serves something else is told at the start
        self.pool = ThreadPoolExecutor(settings.prefetch, "teacher")

    def __str__(self) -> str:
        return f"{self.name} in vLLM on {', '.join(self.urls)} ({self.wire_name} on the wire)"

    def to(self, device: torch.device) -> None:
        """From now on, give states and head there."""
        self.device, self.head = device, _on(self.head, device)

    def keep_columns(self, count: int) -> None:
        """Have the first columns of the head alone from here on."""
        self.vocab_size, self.head = count, first_columns(self.head, count)

    def check(self, tokens: int, largest: int) -> None:
        """Raises ConfigError for sequences or ids beyond what the model reads."""
        if tokens > self.longest:
            raise ConfigError(
                f"prompt and answer may reach {tokens} tokens, but the server at {self.urls[0]} reads {self.longest}: "
                "start it with a higher --max-model-len, or lower the limits of data, rollout or eval"
            )
        if largest >= self.embeddings:
            raise ConfigError(
                f"the data holds the token id {largest}, but the teacher at {self.urls[0]} has {self.embeddings} "
                "embeddings: use a student of its family"
            )

    def ask(self, batch: Batch) -> "Future[Tensor]":
        """Ask about a batch without waiting; `output` takes the answer from `batch.asked`."""
        return self.pool.submit(self._states, Question.of(batch))

    def output(self, batch: Batch) -> Output:
        asked = batch.asked or self.ask(batch)
        return Output(asked.result().to(self.device, non_blocking=True), self.head)

    def close(self) -> None:
        """Stop asking. Nothing waits for servers that do not answer."""
        self.servers.close()
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _states(self, question: Question) -> Tensor:
        found = [torch.zeros(0, self.hidden_size, dtype=self.dtype)]
        for part in question.parts(AT_ONCE):
            body = {
                "model": self.name,
                "input": part.sequences(),
                "task": "token_embed",
                "use_activation": False,  # which would make all states of length 1
                "encoding_format": "bytes_only",
                "embed_dtype": self.wire_name,
                "endianness": "little",
            }
            shape, wire = (len(part.ids), self.hidden_size), DTYPES[self.wire_name]

            def read(answer: Answer, shape: tuple[int, int] = shape, wire: torch.dtype = wire) -> Tensor:
                if len(answer.body) != shape[0] * shape[1] * wire.itemsize:
                    raise Refused(
                        f"{len(answer.body)} bytes, not {shape[1]} numbers of {wire} for each of {shape[0]} tokens. "
                        f"Start it by {HOW_TO_START}"
                    )
                return torch.frombuffer(bytearray(answer.body), dtype=wire).view(shape)

            states = self.servers.call(
                "POST", "/pooling", read, json.dumps(body).encode(), headers={"content-type": "application/json"}
            )
            found.append(states[part.positions].to(self.dtype))
        return torch.cat(found)


def head_of(source: str) -> "tuple[Head, PreTrainedModel]":
    """The head of a model as it is stored, read from its files alone, and the model without its weights.

    Raises ConfigError where it is not to be found there, or where more than it stands between the final states of the
    model and its logits.
    """
    found = unread_model(source, "checkpoint", "auto")
    if found is None:
        raise ConfigError(
            f"the files of {source} do not hold its head by the model's own name, as where they are quantised or "
            "adapters: name those of the whole model"
        )
    model, folder = found
    CausalLM(shrunk(model))  # tries what is read, on a model of its kind
    names, absent = {id(x): name for name, x in reversed(model.state_dict(keep_vars=True).items())}, read_head(model)

    def stored(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                if names[id(tensor)] in file.keys():  # noqa: SIM118
                    return file.get_tensor(names[id(tensor)]).to(tensor.dtype)
        raise AssertionError(f"unread_model found {names[id(tensor)]}")

    return Head(stored(absent.weight), stored(absent.bias), absent.softcap, absent.scale), model


def _first_model(answer: Answer) -> dict[str, Any]:
    """Raises ConfigError for what is no vLLM server."""
    try:
        model = json.loads(answer.body)["data"][0]
        return {"id": str(model["id"]), "root": str(model["root"]), "max_model_len": int(model["max_model_len"])}
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigError(f"{answer.url} is no vLLM server: start one by {HOW_TO_START}") from error


def _on(head: Head, device: torch.device) -> Head:
    assert head.weight is not None
    bias = None if head.bias is None else head.bias.to(device)
    return Head(head.weight.to(device), bias, head.softcap, head.scale)
