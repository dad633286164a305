"""Lines of text files, plain or compressed."""

import codecs
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

import zstandard

from opd_stream.errors import UserError

CHUNK_BYTES = 1 << 16


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a text file, plain or .zst, without their ends.

    Raises:
        UserError: a .zst file is torn, or the text is not UTF-8.
    """
    with path.open("rb") as file:
        is_packed = path.suffix == ".zst"
        chunks = _unpacked(path, file) if is_packed else iter(partial(file.read, CHUNK_BYTES), b"")
        rest = ""
        try:
            for text in codecs.iterdecode(chunks, "utf-8"):
                *lines, rest = (rest + text).split("\n")
                yield from lines
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text ({error}); convert it") from error
        if rest:
            yield rest


def _unpacked(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """The content of a file of zstd frames; the last has to end where the file does."""
    frame = zstandard.ZstdDecompressor().decompressobj()
    try:
        while chunk := file.read(CHUNK_BYTES):
            while chunk:
                if frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(chunk)
                chunk = frame.unused_data
        if not frame.eof:
            raise zstandard.ZstdError("it ends in the middle")
    except zstandard.ZstdError as error:
        raise UserError(f"{path} is not a whole zstd file ({error}); copy it again") from error
