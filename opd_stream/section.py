"""What every setting that a config can hold has in common."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the config, and the value that the library computes with: immutable and checked.

    A section is declared once, beside the functions that read it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
