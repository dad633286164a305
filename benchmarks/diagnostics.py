"""Why methods do what they do: tables from caches, policies and rollouts that are there.

    python -m benchmarks.diagnostics geometry RUN            # what a run's updates look like
    python -m benchmarks.diagnostics decay --task ledger     # the teacher goes on from the student
    python -m benchmarks.diagnostics late --task ledger --row 'ESR 32' --row full

`decay` reads the public cache of the task (`python -m benchmarks.methods cache`). `late` does one
run of each row, with a seed of no row of the comparison, and measures both whole distributions on
full-length rollouts of the last policy.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import AutoTokenizer

from benchmarks.methods import cached_scores, chosen_rows, distil, public_cache
from benchmarks.methods_rows import HELD_OUT, TASKS
from opd_stream.engines import open_engine
from opd_stream.engines.base import SamplingSettings
from opd_stream.engines.transformers_engine import TransformersEngine
from opd_stream.errors import UserError
from opd_stream.store.reader import ScoredRow, open_scores
from opd_stream.tasks import ledger
from opd_stream.tasks.judges import embedded_judge
from opd_stream.types import PromptBatch
from pipeline.run_folder import RunFolder

MODELS = Path(__file__).parent.parent / "configs" / "models"
SEED = 42  # the comparison has 0 to 4
PARTS = 4  # of a full-length rollout
PARTS_OF_MODEL = ("attention", "mlp", "embeddings", "norms")
MODULES = {"embed": "embeddings", "lm_head": "embeddings", "attn": "attention", "mlp": "mlp"}

Array = NDArray[np.float64]
Weights = dict[str, torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("geometry").add_argument("run", type=Path, help="folder of a finished run")
    for name in ("decay", "late"):
        action = actions.add_parser(name)
        action.add_argument("--task", choices=sorted(TASKS), default="ledger")
        action.add_argument("--prompts", type=int, default=64)
        if name == "late":
            action.add_argument("--row", action="append", required=True)
            action.add_argument("--keep", type=Path, help="folder of the runs, for geometry")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        lines = {"geometry": geometry_table, "decay": decay_table, "late": late_table}
        for line in lines[arguments.action](arguments):
            print(line, flush=True)
    except UserError as error:
        print(f"diagnostics: {error}", file=sys.stderr)
        raise SystemExit(2) from None


# The geometry of updates.


def geometry_table(arguments: argparse.Namespace) -> Iterable[str]:
    """A row for what each round added, and one for the whole."""
    folder = RunFolder(arguments.run)
    start = Path(folder.config().student.path)
    policies = [Path(report.policy.folder) for report in folder.reports()]
    if not policies:
        raise UserError(f"{arguments.run} has no finished round; expected one; run it first")
    yield from geometry_lines([read_weights(place) for place in (start, *policies)])


def read_weights(folder: Path) -> Weights:
    """All weights of a checkpoint's folder.

    Raises:
        UserError: there are none, or of adapters alone.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UserError(
            f"{folder} has no model*.safetensors; expected whole weights; name a run of them"
        )
    return {name: w.float() for file in files for name, w in load_file(file).items()}


def geometry_lines(policies: Sequence[Weights]) -> list[str]:
    """The table of a run's updates, from its weights before the first round and after each."""
    steps = [difference(b, a) for a, b in pairwise(policies)]
    whole = difference(policies[-1], policies[0])
    so_far = [difference(policy, policies[0]) for policy in policies[1:]]
    lines = [
        "| update | norm / weights | effective rank | top 1 % of directions | of entries | "
        "attention, mlp, embeddings, norms | cosine with the whole | with the one before |",
        "|" + "---|" * 8,
    ]
    before: Weights | None = None
    for number, update in enumerate(steps):
        now = cosine(so_far[number], whole)
        last = "" if before is None else f"{cosine(update, before):.2f}"
        lines.append(_geometry_line(f"round {number}", update, policies[0], f"{now:.2f}", last))
        before = update
    return [*lines, _geometry_line("all rounds", whole, policies[0], "1.00", "")]


def difference(after: Weights, before: Weights) -> Weights:
    """The update of every weight that both have; a tied head is counted once."""
    return {name: after[name] - before[name] for name in after if name in before}


def cosine(one: Weights, other: Weights) -> float:
    """Of two updates, as one long vector each."""
    product = sum(float((one[name] * other[name]).sum()) for name in one)
    return product / (norm(one) * norm(other))


