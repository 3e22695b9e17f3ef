"""JSON requests to one engine, many at a time, each with a time limit; given up when the engine is dead."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import aiohttp

from megatron_mmrl import pulse
from megatron_mmrl.rollout.engine import EngineError
from megatron_mmrl.rollout.server_args import Endpoint

T = TypeVar("T")
Json = Mapping[str, object]
_POLL_S = 0.2
_MAX_CONNECTIONS = 256
_REAP_S = 2.0  # a dying server's sockets close a moment before its end can be seen


class EngineServer(Protocol):
    """What a client needs of the server it talks to."""

    @property
    def endpoint(self) -> Endpoint: ...

    def wait_until_ready(self) -> None:
        """Return when the server answers. Raises EngineError when it has ended or takes too long."""
        ...

    def check_alive(self) -> None:
        """Raise EngineDiedError when the server's process has ended."""
        ...

    def stop(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request: POST with a JSON body, GET without."""

    what: str  # for messages: "generating for prompt train.parquet:7"
    path: str
    body: Json | None = None
    admin: bool = False


class EngineHttp:
    """Talks on a thread of its own, so that callers need no event loop. May be used by any thread."""

    def __init__(self, server: EngineServer, timeout_s: float) -> None:
        self._server, self._timeout_s = server, timeout_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engine-http", daemon=True)
        self._thread.start()
        self._session = self._wait(self._open_session(), "connecting")

    def call(self, call: Call) -> object:
        """The decoded answer to one request. Raises EngineError, see ``call_all``."""
        return self.call_all([call], lambda _, answer: answer)[0]

    def call_all(self, calls: Sequence[Call], read: Callable[[int, object], T]) -> list[T]:
        """What ``read`` makes of the decoded answers to requests made concurrently, in their order.

        ``read(number of the call, answer)`` is called on the thread of the requests as soon as an answer is there,
        while others are waited for. A failure, its own included, cancels the others.

        Raises:
            EngineError: no answer within the time limit, an answer with an error status, or a dead engine; names the
                request.
        """
        return self._wait(self._run_all(calls, read), calls[0].what if calls else "asking nothing")

    def close(self) -> None:
        """Close the connections and end the thread; safe to call twice."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._session.close(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _open_session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            self._server.endpoint.url,
            # A new connection each time: the server closes kept ones when idle or after an error, and a request that
            # is sent at that moment is lost. On loopback opening one is not worth measuring.
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None),  # the limit of a request is ours
            trust_env=False,  # never through an HTTP proxy
        )

    async def _run_all(self, calls: Sequence[Call], read: Callable[[int, object], T]) -> list[T]:
        slots = asyncio.Semaphore(_MAX_CONNECTIONS)

        async def run(number: int, call: Call) -> T:
            answer = await self._run(call, slots)
            pulse.beat()
            return read(number, answer)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(run(number, call)) for number, call in enumerate(calls)]
        except* EngineError as failures:
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _run(self, call: Call, slots: asyncio.Semaphore) -> object:
        keys = self._server.endpoint
        headers = {"Authorization": f"Bearer {keys.admin_key if call.admin else keys.api_key}"}
        method = "GET" if call.body is None else "POST"
        try:
            async with (
                slots,
                asyncio.timeout(self._timeout_s),
                self._session.request(method, call.path, json=call.body, headers=headers) as answer,
            ):
                content = await answer.read()
        except TimeoutError:
            raise EngineError(
                f"{call.what}: no answer from {keys.url}{call.path} within request_timeout_s={self._timeout_s}"
            ) from None
        except aiohttp.ClientError as error:
            await self._raise_if_dead(call.what)
            raise EngineError(f"{call.what}: {keys.url}{call.path} failed: {error!r}") from error
        if answer.status != 200:
            raise EngineError(f"{call.what}: {call.path} answered {answer.status}: {content[:500]!r}")
        return json.loads(content) if answer.content_type == "application/json" else content.decode()

    async def _raise_if_dead(self, what: str) -> None:
        deadline = self._loop.time() + _REAP_S
        while self._loop.time() < deadline:
            self._raise_if_ended(what)
            await asyncio.sleep(_POLL_S)

    def _raise_if_ended(self, what: str) -> None:
        try:
            self._server.check_alive()
        except EngineError as error:
            raise type(error)(f"{what}: {error}") from None

    def _wait(self, coroutine: Coroutine[None, None, T], what: str) -> T:
        """Run on the loop's thread and wait, looking whether the engine still lives."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            with pulse.limited_wait(self._timeout_s):
                return self._poll(future, what)
        finally:
            future.cancel()

    def _poll(self, future: concurrent.futures.Future[T], what: str) -> T:
        while True:
            try:
                return future.result(_POLL_S)
            except concurrent.futures.TimeoutError:
                if future.done():
                    raise
                self._raise_if_ended(what)
