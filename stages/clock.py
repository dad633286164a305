"""How long a round has trained, over all calls that went on with it."""

import time


class Clock:
    """Seconds since it was made, and those of earlier calls as far as a checkpoint kept them."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.time(), time.process_time()

    def spent(self) -> dict[str, float]:
        """Seconds of work, and of this process's CPU."""
        return {
            "seconds": round(time.time() - self._wall, 3),
            "cpu_seconds": round(time.process_time() - self._cpu, 3),
        }

    def add(self, spent: dict[str, float]) -> None:
        """Count what an earlier call had spent."""
        self._wall -= spent["seconds"]
        self._cpu -= spent["cpu_seconds"]
