"""A real S3 server for tests: moto's, in a process of its own, with faults on demand.

    python -m tests.s3_server PORT

Every request counts up; with `S3_FAULT_EVERY=n` each n-th one is answered by 503 Slow Down, each
(n + 1)-th is slow, and if they are downloads each (n + 2)-th breaks off in the middle and each
(n + 3)-th has a wrong byte.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

SLOW_SECONDS = 0.3


class Faults:
    """WSGI middleware that makes some requests fail."""

    def __init__(self, app: Callable[..., Iterable[bytes]], every: int) -> None:
        self._app, self._every, self._count = app, every, 0
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if not self._every or "moto-api" in environ.get("PATH_INFO", ""):
            return self._app(environ, start_response)
        with self._lock:
            self._count += 1
            place = self._count % self._every
        if place == 0:
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>injected</Message></Error>"]
        if place == 1:
            time.sleep(SLOW_SECONDS)
        body = b"".join(self._app(environ, start_response))
        is_object = environ["REQUEST_METHOD"] == "GET" and not environ.get("QUERY_STRING")
        if is_object and body and place == 3:
            middle = len(body) // 2
            return [body[:middle], bytes([body[middle] ^ 1]), body[middle + 1 :]]
        return _cut(body) if place == 2 and is_object else [body]


def _cut(body: bytes) -> Iterator[bytes]:
    yield body[: len(body) // 2]
    raise ConnectionResetError("injected")


def main() -> None:
    app = DomainDispatcherApplication(create_backend_app)
    faults = Faults(app, int(os.environ.get("S3_FAULT_EVERY", "0")))
    server = make_server("127.0.0.1", int(sys.argv[1]), faults, threaded=True)
    print("ready", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
