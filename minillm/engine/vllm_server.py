"""A server of vLLM: tokens in and out through its OpenAI-compatible completions, weights pushed before each rollout.

A request that fails for the network's or the server's sake is sent again, after 1, 2, 4, … seconds. Its seed makes the
second answer what the first would have been. A server that was started anew meanwhile has other weights: it says so by
its weight version, and gets the right ones before it is asked again.

Pushing needs the routes that VLLM_SERVER_DEV_MODE=1 opens, which let anyone who reaches the port replace the model: it
must not face an open network.
"""

import http.client
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from minillm.config.engine import EngineConfig
from minillm.config.schema import ConfigError
from minillm.engine import Answer, Request
from minillm.lost import ServerLost

AT_ONCE = 512  # requests in flight; more wait here rather than there
LONGEST_PAUSE = 30.0
TRANSIENT = (OSError, http.client.HTTPException, json.JSONDecodeError)
"""Of the network, of a server that breaks off and of one that answers with half a text; urllib's are OSErrors."""
HOW_TO_START = "vllm serve MODEL --logprobs-mode processed_logprobs --generation-config vllm"

Push = Callable[[], "tuple[str, Callable[[Server], None]]"]
"""Makes the weights as they are now ready; returns their version, and what sends them to a server, once or again."""


class Server:
    """The engine behind a URL."""

    def __init__(self, url: str, config: EngineConfig, push: Push | None, may_push: bool = True) -> None:
        """push: of the model that is trained; None for a server that keeps its weights. may_push: whether it is for
        this process to push.

        Raises ConfigError where no server answers.
        """
        self.url, self.config, self.push, self.may_push = url.rstrip("/"), config, push, may_push
        self.version = ""
        self.send: Callable[[Server], None] | None = None
        """Of the weights that it must have, and what sends them."""
        self.pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="minillm-engine")
        self.open: dict[Future[Answer], int] = {}
        self.over, self.pushing = threading.Event(), threading.Lock()
        try:
            models = self.ask("/v1/models", timeout=min(10.0, config.timeout))["data"]
        except (*TRANSIENT, ServerLost, KeyError, TypeError) as error:
            raise ConfigError(
                f"no vLLM server answers at {self.url} ({error}): start one ({HOW_TO_START}) or mend engine.url and "
                "engine.teacher_url"
            ) from error
        self.model, self.longest = models[0]["id"], models[0].get("max_model_len") or 0

    def wake(self, length: int) -> None:
        if self.longest and length > self.longest:
            raise ConfigError(
                f"{self.url} takes sequences of {self.longest} tokens, and prompt and answer may reach {length}: "
                "start it with a higher --max-model-len"
            )
        self.over.clear()
        if self.push is not None and self.may_push:
            self.version, self.send = self.push()
            self._again(self._send)

    def _send(self) -> None:
        assert self.send is not None
        self.send(self)
        if not self.ask("/reset_prefix_cache", {}).get("success", True):  # as while something is still being answered
            raise OSError("its prefix cache, which is of other weights, is still in use")
        self.ask("/update_weight_version", {"new_version": self.version})

    def submit(self, number: int, request: Request, law: dict[str, Any]) -> None:
        self.open[self.pool.submit(self._again, lambda: self._complete(request, law))] = number

    def finished(self) -> list[tuple[int, Answer]]:
        done, _ = wait(self.open, timeout=0.02, return_when=FIRST_COMPLETED)
        return [(self.open.pop(future), future.result()) for future in done]

    def rest(self) -> None:
        self.over.set()
        for future in self.open:
            future.cancel()
        self.open.clear()

    def close(self) -> None:
        self.rest()
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _complete(self, request: Request, law: dict[str, Any]) -> Answer:
        body = {
            **law,
            "model": self.model,
            "prompt": list(request.prompt),
            "max_tokens": request.max_tokens,
            "seed": request.seed,
            "return_token_ids": True,
        }
        choice = self.ask("/v1/completions", body)["choices"][0]
        ids = choice.get("token_ids")
        if ids is None:
            raise ServerLost(f"{self.url} returns no token ids (return_token_ids): it needs a newer vLLM")
        return Answer(ids, choice["logprobs"]["token_logprobs"])

    def _again(self, work: Callable[[], Any]) -> Any:
        """What `work` returns, tried again while only the network or the server is at fault."""
        for attempt in range(self.config.retries + 1):
            try:
                if attempt and self.version and work != self._send:
                    self._check_version()
                return work()
            except TRANSIENT as error:
                found = error
            if self.over.wait(min(2.0**attempt, LONGEST_PAUSE) if attempt < self.config.retries else 0):
                break  # another request has failed for good
        self.over.set()
        raise ServerLost(
            f"the engine at {self.url} does not answer ({_reason(found)}), in {self.config.retries + 1} attempts "
            "(engine.retries, engine.timeout). Start it again"
        ) from found

    def _check_version(self) -> None:
        """Push again, where a server has been started anew."""
        with self.pushing:
            if self.ask("/weight_info")["weight_version"] == self.version:
                return
            if self.send is None:
                raise ServerLost(f"the engine at {self.url} was started anew and has lost the student's weights")
            self._send()

    def ask(self, path: str, body: dict[str, Any] | None = None, timeout: float | None = None) -> Any:
        """GET, or POST where there is a body; returns the JSON of the answer, which comes within `timeout` seconds, by
        default engine.timeout. Raises the errors of TRANSIENT, and ServerLost for a request that the server refuses.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout or self.config.timeout) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            if error.code >= 500 or error.code == 429:
                raise
            what = " ".join(error.read().decode(errors="replace").split())[:500]
            hint = (
                " It must run under VLLM_SERVER_DEV_MODE=1"
                if error.code == 404 and not path.startswith("/v1/")
                else ""
            )
            raise ServerLost(f"{self.url}{path} refuses a request ({error.code}: {what}).{hint}") from error
        return json.loads(text) if text else {}


def _reason(error: Exception) -> str:
    words = " ".join(str(error).split())[:300]
    return words if " " in words else f"{type(error).__name__} {words}".strip()
