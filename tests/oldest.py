"""Constraints for the oldest versions that pyproject.toml allows: `python -m tests.oldest`."""

import re
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parent.parent / "pyproject.toml"


def oldest() -> list[str]:
    """A constraint for each library that a run needs; what only tests use stays as it is."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    asked = [*project["dependencies"]]
    asked += [each for name in ("gguf", "lora", "math", "report", "s3") for each in _extra(name)]
    found = {re.match(r"[\w-]+", each)[0]: re.search(r">=([\d.]+)", each)[1] for each in asked}  # type: ignore[index]
    return [f"{name}=={version}.*" for name, version in found.items()]


def _extra(name: str) -> list[str]:
    return tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"][name]


if __name__ == "__main__":
    print("\n".join(oldest()))
