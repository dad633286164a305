"""Every causal type that transformers knows, against plain transformers: `make test-architectures`.

A tiny random model of each type is written to a folder, opened as a run opens it, and compared with
`model(ids).logits` on each row alone, in float32: what sampling recorded, what scoring says (rows
whole, and after shared prompts), what training sees and the gradients that it gives. Each type runs
in a process of its own with a time limit, so that a crash ends one row of the table.
"""

import json
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

from opd_stream.engines.base import SamplingSettings, ScoringSettings
from opd_stream.engines.head import output_head, padded
from opd_stream.engines.reading import decoder_of, reading_of, rows_hidden
from opd_stream.engines.transformers_engine import TransformersEngine
from opd_stream.errors import UserError
from opd_stream.logprobs import completion_rows
from opd_stream.types import PromptBatch, RolloutBatch
from stages.student_model import StudentModel, load_student
from tests.tiny_models import VOCABULARY, build

LENGTHS = (9, 3, 14, 6)  # of the prompts
SAMPLES = 3
WINDOW = 16
STOPS = tuple(range(1, 8))
MOST_NATS = 5e-4  # what rounding does in float32, most of it in scans; an error does 0.1
LARGEST_GRADIENT_GAP = 1e-3  # relative to the largest entry of a gradient
TIMEOUT_SECONDS = 120
WORKERS = 2
PARTS = ("sampling", "scoring", "training")
State = Literal["works", "refused", "wrong", "traceback", "not built"]
ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "benchmarks/results/architectures.jsonl", ROOT / "docs/architectures.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of one type.

    Example:
        >>> Verdict(model_type="gpt2", state="works", gaps={"sampling": 1e-6}, reason="")
    """

    model_type: str
    state: State
    gaps: dict[str, float]  # part -> largest difference, nats
    reason: str  # one line; of what works, how it reads on
    version: str = transformers.__version__


def verdict_of(model_type: str) -> Verdict:
    """Build, compare, and say how it ended; no error leaves it."""
    gaps: dict[str, float] = {}
    how: list[str] = []

    def verdict(state: State, reason: str = "") -> Verdict:
        line = " ".join(reason.split())
        return Verdict(model_type=model_type, state=state, gaps=gaps, reason=line)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            model = build(model_type)
            model(torch.arange(3, 12)[None])
            model.save_pretrained(folder)
            reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        except Exception as error:  # whatever the library says of a type it cannot build
            return verdict("not built", f"{type(error).__name__}: {error}")
        try:
            how.append(compare(folder, reference, gaps))
        except UserError as error:
            return verdict("refused", str(error).replace(str(folder), "MODEL"))
        except Exception as error:  # a row of the table
            at = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(at.filename).name}:{at.lineno}"
            return verdict("traceback", f"{type(error).__name__} at {place}: {error}")
    wrong = [part for part, gap in gaps.items() if not gap <= MOST_NATS]
    return verdict("wrong" if wrong else "works", ", ".join(wrong or how))


def compare(folder: Path, reference: Any, gaps: dict[str, float]) -> str:
    """Fill in the largest differences of a checkpoint from what the library reads, part by part.

    Returns:
        How it reads on.

    Raises:
        UserError: it is refused.
    """
    engine = TransformersEngine(folder, dtype="float32", batch_rows=len(LENGTHS) * SAMPLES)
    prompts = _prompts()
    settings = SamplingSettings(window_tokens=WINDOW, seed=5, stop_ids=STOPS)
    drawn = engine.sample(prompts, settings, samples_per_prompt=SAMPLES)
    greedy = engine.sample(prompts, replace(settings, temperature=0.0))
    gaps["sampling"] = max(_sampling_gap(reference, rows) for rows in (drawn, greedy))
    gaps["scoring"] = max(_scoring_gap(engine, reference, rows) for rows in (drawn, greedy))
    student = load_student(folder, lora=None, initial=folder, gradient_checkpointing=False)
    gaps["training"] = _training_gap(student, reference, drawn)
    return str(reading_of(decoder_of(reference)))


def _prompts() -> PromptBatch:
    numbers = np.random.default_rng(3)
    ids = tuple(numbers.integers(8, VOCABULARY, n).astype(np.int32) for n in LENGTHS)
    return PromptBatch(prompt_id=tuple(map(str, range(len(ids)))), prompt_ids=ids)


def _plain(reference: Any, prompt: Any, completion: Any) -> torch.Tensor:
    """Log-probabilities [T, V] of a completion's places, of the row alone."""
    ids = torch.tensor(np.concatenate([prompt, completion]).astype(np.int64))[None]
    logits = reference(input_ids=ids, use_cache=False).logits[0].float()
    return torch.log_softmax(logits[len(prompt) - 1 : -1], dim=1)


