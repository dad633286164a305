"""What the audit of the adaptive window can see: `make bench-windows-audit`.

Two runs, with a seed of no row of the comparison: one on full rollouts, one on a short window whose
rollouts are all continued as probes. At the start of some rounds the gradient of every full rollout
is taken segment by segment, for the sampled objective and for the bucket that trains. `one set`
compares prefix and whole on the same rows, as the audit does, over draws of some; `noise-free` uses
different rows only (the mean over all halves of "prefix of one, whole of the other"); `step` is the
cosine of the noisy gradient of 16 rows, cut at each window or whole, with the noise-free whole.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.methods import distil
from benchmarks.methods_rows import ROWS, TASKS
from opd_stream.batches import collate
from opd_stream.objectives import Bucket, SampledPg
from opd_stream.store.reader import ScoredRows, open_scores
from opd_stream.store.store import Store
from stages.audit import parameter_groups, segment_sketches
from stages.student_model import load_student

SEED = 42  # the comparison has 0 to 4
CANDIDATES = {"ledger": (32, 64, 96, 128), "routine": (32, 64, 128, 256, 512)}
OBJECTIVES = {"sampled": SampledPg(), "trained": Bucket(direction="reverse")}
DRAWS, STEP_ROWS, THRESHOLD, PROBED = 500, 16, 2**-0.5, (0, 2, 4, 6)

Array = NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=sorted(TASKS), default="routine")
    parser.add_argument("--window", type=int, default=128, help="of the second run")
    parser.add_argument("--rounds", type=int, nargs="+", default=PROBED, choices=PROBED)
    parser.add_argument("--folder", type=Path, help="of the runs; those that are there are used")
    arguments = parser.parse_args()
    (full,) = [row for row in ROWS[arguments.task] if row.name == "full"]
    length = TASKS[arguments.task].full_tokens
    held = (
        f"rollouts.window={{kind: adaptive, candidates: [{arguments.window}], layers: 1, "
        f"max_window_tokens: {length}, probe_rows: 1000, probe_share: 1.0, audit_steps: null, "
        "every_rounds: 2, objective: sampled}"
    )
    with tempfile.TemporaryDirectory() as temporary:
        for trained, settings in ((length, []), (arguments.window, [held])):
            folder = (arguments.folder or Path(temporary)) / str(trained)
            if not (folder / "rounds.json").exists():
                found = distil(arguments.task, full, SEED, settings, folder)
                (folder / "rounds.json").write_text(json.dumps(found))
            for number in arguments.rounds:
                for name, products in _products(folder, number, arguments.task).items():
                    where = {"trained window": trained, "round": number, "objective": name}
                    print(json.dumps({**where, **figures(products)}), flush=True)


def _products(folder: Path, number: int, task: str) -> dict[str, Array]:
    """Inner products of the gradients of rows and segments [R, S, R, S], for each objective."""
    start = Path(__file__).parent.parent / "configs" / "models" / f"{task}-student"
    policies = [record["folder"] for record in json.loads((folder / "rounds.json").read_text())]
    base = Path(policies[number - 1]) if number else start
    rows = _full_rollouts(folder / "store", number)
    student = load_student(base, lora=None, initial=base, gradient_checkpointing=False).eval()
    groups = parameter_groups(student, layers=1)
    found: dict[str, Array] = {}
    for name, objective in OBJECTIVES.items():
        sketches: list[torch.Tensor] = []
        for place in range(len(rows)):
            # Tokens count alike whatever the length of their row: training takes a token mean.
            batch = collate([rows[place]], window_tokens=2**31, tokens_of_step=1)
            parts = segment_sketches(
                student, batch, CANDIDATES[task], groups, objectives=(objective,)
            )
            sketches += [one for (one,) in parts]
        matrix = torch.stack(sketches).double()
        shape = (len(rows), len(sketches) // len(rows)) * 2
        found[name] = (matrix @ matrix.T).numpy().reshape(shape)
    return found


def _full_rollouts(place: Path, number: int) -> ScoredRows:
    """The scored rollouts of a round: its probes where it has some, else what it trained on."""
    store, found = Store(place), dict[bool, Path]()
    for folder in sorted((place / "scores").iterdir()):
        scores = store.by_fingerprint("scores", folder.name)
        recipe = store.by_fingerprint("rollouts", scores.recipe.inputs["rollouts"]).recipe
        if recipe.settings["selection"]["round"] == number:
            found["probe" in recipe.settings] = folder
    return open_scores(found.get(True) or found[False])


def figures(products: Array) -> dict[str, Any]:
    """Everything the page says, from inner products of segments [R, S, R, S]."""
    prefixes = products.cumsum(1).cumsum(3)  # of windows, the last of them all tokens
    rows = len(prefixes)
    between = _between(prefixes)
    without = (np.delete(np.delete(prefixes, row, 0), row, 2) for row in range(rows))
    left_out = np.stack([_correlations(_between(fewer))[:-1, -1] for fewer in without])
    alone = np.einsum("rsrs->s", prefixes) / rows  # of a row's gradient with itself
    noise = {n: float(alone[-1] - between[-1, -1]) / n for n in (2, 8, rows)}
    step = np.diag(between) + (alone - np.diag(between)) / STEP_ROWS
    return {
        "noise-free": _rounded(_correlations(between)[:-1, -1]),
        "standard error": _rounded(np.sqrt((rows - 1) * left_out.var(0))),
        "segments with the last one": _rounded(_correlations(_between(products))[:-1, -1]),
        "step": _rounded(between[:, -1] / np.sqrt(step * between[-1, -1])),
        "noise": {n: round(v / (v + float(between[-1, -1])), 3) for n, v in noise.items()},
        "one set": {n: _one_set(prefixes, n) for n in (2, 3, 8, 32, rows)},
    }


def _between(products: Array) -> Array:
    """Mean inner product of two different rows, for each pair of segments [S, S]."""
    rows = len(products)
    whole = products.sum((0, 2)) - np.einsum("rsrt->st", products)
    return (whole + whole.T) / 2 / (rows * (rows - 1))


def _correlations(between: Array) -> Array:
    """Cosines; not a number where noise has made a squared length negative."""
    squares = np.diag(between)
    length = np.sqrt(np.where(squares > 0, squares, np.nan))
    return between / np.outer(length, length)


def _one_set(prefixes: Array, count: int) -> dict[str, Any]:
    """Cosines of the same rows over draws of some of them, and what the threshold makes of them."""
    random, found = np.random.default_rng(count), list[Array]()
    for _ in range(DRAWS if count < len(prefixes) else 1):
        chosen = random.permutation(len(prefixes))[:count]
        found.append(_correlations(prefixes[chosen][:, :, chosen].sum((0, 2)))[:-1, -1])
    cosines = np.stack(found)
    places = np.where((cosines >= THRESHOLD).any(1), (cosines >= THRESHOLD).argmax(1), -1)
    places %= cosines.shape[1]  # none is admissible: the last, as in the audit
    shares = np.bincount(places, minlength=cosines.shape[1]) / len(places)
    return {"median": _rounded(np.median(cosines, 0)), "chosen": _rounded(shares)}


def _rounded(values: Array) -> list[float | None]:
    return [None if np.isnan(value) else round(float(value), 3) for value in values]


if __name__ == "__main__":
    main()
