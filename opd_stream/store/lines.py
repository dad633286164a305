"""Lines of text files as people have them: plain, .gz or .zst, with or without a mark in front."""

import codecs
import gzip
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

import zstandard

from opd_stream.errors import UserError

CHUNK_BYTES = 1 << 16
ZSTD_BYTES = 1 << 11  # read at once: a block of 4 bytes may stand for 2**17
MOST_CHARACTERS = 2**29  # of a line


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a text file, plain, .gz or .zst, without their ends.

    A byte order mark is left out, and a carriage return stays.

    Raises:
        UserError: it cannot be read, is torn, or the text is not UTF-8.
    """
    with opened(path) as file:
        unpack = {".gz": _gunzipped, ".zst": _unpacked}.get(path.suffix, _chunks)
        rest: list[str] = []  # of a line that may be long, such as a whole array
        characters = 0
        try:
            for text in codecs.iterdecode(unpack(path, file), "utf-8-sig"):
                first, *lines = text.split("\n")
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


def _gunzipped(path: Path, file: BinaryIO) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=file) as text:
            yield from iter(partial(text.read, CHUNK_BYTES), b"")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file ({error}); copy it again") from error


def _unpacked(path: Path, file: BinaryIO) -> Iterator[bytes]:
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
