"""The teacher's server: token ids come in, final hidden states go out, about 2 H bytes a token instead of 4 V.

    GET  /health           whether it answers, and how many questions wait; the one answer that needs no token
    GET  /about            what the model is, and the limits of a question
    GET  /head             the vocabulary head, once for each client
    POST /states?wire=…    a Question → its states
    POST /sample?…         prompts and uniforms → the model's own answers
    POST /read?session=…   tokens behind those of a session → their states

Bodies are safetensors, errors JSON `{"error": …}`. Nothing that comes in is run, nor read beyond its limit.
"""

import asyncio
import hmac
import logging
import queue
import re
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import torch
from safetensors.torch import save_file
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from minillm.config.schema import ConfigError
from minillm.files import sha256
from minillm.foreign import reason
from minillm.model.check import check_blocks
from minillm.model.head import CausalLM
from minillm.model.masks import takes_masks
from minillm.model.sampling import Decoding, sample
from minillm.teacher.sessions import Gone, Sessions
from minillm.teacher.wire import (
    DTYPES,
    FLOAT8,
    MODEL_HEADER,
    Question,
    Refused,
    check_sequences,
    fingerprint,
    pack_states,
    read_tensors,
    tokenizer_fingerprint,
    write_tensors,
)
from minillm.teacher.worker import Worker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BODY_SECONDS = 60
"""In which a question must have arrived."""
SESSION = re.compile("[0-9a-f]{32}")
HEAD_FILE = "head.safetensors"