@torch.no_grad()
def _sampling_gap(reference: Any, rows: RolloutBatch) -> float:
    found = 0.0
    for prompt, ids, recorded in zip(
        rows.prompt_ids, rows.completion_ids, rows.behavior_logprobs, strict=True
    ):
        plain = _plain(reference, prompt, ids)[torch.arange(len(ids)), torch.tensor(ids).long()]
        found = max(found, _gap(plain, recorded))
    return found


@torch.no_grad()
def _scoring_gap(engine: TransformersEngine, reference: Any, rows: RolloutBatch) -> float:
    scores, found = engine.score(rows, ScoringSettings(top_k=8, forced_ids=(1, 2))), 0.0
    for row, (prompt, ids) in enumerate(zip(rows.prompt_ids, rows.completion_ids, strict=True)):
        plain = _plain(reference, prompt, ids)
        places = torch.arange(len(ids))
        top_ids = torch.tensor(scores.teacher_top_ids[row]).long()
        pairs = (
            (plain[places, torch.tensor(ids).long()], scores.teacher_logprobs[row]),
            (plain.gather(1, top_ids), scores.teacher_top_logprobs[row]),
            (plain[:, [1, 2]], scores.teacher_forced_logprobs[row]),
        )
        found = max(found, *(_gap(right, given) for right, given in pairs))
    return found


def _training_gap(student: StudentModel, reference: Any, rows: RolloutBatch) -> float:
    """Of log-probabilities, and infinite where the gradients are others."""
    texts = [
        np.concatenate(pair) for pair in zip(rows.prompt_ids, rows.completion_ids, strict=True)
    ]
    ids, mask = padded(texts, torch.device("cpu"), side="right")
    hidden = rows_hidden(decoder_of(student.model), ids, mask)
    places = completion_rows(
        torch.tensor([len(prompt) for prompt in rows.prompt_ids]),
        torch.tensor([len(completion) for completion in rows.completion_ids]),
        padded_length=ids.shape[1],
    )
    logits = output_head(student.model)(hidden.flatten(0, 1)[places])
    targets = torch.tensor(np.concatenate(rows.completion_ids)).long()
    chosen = torch.arange(len(targets))
    found = torch.log_softmax(logits, dim=1)[chosen, targets]
    pairs = zip(rows.prompt_ids, rows.completion_ids, strict=True)
    plain = torch.cat([_plain(reference, *pair) for pair in pairs])[chosen, targets]
    gap = _gap(plain.detach(), found.detach().numpy())
    found.sum().backward()
    plain.sum().backward()
    return gap if _gradients_agree(student.model, reference) else float("inf")


def _gradients_agree(model: Any, reference: Any) -> bool:
    right = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    given = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    scale = max(float(grad.abs().max()) for grad in right.values())
    return right.keys() == given.keys() and all(
        float((grad - given[name]).abs().max()) <= LARGEST_GRADIENT_GAP * scale
        for name, grad in right.items()
    )


def _gap(right: torch.Tensor, given: Any) -> float:
    return float((right - torch.as_tensor(given)).abs().max())


