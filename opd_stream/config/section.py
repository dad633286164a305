"""What every part of the config has in common."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the config: immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)
