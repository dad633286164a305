"""Questions to a server over HTTP, asked again within bounds; the standard library alone.

A question is one POST of JSON. What may be otherwise a moment later (no connection, a timeout, 429
and 5xx, an answer that is cut off or is not what was asked for) is asked again after a pause that
doubles; what will not (400, a key that is refused) is told at once. Redirections are not followed,
so that a key goes nowhere else, and no message holds it.
"""

import contextlib
import email.utils
import http.client
import json
import os
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Generator
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from opd_stream.errors import UserError
from opd_stream.section import Section, is_object

T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds, doubled from one try to the next
LONGEST_WAIT = 300.0  # seconds that a Retry-After may ask for
PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}  # asked again
READ_BYTES = 1 << 20  # at once
TEXT = 200  # characters of a server's own words in a line


def _checked_url(text: str) -> str:
    """The address without a last slash, and without /v1, which requests name themselves."""
    expected = "http://HOST:PORT or https://HOST/PATH"
    try:
        parts = urlsplit(text)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port
    except ValueError:
        is_address, parts = False, urlsplit("")
    if not is_address or re.search(r"[\s\\]|[^\x21-\x7e]", text):
        raise PydanticCustomError("url", f"expected the address of a server, {expected}")
    if parts.username is not None or parts.password is not None:
        raise PydanticCustomError(
            "url",
            "expected an address without a key or password, which would be written into run "
            "folders; put it into an environment variable and name that in key_env",
        )
    if parts.query or parts.fragment:
        raise PydanticCustomError("url", f"expected {expected}, without ? and #")
    return text.rstrip("/").removesuffix("/v1")


Url = Annotated[str, AfterValidator(_checked_url)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]


class ServerOptions(Section):
    """A running server that scores, and how it is asked."""

    url: Url = Field(description="address of the server: http://HOST:PORT, or with a path")
    model: str = Field(min_length=1, description="name of the model, as the server knows it")
    revision: str = Field(
        default="",
        description="name for what else the server runs, such as a quantisation; another one is "
        "another teacher, whose scores are made anew",
    )
    api: Literal["completions", "vllm", "sglang"] = Field(
        default="completions",
        description="completions: POST /v1/completions with prompt_logprobs; vllm: "
        "/inference/v1/generate, which scores given ids, too (model runner V2); sglang: /generate",
    )
    forced: Literal["exact", "tail"] = Field(
        default="exact",
        description="where the server cannot be asked for given ids: exact refuses it; tail leaves "
        "terminators outside the top K in the tail, and marks them",
    )
    key_env: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="environment variable with the key, sent as a bearer token; null: none",
    )
    concurrency: int = Field(default=16, ge=1, le=1024, description="requests at once")
    timeout_seconds: Seconds = Field(default=120, description="until a silent request is lost")
    tries: int = Field(default=6, ge=1, le=100, description="of a request, before the run stops")


PLACEMENT = ("url", "key_env", "concurrency", "timeout_seconds", "tries")
"""Fields that decide how a server is asked, never what it answers."""


class BrokenAnswer(Exception):
    """An answer that is not what was asked for; it is asked for again."""


class Refused(UserError):
    """A server that answered, and will not do what was asked."""

    def __init__(self, status: int, line: str) -> None:
        super().__init__(line)
        self.status = status


