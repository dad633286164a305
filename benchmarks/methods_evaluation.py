"""pass@k of a policy folder on problems of an embedded task."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from opd_stream.engines import open_engine
from opd_stream.engines.base import SamplingSettings
from opd_stream.tasks import ledger
from opd_stream.tasks.judges import embedded_judge
from opd_stream.tasks.pass_at_k import pass_at_k, standard_error
from opd_stream.types import PromptBatch


def evaluate(
    folder: Path, task: ledger.Task, *, problems: int, samples: int, seed: int, window_tokens: int
) -> dict[str, Any]:
    """Sampled at temperature 1, judged by the task's judge."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    chosen = ledger.make_problems(count=problems, seed=seed, task=task)
    engine = open_engine(engine="transformers", folder=folder, dtype="float32", batch_rows=128)
    rollouts = engine.sample(
        PromptBatch(
            prompt_id=tuple(problem.problem_id for problem in chosen),
            prompt_ids=tuple(
                np.array([tokenizer.bos_token_id, *tokenizer.encode(ledger.prompt_text(problem))])
                for problem in chosen
            ),
        ),
        SamplingSettings(
            window_tokens=window_tokens, stop_ids=(tokenizer.eos_token_id,), seed=seed
        ),
        samples_per_prompt=samples,
    )
    texts = tokenizer.batch_decode(
        [ids.tolist() for ids in rollouts.completion_ids], skip_special_tokens=True
    )
    answers = {problem.problem_id: problem.answer for problem in chosen}
    right = dict.fromkeys(answers, 0)
    pairs = [(text, answers[name]) for name, text in zip(rollouts.prompt_id, texts, strict=True)]
    for name, is_right in zip(
        rollouts.prompt_id, embedded_judge(task).verdicts(pairs), strict=True
    ):
        right[name] += is_right
    counts = list(right.values())
    return {
        "pass@1": pass_at_k(counts, samples=samples, k=1),
        **({"pass@8": pass_at_k(counts, samples=samples, k=8)} if samples >= 8 else {}),
        "standard_error": standard_error(counts, samples=samples),
        "problems": problems,
        "samples": samples,
        "mean_tokens": rollouts.completion_tokens / len(rollouts),
        **({"right_by_week": right_by_week(texts)} if task == "routine" else {}),
    }


def right_by_week(texts: list[str]) -> list[float]:
    """Share of lines that go on from the total before them and calculate rightly, week by week.

    A line counts by itself, whatever went wrong earlier in the solution.
    """
    right: list[list[bool]] = [[] for _ in range(max(ledger.WEEKS))]
    for text in texts:
        week, total = -1, None
        for line in text.split("\n"):
            if line.startswith("Week "):
                week = min(week + 1, len(right) - 1)
            found = _LINE.search(line)
            if found is None or week < 0:
                start = _START.search(line)
                total = start.group(1) if start else total
                continue
            before, sign, amount, after = found.groups()
            expected = int(before) + (1 if sign == "+" else -1) * int(amount)
            right[week].append(before == total and int(after) == expected)
            total = after
    return [round(sum(lines) / len(lines), 4) for lines in right if lines]


_LINE = re.compile(r": (\d\d)([+-])(\d\d),.*,so (\d\d)\.")
_START = re.compile(r"starts with (\d\d)\.")
