"""Records in files of their own: each says which file it is, and carries the digest of all it says.

    {"counts": …, "unit": 2, "record": "rollouts/3f0c…/units/00002.json", "digest": "9a41…"}

`digest` is the SHA-256 of the canonical JSON of the rest, so a changed digit, a flipped bit and a
record copied over that of another unit are all the same finding. A record without both fields was
written before records had them: it is read, and `cache verify` says that it cannot be checked.
"""

import contextlib
import errno
import json
import logging
import re
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import Field, ValidationError

from opd_stream.errors import UserError
from opd_stream.section import Record, check_version, is_object, read_record
from opd_stream.store.files import (
    READS,
    canonical_json,
    is_remote,
    is_there,
    publish,
    publish_new,
    sha256,
)

NAME, DIGEST = "record", "digest"
_DIGEST_FIELD = re.compile(rb'"digest":"([0-9a-f]{64})",')


class DamagedRecord(UserError):
    """A file of a store or a run that is not what was written there."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"{path} {reason}; expected the file that opd-stream wrote; continue its run, which "
            "writes it again; where that refuses it, delete it first"
        )
        self.path, self.reason = path, reason


class Sealed(Record):
    """A record that is a file."""

    NAMED_BY: ClassVar[int] = 1  # last parts of the path that the record names; 0: may lie anywhere
    digest: str | None = Field(default=None, exclude=True)  # None: written before there were any

    def misplaced(self, path: Path) -> str | None:
        """Why it cannot be the record of that file, or None."""
        return None


S = TypeVar("S", bound=Sealed)


def load_record(kind: type[S], path: Path) -> S:
    """The record in a JSON file.

    Raises:
        DamagedRecord: it is not what was written there.
        UserError: another format version wrote it, or it is no such record (says where).
    """
    for _ in range(READS - 1 if is_remote(path) else 0):  # an answer may arrive torn
        with contextlib.suppress(DamagedRecord):
            return _load(kind, path)
    return _load(kind, path)


def _load(kind: type[S], path: Path) -> S:
    data = _json_bytes(path)
    record = None
    if _is_as_written(data, _name(kind, path)):
        with contextlib.suppress(ValidationError):  # of another version, which is named below
            record = kind.model_validate_json(data)
    return _checked(kind, path, data) if record is None else _in_place(record, path)


def is_sound(kind: type[Sealed], path: Path) -> bool:
    """Whether the bytes of a file are those that a record's writer wrote there; False: not known.

    Reads no more than the bytes, which are enough in nearly all cases.
    """
    try:
        return _is_as_written(_json_bytes(path), _name(kind, path))
    except (OSError, UserError):
        return False


def _is_as_written(data: bytes, name: str) -> bool:
    """Whether canonical JSON without its digest has that digest, and says this name."""
    found = list(_DIGEST_FIELD.finditer(data))
    if len(found) != 1 or f'"{NAME}":{json.dumps(name)}'.encode() not in data:
        return False
    rest = data[: found[0].start()] + data[found[0].end() :]
    return sha256(rest).encode() == found[0][1]


def _checked(kind: type[S], path: Path, data: bytes) -> S:
    value = _parsed(data, path)
    check_version(kind, value, str(path))
    unsealed(value, path, _name(kind, path))
    return _in_place(read_record(kind, value, str(path)), path)


def _in_place(record: S, path: Path) -> S:
    reason = record.misplaced(path)
    if reason is not None:
        raise DamagedRecord(path, f"is damaged: {reason}")
    return record


def record_bytes(record: Sealed, path: Path, *, is_pretty: bool = False) -> bytes:
    """The content of the file of a record."""
    value = sealed(record.as_json(), _name(type(record), path))
    return pretty_json(value) if is_pretty else canonical_json(value)


def publish_record(
    path: Path, record: Sealed, *, is_checked: bool = True, is_pretty: bool = False
) -> None:
    """Write a record, replacing what was there.

    `is_checked`: False where it repeats what a record without a digest says, and gets none either.
    """
    old = canonical_json(record.as_json())
    publish(path, record_bytes(record, path, is_pretty=is_pretty) if is_checked else old)


def publish_new_record(path: Path, record: Sealed, *, is_pretty: bool = False) -> bool:
    """Write a record unless there is one; returns whether it is the one there."""
    return publish_new(path, record_bytes(record, path, is_pretty=is_pretty))


def sealed(value: dict[str, Any], name: str) -> dict[str, Any]:
    """A JSON object with the name of its file and its digest."""
    named = {**value, NAME: name}
    return {**named, DIGEST: _digest(named)}


def unsealed(value: Any, path: Path, name: str) -> dict[str, Any]:
    """The JSON object without the two.

    Raises:
        DamagedRecord: the digest is that of another object, or the name that of another file.
    """
    if not is_object(value):
        raise DamagedRecord(path, f"is damaged: it holds a {type(value).__name__}, no object")
    rest = {key: each for key, each in value.items() if key != DIGEST}
    if NAME in value or DIGEST in value:
        if value.get(DIGEST) != _digest(rest):
            raise DamagedRecord(path, "is damaged: its digest is that of another content")
        if value.get(NAME) != name:
            raise DamagedRecord(path, f"is damaged: it is {value.get(NAME)!r:.120} of some store")
    return {key: each for key, each in rest.items() if key != NAME}


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        DamagedRecord: the file is not JSON, or no file (names it).
        UserError: the system does not let it be read.
    """
    return _parsed(_json_bytes(path), path)


def _parsed(data: bytes, path: Path) -> Any:
    try:
        return json.loads(data, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise DamagedRecord(path, f"is not valid JSON ({str(error)[:120]})") from error


def _json_bytes(path: Path) -> bytes:
    """The bytes of a JSON file; raises as `read_json`."""
    if not is_remote(path) and not path.is_file() and is_there(path):
        raise DamagedRecord(path, "is no file, or a link to none")
    try:
        return path.read_bytes()
    except OSError as error:
        if error.errno == errno.ENOTDIR:
            raise FileNotFoundError(errno.ENOENT, "its folder is none", str(path)) from error
        if is_remote(path) or error.errno not in (errno.EACCES, errno.EPERM, errno.EIO):
            raise
        raise UserError(
            f"{path} cannot be read ({error.strerror}); expected a file that this user may read; "
            "look at its permissions and its disk"
        ) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, whose keys are different: of two readers each might take another value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands in it twice")
    return found


def say_mended(path: Path, reason: str, what: str = "it is written again") -> None:
    """Name a record that was found damaged, and what becomes of it, in a line of the log."""
    name = "/".join(path.parts[-3:])
    logging.getLogger("opd_stream").warning("%s %s; %s", name, reason, what)


def pretty_json(value: Any) -> bytes:
    """JSON for people."""
    return (json.dumps(value, indent=2, default=str) + "\n").encode()


def _digest(value: dict[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return sha256(text.encode())


def _name(kind: type[Sealed], path: Path) -> str:
    return "/".join(path.parts[-kind.NAMED_BY :]) if kind.NAMED_BY else kind.__name__