class _Passing(Exception):
    """Something that may be otherwise a moment later, and the pause that was asked for."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.pause = pause


class ServerClient:
    """A server, from any number of threads; connections are kept.

    Example:
        >>> client.ask("/v1/completions", {"prompt": [5]}, read=json.loads, most_bytes=2**20)
    """

    def __init__(self, options: ServerOptions) -> None:
        """Raises UserError where there is no key, or none that can be sent."""
        self.options = options
        self._parts = urlsplit(options.url)
        self._key = _key(options.key_env)
        self._idle: list[http.client.HTTPConnection] = []
        self._open: set[http.client.HTTPConnection] = set()
        self._lock, self._stopped = threading.Lock(), threading.Event()

    def ask(
        self, path: str, question: dict[str, Any], *, read: Callable[[bytes], T], most_bytes: int
    ) -> T:
        """What `read` makes of the answer.

        Args:
            path: below the server's address.
            question: sent as JSON.
            read: raises `BrokenAnswer` for what was not asked for.
            most_bytes: that an answer may have.

        Raises:
            Refused: the server will not (says why and what to do).
            UserError: no whole answer in as many tries as the options have.
        """
        body = json.dumps(question, separators=(",", ":")).encode()
        reason = ""
        for number in range(self.options.tries):
            try:
                return read(self._once("POST", path, body, most_bytes))
            except BrokenAnswer as error:
                reason, pause = str(error), None
            except _Passing as error:
                reason, pause = str(error), error.pause
            if number + 1 < self.options.tries:
                doubled = min(FIRST_PAUSE * 2**number, LONGEST_PAUSE)
                pause = doubled * random.uniform(0.5, 1.0) if pause is None else pause
                if self._stopped.wait(pause):
                    break
        raise UserError(
            f"no answer of the served teacher {self.options.url}{path} could be used in "
            f"{self.options.tries} tries ({reason}); what is committed stays; look at the server, "
            "or correct teacher.server.url, and run the same command again (teacher.server.tries "
            "and timeout_seconds are how patient it is)"
        )

    def models(self) -> list[str]:
        """Names of the models that are served; empty where the server does not say."""
        try:
            answer = json.loads(self._once("GET", "/v1/models", None, READ_BYTES))
            return [str(each["id"]) for each in answer["data"]]
        except (UserError, _Passing, ValueError, LookupError, TypeError):
            return []

    def stop(self) -> None:
        """End what is being asked: connections are closed, nothing is asked again."""
        self._stopped.set()
        with self._lock:
            held = list(self._open)
        for connection in held:
            with contextlib.suppress(OSError, AttributeError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    def resume(self) -> None:
        """Ask again, after `stop`."""
        self._stopped.clear()

    def _once(self, method: str, path: str, body: bytes | None, most_bytes: int) -> bytes:
        """The body of a whole answer with status 200."""
        try:
            with self._connection() as connection:
                status, headers, data = self._exchange(connection, method, path, body, most_bytes)
        except (OSError, http.client.HTTPException) as error:
            raise _Passing(self._reason(error)) from error
        if status == 200:
            return data
        words = self._words(data)
        said = f"{status} {http.client.responses.get(status, '')}{f': {words}' if words else ''}"
        if status in PASSING:
            raise _Passing(said, _retry_after(headers) if status in (429, 503) else None)
        raise Refused(status, self._refusal(status, said, path))

    def _exchange(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: bytes | None,
        most_bytes: int,
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        is_kept = connection.sock is not None
        try:
            connection.request(method, f"{self._parts.path}{path}", body, headers)
            response = connection.getresponse()
        except (ConnectionError, http.client.BadStatusLine):
            if not is_kept or self._stopped.is_set():
                raise
            connection.close()  # the server closed what was idle for long: no answer is lost
            connection.request(method, f"{self._parts.path}{path}", body, headers)
            response = connection.getresponse()
        read = bytearray()
        while chunk := response.read(READ_BYTES):
            read += chunk
            if len(read) > most_bytes:
                connection.close()
                raise _Passing(f"an answer of more than {most_bytes:,} bytes")
        if response.length:  # what is left of the length that was announced
            raise http.client.IncompleteRead(bytes(read[:0]), response.length)
        return response.status, response.headers, bytes(read)

    @contextlib.contextmanager
    def _connection(self) -> Generator[http.client.HTTPConnection]:
        """A connection for one exchange; it is kept where the exchange was whole."""
        with self._lock:
            connection = self._idle.pop() if self._idle else self._new()
            self._open.add(connection)
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        finally:
            with self._lock:
                self._open.discard(connection)
        with self._lock:
            self._idle.append(connection)

    def _new(self) -> http.client.HTTPConnection:
        host, port = self._parts.hostname or "", self._parts.port
        timeout = self.options.timeout_seconds
        if self._parts.scheme == "http":
            return http.client.HTTPConnection(host, port, timeout=timeout)
        context = ssl.create_default_context()
        return http.client.HTTPSConnection(host, port, timeout=timeout, context=context)

    def _reason(self, error: Exception) -> str:
        if isinstance(error, TimeoutError):
            return f"no answer within {self.options.timeout_seconds:g} s"
        text = " ".join(str(error).split())
        return self._without_key(f"{type(error).__name__}: {text}"[:TEXT])

    def _words(self, data: bytes) -> str:
        """What a server says of an error, in a line."""
        text = data[: 8 * TEXT].decode(errors="replace")
        with contextlib.suppress(ValueError):
            found: Any = json.loads(data)
            for name in ("error", "message", "detail"):
                found = found.get(name, found) if is_object(found) else found
            text = found if isinstance(found, str) else json.dumps(found)
        return self._without_key(" ".join(text.split()))[:TEXT]

    def _without_key(self, text: str) -> str:
        return text if self._key is None else text.replace(self._key, "KEY")

    def _refusal(self, status: int, said: str, path: str) -> str:
        options, place = self.options, f"the served teacher {self.options.url}{path}"
        if status in (401, 403):
            name = options.key_env
            sent = "no key was sent" if name is None else f"sent was the one in {name}"
            return (
                f"{place} refuses the key ({said}); {sent}; name an environment variable that "
                "holds one it takes in teacher.server.key_env"
            )
        if status == 404:
            served = self.models()
            listed = f"; it serves {', '.join(served[:5])}" if served else ""
            return (
                f"{place} does not have model {options.model!r} or that path ({said}){listed}; "
                "correct teacher.server.model, url or api"
            )
        return f"{place} refuses what it is asked ({said}); change the config or how it is started"


def _key(name: str | None) -> str | None:
    """The key in an environment variable.

    Raises:
        UserError: there is none, or none that can be sent; the line does not hold it.
    """
    if name is None:
        return None
    key = os.environ.get(name, "")
    if not key:
        raise UserError(
            f"teacher.server.key_env names the environment variable {name}, which is not set; "
            "export it where the teacher's workers run, or leave key_env out"
        )
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise UserError(
            f"the environment variable {name} holds spaces, line ends or letters that no key has; "
            "export the key alone"
        )
    return key


def _retry_after(headers: http.client.HTTPMessage) -> float | None:
    """Seconds that a server asks to wait; None: it does not say."""
    text = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d*)?", text):
        return min(float(text), LONGEST_WAIT)
    with contextlib.suppress(ValueError, TypeError):
        wait = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        return min(max(wait, 0.0), LONGEST_WAIT)
    return None
