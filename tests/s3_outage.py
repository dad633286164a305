"""A door in front of a server that can be shut: no new connection, and those there are broken."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Self


class Door:
    """Forwards one port to another until it is shut.

    Args:
        target: port of the server.
        shut_at: shut when a request's head holds this text, before the server hears of it.
        after: how many of these requests go through before.
    """

    def __init__(self, target: int, shut_at: str = "", after: int = 0) -> None:
        self._target, self._shut_at, self._left = target, shut_at.encode(), after
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.shuts, self.was_shut = 0, threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._accept()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.shut()

    def shut(self) -> None:
        """From now on connections are refused."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for end in self._open:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
            self._open.clear()
        self.shuts += 1
        self.was_shut.set()

    def open_again(self, shut_at: str = "") -> None:
        """The server can be reached again, until a request holds the text, if there is one."""
        self._shut_at, self._left = shut_at.encode(), 0
        self.was_shut.clear()
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._accept()

    @contextlib.contextmanager
    def opening_after(self, seconds: float) -> Iterator[None]:
        """Inside, a door that was shut opens again so many seconds later."""
        is_over = threading.Event()

        def wait() -> None:
            self.was_shut.wait()
            if not is_over.wait(seconds):
                self.open_again()

        waiter = threading.Thread(target=wait)
        waiter.start()
        try:
            yield
        finally:
            is_over.set()
            self.was_shut.set()  # where it never was: the waiter ends too
            waiter.join()

    def _accept(self) -> None:
        threading.Thread(target=self._take, args=(self._listener,), daemon=True).start()

    def _take(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                with self._lock:
                    self._open |= {near, far}
                for ends in ((near, far, True), (far, near, False)):
                    threading.Thread(target=self._forward, args=ends, daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, is_request: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if is_request and self._shut_at and self._shut_at in data:
                    self._left -= 1
                    if self._left < 0:
                        self.shut()
                        break
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
