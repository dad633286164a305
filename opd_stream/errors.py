"""The one exception class a user is meant to read.

Everything a user can cause ends in a `UserError` whose text is one line: what was found, what was
expected, what to do. The command line prints it and exits with code 2; any other exception is a
defect of ours and keeps its traceback.
"""

import contextlib
from collections.abc import Generator
from pathlib import Path


class UserError(ValueError):
    """A mistake in a config, an input file or the environment, told in one line.

    Several mistakes that are told at once are an argument each, and a line each.

    Example:
        >>> raise UserError("window_tokens is 0; expected at least 1; set window.tokens=1 or more")
    """

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


def shortened(value: object, most: int = 80) -> str:
    """A value as code writes it, in one line; what is longer than `most` characters is cut off."""
    text = repr(str(value) if isinstance(value, Path) else value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


class Unreachable(UserError):
    """An object store that does not answer, or refuses."""


@contextlib.contextmanager
def named(section: str) -> Generator[None]:
    """Say of errors inside which section of the config their fields are in."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{section}: {error}") from error


def unreachable(place: Path | str, error: BaseException, waited: float | None = None) -> str:
    """The line of an object store that does not answer, or refuses.

    Args:
        place: what was asked for.
        error: of the client.
        waited: seconds of silence; None: it answered, with a refusal.
    """
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    silence = "" if waited is None else f": no answer for {waited:.0f} s"
    setting = "" if waited is None else "; store_seconds is how long a run waits"
    return (
        f"cannot reach {place}{silence} ({reason}); nothing half-written was kept, what is "
        "committed stays; check the address, the credentials and AWS_ENDPOINT_URL, and run the "
        f"same command again{setting}"
    )
