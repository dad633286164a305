"""One process of a training on several devices: `torchrun -m stages.train_worker JOB.json`."""

import json
import os
import sys
from pathlib import Path

from opd_stream.errors import UserError
from opd_stream.store.artifact import DamagedUnit
from stages.launch import MARK
from stages.train_job import TrainJob


class _Reports:
    """Progress as JSON lines, from the first process only."""

    def start(self, stage: str, total: int, done: int = 0) -> None:
        _tell({"start": stage, "total": total, "done": done})

    def advance(self, stage: str, count: int, tokens: int = 0, **facts: float) -> None:
        _tell({"advance": stage, "count": count, "tokens": tokens, **facts})

    def say(self, line: str) -> None:
        _tell({"say": line})

    def warn(self, line: str) -> None:
        _tell({"warn": line})


def main() -> int:
    """Train; exit code 2 after a mistake that the user can mend."""
    import torch.distributed as processes
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    from stages.learner import open_fabric
    from stages.train import train_here

    job = TrainJob.from_json(Path(sys.argv[1]).read_text())
    try:
        train_here(job, _Reports(), open_fabric(job, TorchElasticEnvironment()))
        if processes.is_initialized():
            processes.barrier()  # the first one writes the policy while the others wait
    except UserError as error:
        _tell({"error": str(error)}, always=True)
        return 2
    except DamagedUnit as damaged:
        artifact = damaged.artifact
        found = {"fingerprint": artifact.fingerprint, "reason": damaged.reason}
        _tell({"damaged": artifact.recipe.kind, "unit": damaged.unit, **found}, always=True)
        return 2
    return 0


def _tell(message: dict[str, object], *, always: bool = False) -> None:
    if always or os.environ.get("RANK", "0") == "0":
        print(MARK + json.dumps(message), flush=True)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # Threads of the process groups may abort an interpreter that takes itself down in good order.
    os._exit(code)
