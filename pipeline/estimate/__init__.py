"""What a run would do, before it costs anything: tokens, bytes, operations, disk, memory.

    estimate(config, RunFolder(Path("runs/mine"))).as_json()

Nothing is written and no model is loaded. What the store has is measured; what is left follows from
the completions that were measured so far, or, where there are none, from full windows.
"""

from pipeline.estimate.run import estimate

__all__ = ["estimate"]
