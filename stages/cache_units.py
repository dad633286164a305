"""Which units of which artifacts a round trains on, as a value that can travel and be recorded."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A unit of a cache, and the prompts of the round whose place it takes."""

    unit: int
    first: int
    last: int  # exclusive


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheUnits:
    """Units of one scores artifact that a round trains on."""

    rollouts: str  # fingerprint
    scores: str  # fingerprint
    policy_version: int  # of the oldest tokens in it
    made_in: int  # the round that made the artifact
    slots: tuple[Slot, ...]

    @staticmethod
    def from_json(value: dict[str, Any]) -> "CacheUnits":
        """A cache read back."""
        slots = tuple(Slot(**slot) for slot in value["slots"])
        return CacheUnits(**{**value, "slots": slots})
