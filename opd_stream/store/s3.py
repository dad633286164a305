"""S3 as a run needs it: a request that nobody answers is sent again until a timeout.

Every request of s3fs goes through `_call_s3`, so nothing that uses the store knows of outages.
Refusals (no such key, no such bucket, no right) are answers and are passed on at once. Only a
`StorePath` behaves so: what other code of the process does with s3:// addresses stays as it is.
"""

# s3fs and botocore have no types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Self, cast

import aiohttp
from botocore.exceptions import (
    ClientError,
    ConnectionError,
    FlexibleChecksumError,
    HTTPClientError,
)
from s3fs import S3FileSystem
from upath.implementations.cloud import S3Path

from opd_stream.errors import Unreachable, unreachable

TOLD_AFTER = 5.0  # seconds of silence
LONGEST_PAUSE = 5.0  # seconds between two attempts; the first is a tenth of one
_SILENCE = (
    ConnectionError,  # botocore's: refused, no route, no such host, no handshake
    HTTPClientError,  # broken off, or no byte in time
    FlexibleChecksumError,  # other bytes than were sent
    aiohttp.ClientError,
    OSError,
    asyncio.TimeoutError,
)
_ANSWERS = (FileNotFoundError, FileExistsError, PermissionError)
_BUSY = (408, 409, 429)  # HTTP statuses that ask to come again; so does everything from 500 on


def options(retry_timeout: float) -> dict[str, Any]:
    """What `RetryingS3` is made with."""
    config = {
        "retries": {"mode": "standard", "max_attempts": 1},  # attempts are counted here
        "connect_timeout": 10,
        "read_timeout": 60,
    }
    return {
        "config_kwargs": config,
        "use_listings_cache": False,  # other machines write here too
        "retry_timeout": retry_timeout,
    }


class RetryingS3(S3FileSystem):
    """s3fs that asks again for `retry_timeout` seconds before it says that nobody answers."""

    retries = 2  # of s3fs, for a body that breaks off

    def __init__(self, *arguments: Any, retry_timeout: float, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.retry_timeout = retry_timeout

    async def _call_s3(self, method: str, *arguments: Any, **fields: Any) -> Any:
        async def ask() -> Any:
            return await super(RetryingS3, self)._call_s3(method, *arguments, **fields)

        return await self._asking(ask, f"s3://{fields.get('Bucket')}/{fields.get('Key', '')}")

    async def _cat_file(self, path: str, *arguments: Any, **fields: Any) -> bytes:
        async def ask() -> bytes:
            whole = {**fields, "max_concurrency": 1}  # more would ask for the size of each first
            return await super(RetryingS3, self)._cat_file(path, *arguments, **whole)

        return await self._asking(ask, f"s3://{path}")

    async def _asking(self, ask: Callable[[], Awaitable[Any]], place: str) -> Any:
        start, pause, is_told = time.monotonic(), 0.1, False
        while True:
            try:
                return await ask()
            except Exception as error:
                if is_refusal(error):
                    raise Unreachable(unreachable(place, error)) from error
                if not is_silence(error):
                    raise
                waited = time.monotonic() - start
                if waited >= self.retry_timeout:
                    raise Unreachable(unreachable(place, error, waited)) from error
            if waited >= TOLD_AFTER and not is_told:
                is_told = True
                logging.getLogger("opd_stream").warning(
                    "%s does not answer; it is asked for %g s", place, self.retry_timeout
                )
            await asyncio.sleep(min(pause, max(0.0, self.retry_timeout - waited)))
            pause = min(2 * pause, LONGEST_PAUSE)


def is_silence(error: BaseException) -> bool:
    """Whether an exception says that the store did not answer, or asked to come again."""
    if not isinstance(error, (*_SILENCE, ClientError)) or isinstance(error, _ANSWERS):
        return False
    cause = error if isinstance(error, ClientError) else error.__cause__
    if isinstance(cause, ClientError):
        status = cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or status in _BUSY
    return True


def is_refusal(error: BaseException) -> bool:
    """Whether the store answered that there is no such bucket, or no right to it."""
    cause = error.__cause__
    code = cause.response.get("Error", {}).get("Code") if isinstance(cause, ClientError) else None
    return isinstance(error, PermissionError) or code == "NoSuchBucket"


class StorePath(S3Path):
    """A place in S3 that is reached through `RetryingS3`."""

    __slots__ = ()

    def __new__(cls, *parts: Any, **options: Any) -> Self:
        return object.__new__(cls)  # UPath's own would look up the class of the process

    def read_bytes(self) -> bytes:
        """All of it by one request, which is asked again as a whole."""
        return cast(bytes, self.fs.cat_file(self.path))

    @classmethod
    def _fs_factory(
        cls, urlpath: str, protocol: str, storage_options: Mapping[str, Any]
    ) -> RetryingS3:
        return RetryingS3(**storage_options)
