"""What the commands say on stderr beside their results: plain lines, or one JSON object a line."""

import io
import json
import logging
import os
import sys
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, TextIO

LOG = logging.getLogger("opd_stream")


class Level(StrEnum):
    """From which level on a command speaks."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"


class JsonLines(logging.Formatter):
    """Time (ISO 8601, UTC), level, message and fields."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = dict(getattr(record, "fields", {}))
        if record.name != LOG.name:
            fields["logger"] = record.name
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            "fields": fields,
        }
        return json.dumps(line, default=str)


class PlainLines(logging.Formatter):
    """The message; a warning is called one."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = "warning: " if record.levelno == logging.WARNING else ""
        return prefix + super().format(record)


class _Stderr(logging.Handler):
    """Writes to what stderr is at the moment, so that lines appear above bars."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr.stream if isinstance(sys.stderr, _Foreign) else sys.stderr
        stream.write(self.format(record) + "\n")
        stream.flush()


class _Foreign(io.TextIOBase):
    """Stderr for what does not go through a logger: each line becomes a record, so it is JSON."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self._rest = stream, ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if line.strip():
                logging.getLogger("stderr").warning("%s", line)
        return len(text)

    def fileno(self) -> int:
        return self.stream.fileno()


def set_up(level: Level, *, as_json: bool) -> None:
    """Say what is of this level or above; libraries are heard from their warnings on."""
    root = logging.getLogger()
    root.handlers = [handler for handler in root.handlers if not isinstance(handler, _Stderr)]
    handler = _Stderr()
    handler.setFormatter(JsonLines() if as_json else PlainLines())
    root.addHandler(handler)
    LOG.setLevel(level.upper())
    logging.captureWarnings(as_json)
    if as_json and not isinstance(sys.stderr, _Foreign):
        sys.stderr = _Foreign(sys.stderr)


def tell_error(message: str) -> None:
    """A mistake of the user, in one line."""
    if is_json():
        LOG.error("%s", message)
    else:
        sys.stderr.write(f"opd-stream: {message}\n")


def is_json() -> bool:
    """Whether stderr is for programs."""
    return isinstance(sys.stderr, _Foreign)


def shows_bars() -> bool:
    """Whether stderr is a terminal on which bars can move, and somebody asked for progress."""
    if is_json() or not LOG.isEnabledFor(logging.INFO) or os.environ.get("CI"):
        return False
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
