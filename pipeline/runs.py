"""The runs of a folder."""

from pathlib import Path

_SIGNS = ("run.json", "rounds", "metrics.jsonl", "lease.json")  # one of them beside config.json
_WORK = ("config.json", "metrics.jsonl", "summary.json")  # written while a run is worked on
_DEPTH = 2  # folders below the one that is asked about


def run_folders(root: Path) -> list[Path]:
    """Folders of runs, `root` itself and those below it, the one that was worked on last first."""
    places = [root.glob("/".join([*["*"] * depth, "config.json"])) for depth in range(_DEPTH + 1)]
    found = {path.parent for each in places for path in each}
    runs = [each for each in found if any((each / name).exists() for name in _SIGNS)]
    return sorted(runs, key=lambda run: (-worked_at(run), str(run)))


def worked_at(run: Path) -> float:
    """When a run was worked on last, in seconds since the epoch."""
    files = [run / name for name in _WORK]
    return max(path.stat().st_mtime for path in files if path.exists())
