"""How a stage tells what it is doing; the command line decides what that looks like."""

from typing import Protocol


class Progress(Protocol):
    """Bars, lines or nothing."""

    def start(self, stage: str, total: int, done: int = 0) -> None:
        """A stage begins, with `total` things to do, some of which may be done already."""
        ...

    def advance(self, stage: str, count: int, tokens: int = 0, **facts: float) -> None:
        """`count` more things are done, with that many tokens; facts are its newest numbers."""
        ...

    def say(self, line: str) -> None:
        """Something worth a line of its own."""
        ...

    def warn(self, line: str) -> None:
        """Something that may be wrong."""
        ...


class Silent:
    """No output (library use and tests)."""

    def start(self, stage: str, total: int, done: int = 0) -> None:
        pass

    def advance(self, stage: str, count: int, tokens: int = 0, **facts: float) -> None:
        pass

    def say(self, line: str) -> None:
        pass

    def warn(self, line: str) -> None:
        pass
