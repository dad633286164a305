"""How a stage tells what it is doing; the command line decides what that looks like."""

from typing import Protocol


class Progress(Protocol):
    """Bars, lines or nothing."""

    def start(self, stage: str, total: int) -> None:
        """A stage begins, with `total` things to do."""
        ...

    def advance(self, stage: str, count: int, note: str = "") -> None:
        """`count` more things are done."""
        ...

    def say(self, line: str) -> None:
        """Something worth a line of its own."""
        ...


class Silent:
    """No output (library use and tests)."""

    def start(self, stage: str, total: int) -> None:
        pass

    def advance(self, stage: str, count: int, note: str = "") -> None:
        pass

    def say(self, line: str) -> None:
        pass