def norm(update: Weights) -> float:
    return sum(float(w.square().sum()) for w in update.values()) ** 0.5


def effective_rank(matrix: torch.Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli, 2007)."""
    values = torch.linalg.svdvals(matrix)
    shares = values[values > 0] / values.sum()
    return float((-(shares * shares.log()).sum()).exp())


def top_energy(values: torch.Tensor, share: float = 0.01) -> float:
    """Share of the squares in the largest 1 % of values, at least one of them."""
    squares = values.flatten().square().sort(descending=True).values
    return float(squares[: max(1, round(share * len(squares)))].sum() / squares.sum())


def _geometry_line(name: str, update: Weights, start: Weights, *cosines: str) -> str:
    matrices = {n: w for n, w in update.items() if w.ndim == 2 and module_of(n) != "embeddings"}
    moved = [w for w in matrices.values() if bool(w.any())]
    ranks = [effective_rank(w) for w in moved]
    full = [min(w.shape) for w in moved]
    directions = [top_energy(torch.linalg.svdvals(w)) for w in moved]
    entries = top_energy(torch.cat([w.flatten() for w in update.values()]))
    total = norm(update) ** 2
    shares: dict[str, float] = dict.fromkeys(PARTS_OF_MODEL, 0.0)
    for each, w in update.items():
        shares[module_of(each)] += float(w.square().sum()) / total
    return (
        f"| {name} | {norm(update) / norm(start):.4f} | "
        f"{np.mean(ranks):.1f} of {np.mean(full):.0f} | "
        f"{np.mean(directions):.2f} | {entries:.2f} | "
        + ", ".join(f"{value:.2f}" for value in shares.values())
        + f" | {' | '.join(cosines)} |"
    )


def module_of(name: str) -> str:
    """Which part of a decoder a weight belongs to."""
    return next(
        (part for key, part in MODULES.items() if key in name and "norm" not in name), "norms"
    )


# What a teacher makes of the student's prefixes.


def decay_table(arguments: argparse.Namespace) -> Iterable[str]:
    """Accuracy of the teacher behind prefixes of cached rollouts, by their length."""
    task, full = arguments.task, TASKS[arguments.task].full_tokens
    folder = public_cache(task)
    rows = open_scores(folder / cached_scores(folder))
    chosen = [rows[place] for place in range(min(arguments.prompts, len(rows)))]
    lengths = [0, *(full * part // 8 for part in range(1, 8)), full]
    yield "| tokens of the student's prefix | rollouts that have ended | right, in the end |"
    yield "|---|---|---|"
    for length in lengths:
        right, ended = continued(task, chosen, length)
        error = (right * (1 - right) / len(chosen)) ** 0.5
        yield f"| {length if length < full else 'all'} | {ended:.2f} | {right:.3f} ± {error:.3f} |"


def continued(task: str, rows: Sequence[ScoredRow], length: int) -> tuple[float, float]:
    """Share of right answers where the teacher goes on behind `length` tokens, and of ended rows.

    A rollout that has ended by then is the student's own.
    """
    teacher, full = MODELS / f"{task}-teacher", TASKS[task].full_tokens
    tokenizer = AutoTokenizer.from_pretrained(teacher, local_files_only=True)
    answers = _answers(task, [row.prompt_id for row in rows])
    texts = [row.completion_ids.tolist() for row in rows]
    is_open = [len(ids) > length for ids in texts]
    going = [row for row, goes_on in zip(rows, is_open, strict=True) if goes_on]
    if going and length < full:
        prefixes = [np.concatenate([r.prompt_ids, r.completion_ids[:length]]) for r in going]
        found = open_engine(
            engine="transformers", folder=teacher, dtype="float32", batch_rows=64
        ).sample(
            PromptBatch(
                prompt_id=tuple(f"{place}" for place in range(len(going))),
                prompt_ids=tuple(ids.astype(np.int64) for ids in prefixes),
            ),
            SamplingSettings(
                window_tokens=full - length, stop_ids=(tokenizer.eos_token_id,), seed=SEED
            ),
        )
        by_place = {
            int(name): ids for name, ids in zip(found.prompt_id, found.completion_ids, strict=True)
        }
        places = [place for place, goes_on in enumerate(is_open) if goes_on]
        for at, place in enumerate(places):
            texts[place] = [*texts[place][:length], *by_place[at].tolist()]
    said = tokenizer.batch_decode(texts, skip_special_tokens=True)
    right = embedded_judge(cast("ledger.Task", task)).verdicts(
        list(zip(said, answers, strict=True))
    )
    return sum(right) / len(right), 1 - sum(is_open) / len(is_open)


def _answers(task: str, names: Sequence[str]) -> list[str]:
    """The right answers of problems by their names, TASK-SEED-NUMBER."""
    places = [tuple(map(int, name.rsplit("-", 2)[1:])) for name in names]
    most = max(number for _, number in places) + 1
    known = {
        seed: ledger.make_problems(count=most, seed=seed, task=cast("ledger.Task", task))
        for seed in {seed for seed, _ in places}
    }
    return [known[seed][number].answer for seed, number in places]


# Divergence and entropy by place, on full-length rollouts.


def late_table(arguments: argparse.Namespace) -> Iterable[str]:
    """Both whole distributions on full-length rollouts of each row's last policy."""
    task, full = arguments.task, TASKS[arguments.task].full_tokens
    rows = chosen_rows(arguments.row, task, [])
    ends = [full * (part + 1) // PARTS for part in range(PARTS)]
    places = [f"{first} to {end}" for first, end in zip([0, *ends], ends, strict=False)]
    yield "| trained on | KL(student ‖ teacher) at " + " | ".join(places) + " | entropy there |"
    yield "|" + "---|" * (PARTS + 2)
    yield _late_line("nothing: before", task, MODELS / f"{task}-student", arguments.prompts, ends)
    for _, row in rows:
        with tempfile.TemporaryDirectory() as temporary:
            folder = (arguments.keep or Path(temporary)).resolve() / row.name.replace(" ", "-")
            last = distil(task, row, SEED, [], folder)[-1]["folder"]
            yield _late_line(row.name, task, Path(last), arguments.prompts, ends)


def _late_line(name: str, task: str, policy: Path, prompts: int, ends: Sequence[int]) -> str:
    kl, entropy = by_place(task, policy, prompts, ends)
    shown = " | ".join(f"{value:.4f}" for value in kl)
    return f"| {name} | {shown} | {', '.join(f'{value:.3f}' for value in entropy)} |"


@torch.inference_mode()
def by_place(
    task: str, policy: Path, prompts: int, ends: Sequence[int]
) -> tuple[list[float], list[float]]:
    """Mean KL(student ‖ teacher) and mean entropy of the student, nats, up to each end."""
    tokenizer = AutoTokenizer.from_pretrained(policy, local_files_only=True)
    problems = ledger.make_problems(
        count=prompts, seed=HELD_OUT + SEED, task=cast("ledger.Task", task)
    )
    student, teacher = (_engine(folder) for folder in (policy, MODELS / f"{task}-teacher"))
    batch = student.sample(
        PromptBatch(
            prompt_id=tuple(problem.problem_id for problem in problems),
            prompt_ids=tuple(
                np.array([tokenizer.bos_token_id, *tokenizer.encode(ledger.prompt_text(problem))])
                for problem in problems
            ),
        ),
        SamplingSettings(
            window_tokens=ends[-1], stop_ids=(tokenizer.eos_token_id,), seed=HELD_OUT + SEED
        ),
    )
    sums = np.zeros((len(ends), 3))
    for own, theirs in zip(student.hidden(batch).states, teacher.hidden(batch).states, strict=True):
        log_p, log_q = (
            side.head()(torch.from_numpy(states)).log_softmax(1)
            for side, states in ((student, own), (teacher, theirs))
        )
        kl = (log_p.exp() * (log_p - log_q)).sum(1).numpy()
        entropy = -(log_p.exp() * log_p).sum(1).numpy()
        which = np.searchsorted(ends, np.arange(len(kl)), side="right")
        np.add.at(sums, which, np.stack([kl, entropy, np.ones(len(kl))], 1))
    means = sums[:, :2] / np.maximum(sums[:, 2:], 1)
    return means[:, 0].tolist(), means[:, 1].tolist()


def _engine(folder: Path) -> TransformersEngine:
    found: Any = open_engine(engine="transformers", folder=folder, dtype="float32", batch_rows=64)
    assert isinstance(found, TransformersEngine)
    return found


if __name__ == "__main__":
    main()