def verdicts(model_types: Sequence[str]) -> Iterator[Verdict]:
    """Of each type, in the order in which they end; two at a time."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(model_types), dict[Connection, tuple[str, Any]]()
    while waiting or running:
        while waiting and len(running) < WORKERS:
            name = waiting.pop(0)
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(name, there))
            process.start()
            there.close()
            running[here] = (name, process)
        ready = wait(list(running), timeout=TIMEOUT_SECONDS) or list(running)[:1]
        for pipe in ready:
            name, process = running.pop(pipe)  # type: ignore[index]
            yield _received(name, process, pipe)


def _work(name: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    with Path(os.devnull).open("w") as silence, redirect_stdout(silence), redirect_stderr(silence):
        pipe.send(verdict_of(name))


def _received(name: str, process: Any, pipe: Any) -> Verdict:
    try:
        if pipe.poll():
            return pipe.recv()
        reason = f"not done after {TIMEOUT_SECONDS} s"
    except EOFError:
        reason = "the process ended"
    finally:
        process.kill()
        process.join()
    return Verdict(model_type=name, state="traceback", gaps={}, reason=reason)


def causal_types() -> list[str]:
    """Names of all types that `AutoModelForCausalLM` reads."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


HEAD = """# Architectures

A tiny random model of every causal type of transformers {version}, against `model(ids).logits`
of each row alone in float32; `make test-architectures` makes this page. The numbers are the largest
differences of log-probabilities in nats: of what sampling recorded, of scores, of what training
sees (its gradients are compared, too). What would not be exact is refused when a model is loaded,
by `run` and by `doctor`.

Of {types} types {works} work, {refused} are refused, {wrong} are wrong, {traceback} end in a
traceback; {not_built} are not built tiny, or transformers itself does not load them.

A decoder that is *cached* reads a prompt once and then one token at a time. Where padding changes
what a row gives, rows of equal length are read together. Where single tokens after a cache are not
exact and several at once are, up to 8 of the latest are read again. Without a cache that goes on
exactly every step reads the whole text anew: right, and slow for long windows. How a decoder reads
on stands in no list but is found at load, on three short texts.
"""


def page(found: Sequence[Verdict]) -> str:
    """docs/architectures.md."""
    states = {state: [v for v in found if v.state == state] for state in get_args(State)}
    numbers = {state.replace(" ", "_"): len(some) for state, some in states.items()}
    lines = [HEAD.format(version=found[0].version, types=len(found), **numbers)]
    lines += ["| type | sampling | scoring | training | reads on |", "|---|---|---|---|---|"]
    for verdict in states["works"]:
        gaps = " | ".join(f"{verdict.gaps[part]:.0e}" for part in PARTS)
        lines.append(f"| {verdict.model_type} | {gaps} | {verdict.reason} |")
    for state, title in (
        ("refused", "Refused"),
        ("wrong", "Wrong"),
        ("traceback", "With a traceback"),
        ("not built", "Not built tiny, or not loaded by transformers itself"),
    ):
        if states[state]:
            lines += ["", f"## {title}", "", "| type | line |", "|---|---|"]
            lines += [f"| {v.model_type} | {v.reason[:250]} |" for v in states[state]]
    return "\n".join(lines) + "\n"


def stored() -> list[Verdict]:
    """The results behind the page."""
    return [Verdict(**json.loads(line)) for line in RESULTS.read_text().splitlines()]


def main() -> None:
    """Print a line a type, and store results and page; names of types: the others stay."""
    chosen = sys.argv[1:]
    found = {verdict.model_type: verdict for verdict in (stored() if chosen else ())}
    for verdict in verdicts(chosen or causal_types()):
        found[verdict.model_type] = verdict
        gaps = " ".join(f"{part} {gap:.1e}" for part, gap in verdict.gaps.items())
        print(f"{verdict.model_type}: {verdict.state} {gaps} {verdict.reason}"[:400], flush=True)
    in_order = [found[name] for name in sorted(found)]
    RESULTS.write_text("".join(json.dumps(asdict(verdict)) + "\n" for verdict in in_order))
    PAGE.write_text(page(in_order))
    print(dict(Counter(verdict.state for verdict in in_order)))


if __name__ == "__main__":
    main()
