"""Lines of text files as people have them: plain, .gz or .zst, with or without a mark in front."""

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from opd_stream.errors import UserError, shortened

CHUNK_BYTES = 1 << 16
ZSTD_BYTES = 1 << 11  # read at once: a block of 4 bytes may stand for 2**17
MOST_CHARACTERS = 2**29  # of a line
MOST_EMPTY = 2**20  # lines of a file
LARGEST_SHARE, SMALLEST_BOUND = 256, 2**26  # bytes that packed ones may become


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a text file, plain, .gz or .zst, without their ends.

    A byte order mark is left out, and a carriage return stays.

    Raises:
        UserError: it cannot be read, is torn, or the text is not UTF-8; or it is made to keep a
            reader busy: of empty lines, or far larger than it is packed.
    """
    with opened(path) as file:
        unpack = {".gz": _gunzipped, ".zst": _unpacked}.get(path.suffix, _chunks)
        rest: list[str] = []  # of a line that may be long, such as a whole array
        characters = empty = 0
        try:
            for text in codecs.iterdecode(unpack(path, file), "utf-8-sig"):
                first, *lines = text.split("\n")
                empty += sum(not line or line.isspace() for line in lines)
                if empty > MOST_EMPTY:
                    raise UserError(
                        f"{path} has more than {MOST_EMPTY:,} empty lines; expected rows; leave "
                        "them out"
                    )
                rest.append(first)
                characters += len(first)
                if characters > MOST_CHARACTERS:
                    raise UserError(
                        f"{path} has a line of more than {MOST_CHARACTERS:,} characters; expected "
                        "one row a line; write it so"
                    )
                if lines:
                    yield "".join(rest)
                    yield from lines[:-1]
                    rest = lines[-1:]
                    characters = len(rest[0])
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text ({error}); convert it") from error
        if last := "".join(rest):
            yield last


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, or an object in it has a key twice.
        RecursionError: it is nested too deep.
    """
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {shortened(twice)} stands twice; keep one of them")
    return found


def opened(path: Path) -> BinaryIO:
    """A file, to be read.

    Raises:
        UserError: it is a folder, not there or not readable.
    """
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); expected a file; check the path"
        ) from error


def _chunks(_: Path, file: BinaryIO) -> Iterator[bytes]:
    return iter(partial(file.read, CHUNK_BYTES), b"")


def _bounded(path: Path, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """What a packed file holds, a little at a time and not far more than its own bytes."""
    size = path.stat().st_size
    left = SMALLEST_BOUND + LARGEST_SHARE * size
    for chunk in chunks:
        left -= len(chunk)
        if left < 0:
            raise UserError(
                f"{path} has {size:,} bytes and holds more than {SMALLEST_BOUND:,} and "
                f"{LARGEST_SHARE} times that; expected rows; unpack it and look"
            )
        yield from (chunk[at : at + CHUNK_BYTES] for at in range(0, len(chunk), CHUNK_BYTES))


def _gunzipped(path: Path, file: BinaryIO) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=file) as text:
            yield from _bounded(path, iter(partial(text.read, CHUNK_BYTES), b""))
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file ({error}); copy it again") from error


def _unpacked(path: Path, file: BinaryIO) -> Iterator[bytes]:
    return _bounded(path, _frames(path, file))


def _frames(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """The content of a file of zstd frames; the last has to end where the file does."""
    frame = zstandard.ZstdDecompressor().decompressobj()
    try:
        while chunk := file.read(ZSTD_BYTES):
            while chunk:
                if frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(chunk)
                chunk = frame.unused_data
        if not frame.eof:
            raise zstandard.ZstdError("it ends in the middle")
    except zstandard.ZstdError as error:
        raise UserError(f"{path} is not a whole zstd file ({error}); copy it again") from error