class TeacherServer:
    """An ASGI application around one model.

    Args:
        lm: the model, frozen, whose head is read apart.
        tokenizer: its tokenizer, by which clients know that their ids mean the same.
        name: what it is called in messages.
        token: what requests must bring as `Authorization: Bearer TOKEN`; empty: nothing.
        max_tokens: of a forward pass, padding included.
        request_tokens: of one question, at most.
        waiting: questions that may wait; more are answered by 503.
        cache_tokens: of all sessions, whose keys and values are kept; the one used least lately makes way.
    """

    def __init__(
        self,
        lm: CausalLM,
        tokenizer: "PreTrainedTokenizerBase",
        name: str,
        token: str = "",
        max_tokens: int = 16384,
        request_tokens: int = 65536,
        waiting: int = 64,
        cache_tokens: int = 1 << 18,
    ) -> None:
        self.lm, self.token, self.request_tokens = lm, token, request_tokens
        self.waiting = waiting
        self.folder = tempfile.TemporaryDirectory(prefix="minillm-teacher-")
        self.about = self._describe(tokenizer, name)
        takes_masks(lm)  # tries it, before there is a question
        self.worker, self.sessions = Worker(lm, max_tokens, waiting), Sessions(lm, cache_tokens)
        routes = [
            Route("/health", self._health),
            Route("/about", self._guarded(self._about)),
            Route("/head", self._guarded(self._head)),
            Route("/states", self._guarded(self._states), methods=["POST"]),
            Route("/sample", self._guarded(self._sample), methods=["POST"]),
            Route("/read", self._guarded(self._read), methods=["POST"]),
        ]
        self.app = Starlette(
            routes=routes,
            exception_handlers={HTTPException: _told},
            lifespan=self._lifespan,
        )

    def _describe(self, tokenizer: "PreTrainedTokenizerBase", name: str) -> dict[str, Any]:
        """What /about says; the head is written beside, to be sent from the disk."""
        lm, model = self.lm, self.lm.model
        with torch.no_grad():
            head = lm.head
        parts = {"weight": head.weight, "bias": head.bias}
        tensors = {key: value.cpu().contiguous() for key, value in parts.items() if value is not None}
        path = Path(self.folder.name) / HEAD_FILE
        save_file(tensors, path)
        ends = model.generation_config.eos_token_id if model.generation_config is not None else None
        config = model.config.get_text_config()
        return {
            "model": name,
            "fingerprint": fingerprint(lm),
            "dtype": str(model.dtype).removeprefix("torch."),
            "hidden_size": tensors["weight"].shape[1],
            "vocab_size": lm.vocab_size,
            "embeddings": model.get_input_embeddings().weight.size(0),  # type: ignore[operator]
            "ends": ends if isinstance(ends, list) else [] if ends is None else [ends],
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "head": {"sha256": sha256(path), "softcap": head.softcap, "scale": head.scale},
            "reads_blocks": _reads_blocks(lm),
            "longest": min(getattr(config, "max_position_embeddings", None) or 2**31, self.request_tokens),
            "request_tokens": self.request_tokens,
        }

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        await anyio.to_thread.run_sync(self.worker.close)
        self.folder.cleanup()

    # ---- requests

    def _guarded(self, answer: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """The same for those alone who bring the token; what they did wrong is told."""

        async def guarded(request: Request) -> Response:
            given = request.headers.get("authorization", "")
            if self.token and not hmac.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
                raise HTTPException(401, "this teacher wants its token, as `Authorization: Bearer TOKEN`")
            try:
                found = await answer(request)
            except Refused as error:
                raise HTTPException(422, str(error)) from error
            except Gone as error:
                raise HTTPException(409, "there is no such session: send all of its tokens, with past=0") from error
            except queue.Full as error:
                why = f"{self.waiting} questions wait already"
                raise HTTPException(503, why, headers={"retry-after": "1"}) from error
            except HTTPException:
                raise
            except Exception as error:  # of the model, as where its memory does not suffice: the server goes on
                logging.getLogger(__name__).exception("the model failed")
                raise HTTPException(500, f"the model failed: {reason(error)}") from error
            found.headers[MODEL_HEADER] = self.about["fingerprint"]
            return found

        return guarded

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "model": self.about["model"], "waiting": self.worker.jobs.qsize()})

    async def _about(self, request: Request) -> Response:
        return JSONResponse(self.about)

    async def _head(self, request: Request) -> Response:
        return FileResponse(Path(self.folder.name) / HEAD_FILE, media_type="application/octet-stream")

    async def _states(self, request: Request) -> Response:
        wire = _choice(request, "wire", {**DTYPES, "float8": FLOAT8})
        compress = _choice(request, "compress", {"": False, "0": False, "1": True})
        question = Question.read(await self._body(request), self.about["embeddings"], self.about["longest"])
        self._check_size(len(question.ids))
        states = await asyncio.wrap_future(self.worker.submit(question))
        return _tensors(await anyio.to_thread.run_sync(pack_states, states, wire, compress))

    async def _sample(self, request: Request) -> Response:
        settings = {key: _number(request, key) for key in ("temperature", "top_k", "top_p", "vocab_size")}
        types = {"ids": torch.int32, "lengths": torch.int32, "ends": torch.int32, "uniforms": torch.float64}
        found = read_tensors(await self._body(request), types)
        ids, lengths, ends, uniforms = (found[name] for name in types)
        check_sequences(ids, lengths, self.about["embeddings"], self.about["longest"])
        count = len(lengths)
        if not len(uniforms) or len(uniforms) % (2 * count) or not bool(((uniforms >= 0) & (uniforms < 1)).all()):
            raise Refused("uniforms must be [tokens, sequences, 2] numbers in [0, 1), laid out flat")
        new = len(uniforms) // (2 * count)
        if int(lengths.max()) + new > self.about["longest"]:
            raise Refused(f"prompt and answer may have {self.about['longest']} tokens together")
        self._check_size(len(ids) + count * new)
        if not (settings["temperature"] >= 0 and 0 < settings["top_p"] <= 1 and settings["top_k"] >= 0):
            raise Refused("temperature and top_k must be at least 0, and top_p above 0 and at most 1")
        columns = int(settings["vocab_size"])
        if not 1 <= columns <= self.lm.vocab_size:
            raise Refused(f"vocab_size must lie in [1, {self.lm.vocab_size}]")
        decoding = Decoding(
            new, ends.tolist(), settings["temperature"], top_k=int(settings["top_k"]), top_p=settings["top_p"]
        )
        prompts = [part.tolist() for part in ids.split(lengths.tolist())]

        def work() -> list[list[int]]:
            shaped = uniforms.view(new, count, 2)
            return sample(
                self.lm, None, prompts, decoding, alpha=0.0, uniforms=shaped, vocab_size=columns, student_states=False
            ).responses()

        answers = await asyncio.wrap_future(self.worker.submit(work=work))
        flat = torch.tensor([token for answer in answers for token in answer], dtype=torch.int32)
        return _tensors(write_tensors({"ids": flat, "lengths": torch.tensor([*map(len, answers)], dtype=torch.int32)}))

    async def _read(self, request: Request) -> Response:
        wire, session = _choice(request, "wire", {**DTYPES, "float8": FLOAT8}), request.query_params.get("session", "")
        past, rows = (int(_number(request, key)) for key in ("past", "rows"))
        types = {"ids": torch.int32, "exists": torch.uint8, "keep": torch.int64}
        found = read_tensors(await self._body(request), types)
        ids, exists, keep = (found[name] for name in types)
        if not SESSION.fullmatch(session) or past < 0 or rows < 1 or not len(ids) or len(ids) % rows:
            raise Refused("expected a session of 32 hexadecimal digits, past of at least 0, and ids of `rows` rows")
        new = len(ids) // rows
        check_sequences(ids, torch.full((rows,), new), self.about["embeddings"], self.about["longest"])
        if len(exists) % rows or (past == 0 and len(exists) < len(ids)) or len(exists) // rows > self.about["longest"]:
            raise Refused(f"exists must have room for the ids, and for at most {self.about['longest']} tokens a row")
        if len(keep) and (len(keep) != rows or int(keep.min()) < 0):
            raise Refused("keep must be empty, or the number of the row that each row has been")
        self._check_size(max(len(ids), len(exists)))
        tokens = ids.view(rows, new), exists.view(rows, -1).bool()
        work = partial(self.sessions.read, session, past, *tokens, keep)
        states = await asyncio.wrap_future(self.worker.submit(work=work))
        return _tensors(await anyio.to_thread.run_sync(pack_states, states.flatten(0, 1), wire))

    async def _body(self, request: Request) -> bytes:
        """What was sent, up to the limit in bytes and time."""
        limit, found = 32 * self.request_tokens + 65536, bytearray()
        try:
            with anyio.fail_after(BODY_SECONDS):
                async for chunk in request.stream():
                    found += chunk
                    if len(found) > limit:
                        raise HTTPException(413, f"a question has at most {limit} bytes; {self._smaller()}")
        except TimeoutError as error:
            raise HTTPException(408, f"the question did not arrive within {BODY_SECONDS} s") from error
        except ClientDisconnect as error:
            raise HTTPException(400, "the question broke off") from error
        return bytes(found)

    def _check_size(self, tokens: int) -> None:
        if tokens > self.request_tokens:
            raise HTTPException(413, f"{tokens} tokens at once, of at most {self.request_tokens}; {self._smaller()}")

    def _smaller(self) -> str:
        return "lower rollout.batch_size, or raise --request-tokens of the server"


def _reads_blocks(lm: CausalLM) -> bool:
    """Whether the teacher can take turns in a rollout."""
    try:
        check_blocks(lm)
    except ConfigError:
        return False
    return True


async def _told(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)


def _tensors(body: bytes) -> Response:
    return Response(body, media_type="application/octet-stream")


def _choice(request: Request, name: str, allowed: dict[str, Any]) -> Any:
    given = request.query_params.get(name, "")
    if given not in allowed:
        raise Refused(f"{name} is {given[:50]!r}; expected one of {', '.join(allowed)}")
    return allowed[given]


def _number(request: Request, name: str) -> float:
    given = request.query_params.get(name, "")
    try:
        value = float(given)
    except ValueError:
        value = float("nan")
    if not abs(value) < 2**31:
        raise Refused(f"{name} is {given[:50]!r}; expected a number")
    return value
