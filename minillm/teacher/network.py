"""Requests to the servers of one teacher: by turns, asked again while they are busy or slow, and the next one where
one is gone. Nothing is believed of an answer but what its reader takes."""

import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from minillm.config.schema import ConfigError, TeacherConfig
from minillm.config.teacher import TOKEN
from minillm.lost import ServerLost
from minillm.teacher.sessions import Gone

START_SECONDS, CONNECT_SECONDS, REST_SECONDS = 30, 10, 30
"""How long a server is waited for at the start of a run, how long a connection may take, and for how long a server
that failed is asked last."""


class Answer(NamedTuple):
    """What a server at `url` has answered."""

    url: str
    body: bytes
    headers: Mapping[str, str]


class Servers:
    """The servers at these addresses. `started` says that they have all been reached once."""

    def __init__(self, urls: Sequence[str], settings: TeacherConfig) -> None:
        try:
            import urllib3
        except ImportError as error:
            raise ConfigError('a teacher on a server needs urllib3: pip install "minillm-kernels[teach]"') from error
        self.urls, self.settings = list(urls), settings
        token = os.environ.get(TOKEN)
        self.http = urllib3.PoolManager(
            maxsize=settings.prefetch + 1,
            headers={"authorization": f"Bearer {token}"} if token else {},
            timeout=urllib3.Timeout(connect=CONNECT_SECONDS, read=settings.timeout),
            retries=False,
        )
        self.network_error = urllib3.exceptions.HTTPError
        self.turn, self.failed, self.stopped = itertools.count(), dict[str, float](), threading.Event()
        self.started = False

    def call(
        self,
        method: str,
        path: str,
        read: Callable[[Answer], Any],
        body: bytes | None = None,
        *,
        only: str = "",
        start: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """What `read` makes of the answer of a server: of `only` that one, or of whichever gives one first, beginning
        with number `start`, or by turns. `read` raises ValueError for what was not asked.

        Raises Gone for a session that is not there; ConfigError for what no server will ever answer; ServerLost.
        """
        patience = self.settings.patience if self.started else min(self.settings.patience, START_SECONDS)
        give_up, pause, trouble = time.monotonic() + patience, 0.1, ""
        more = {**self.http.headers, **(headers or {})}
        while True:
            for url in [only] if only else self._order(start):
                try:
                    answer = self.http.request(method, url + path, body=body, headers=more)
                    if answer.status == 200:
                        return read(Answer(url, answer.data, answer.headers))
                except self.network_error as error:
                    trouble = f"{url}: {' '.join(str(error).split())[:300]}"
                except ValueError as error:  # Refused, or no JSON
                    trouble = f"{url} answers what was not asked: {error}"
                else:
                    trouble = f"{url} answers {answer.status}: {_words(answer.data)}"
                    if answer.status in (401, 403):
                        raise ConfigError(f"{trouble} (set the environment variable {TOKEN})")
                    if answer.status == 409:
                        raise Gone
                    if 400 <= answer.status < 500 and answer.status not in (408, 429):
                        raise ConfigError(trouble)
                    if answer.status == 503:  # busy, not gone
                        continue
                self.failed[url] = time.monotonic()
            if time.monotonic() + pause > give_up or self.stopped.wait(pause):
                raise ServerLost(f"the teacher has not answered for {patience:g} s (teacher.patience): {trouble}")
            pause = min(2 * pause, 5.0)

    def _order(self, start: int | None) -> list[str]:
        """The servers by turns, those that failed a moment ago last."""
        start, now = (next(self.turn) if start is None else start) % len(self.urls), time.monotonic()
        turns = self.urls[start:] + self.urls[:start]
        return sorted(turns, key=lambda url: now - self.failed.get(url, -REST_SECONDS) < REST_SECONDS)

    def close(self) -> None:
        """Stop asking. Nothing waits for servers that do not answer."""
        self.stopped.set()
        self.http.clear()


def _words(body: bytes) -> str:
    try:
        found = json.loads(body)["error"]
        return str(found["message"] if isinstance(found, dict) else found)
    except (ValueError, KeyError, TypeError):
        return " ".join(body[:200].decode(errors="replace").split())
