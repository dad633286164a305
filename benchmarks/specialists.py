"""Small models for what the embedded pairs cannot show: several teachers, and a teacher's view.

    python benchmarks/specialists.py --out models/specialists

Tasks: `ledger` (days), `routine` (the short form of one and two weeks) and `sums` (the calculation
alone). From `configs/models/ledger-teacher` one model learns all three, then forgets carries in all
three: `student`. Each specialist goes on from the student, on its own task with all carries and on
the two others without them, so that only the right teacher corrects a task. Beside the models:
`prompts.jsonl`, whose rows name their task, and `TASK.jsonl` to evaluate on (seed 900002; the
settings of `configs/teachers.yaml` were chosen on 900001).

`reader` goes on from `configs/models/ledger-student`: a ledger question alone it answers without
carries, as before, and behind a worked solution it writes that solution.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "configs" / "models"))

import torch  # noqa: E402
from careless import make_careless_step  # noqa: E402
from make_models import BOS_ID, EOS_ID, save  # noqa: E402
from model_training import Example, ExampleSource, Phase, train_phase  # noqa: E402
from transformers import AutoTokenizer, Qwen3ForCausalLM  # noqa: E402

from opd_stream.tasks import ledger  # noqa: E402
from opd_stream.tasks.ledger import StepWriter  # noqa: E402

TASKS = ("ledger", "routine", "sums")
FORGET_RATE = 0.9
SEED, PROBLEM_SEED = 1003, 900002
CLEAN_STEPS, HABIT_STEPS, SPECIALIST_STEPS, READER_STEPS = 700, 300, 500, 600
PROMPTS, PROBLEMS = 1536, 96  # of training, in all; to evaluate on, of a task
MAX_TOKENS = 304


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the specialists and their student.")
    parser.add_argument("--out", type=Path, required=True, help="where the folders and files go")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    write_problems(out)
    make("student", out)
    with ProcessPoolExecutor(2) as pool:
        for job in [pool.submit(make, name, out) for name in (*TASKS, "reader")]:
            job.result()


def write_problems(out: Path) -> None:
    """Training prompts of all tasks in one file; a file of each task to evaluate on."""
    rows = [problem(task, seed=0, index=i) for task in TASKS for i in range(PROMPTS // len(TASKS))]
    random.Random(0).shuffle(rows)
    files = {"prompts": rows}
    for task in TASKS:
        files[task] = [problem(task, seed=PROBLEM_SEED, index=index) for index in range(PROBLEMS)]
    for name, found in files.items():
        lines = (json.dumps(row) + "\n" for row in found)
        (out / f"{name}.jsonl").write_text("".join(lines))


def problem(task: str, *, seed: int, index: int) -> dict[str, str]:
    """One row of a prompts file."""
    rng = random.Random(f"specialists/{task}/{seed}/{index}")
    question, _, answer = draw(task, rng, ledger.write_step)
    return {"id": f"{task}-{seed}-{index}", "task": task, "prompt": question, "answer": answer}


def draw(task: str, rng: random.Random, hand: StepWriter) -> tuple[str, str, str]:
    """A question with the solution and the answer of a hand."""
    story = ledger.draw_routine(rng, rng.choice((1, 2))) if task == "routine" else None
    story = story or ledger.draw_ledger(rng)
    if task != "sums":
        return (ledger.write_question(story), *ledger.write_solution(story, hand))
    total, lines, asked = story.start, list[str](), [str(story.start)]
    for entry in story.entries:
        asked.append(f"{'+' if entry.is_gain else '-'} {entry.amount}")
        text, total = hand(total, entry)
        lines.append(f"{text},so {total:02d}.")
    answer = f"{total:02d}"
    return f"What is {' '.join(asked)}?", "\n".join([*lines, f"Answer: {answer}"]), answer


def make(name: str, out: Path) -> None:
    """The student, the specialist of a task, or the reader."""
    torch.set_num_threads(1)
    embedded = ROOT / "configs" / "models"
    starts = {"student": embedded / "ledger-teacher", "reader": embedded / "ledger-student"}
    source = starts.get(name, out / "student")
    model = Qwen3ForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source)
    rng = random.Random(f"{name}/{SEED}")
    careless = make_careless_step(rng, FORGET_RATE)

    def encoded(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    def learn(title: str, hand: Callable[[str], StepWriter], steps: int) -> None:
        def example() -> Example:
            question, solution, _ = draw(task := rng.choice(TASKS), rng, hand(task))
            return answered(f"{question}\n", solution)

        train(title, example, steps)

    def answered(prompt: str, solution: str) -> Example:
        ids = [*encoded(solution), EOS_ID]
        return [BOS_ID, *encoded(prompt)], ids, [True] * len(ids)

    def read() -> Example:
        is_shown = rng.random() < 0.5
        question, solution, _ = draw("ledger", rng, ledger.write_step if is_shown else careless)
        prompt = f"{solution}\n{question}\n" if is_shown else f"{question}\n"
        return answered(prompt, solution)

    def train(title: str, examples: ExampleSource, steps: int) -> None:
        phase = Phase(
            title=f"{name}, {title}", examples=examples, steps=steps, muon_lr=0.01, adamw_lr=1.5e-3
        )
        train_phase(model, phase, seed=SEED)

    if name == "student":
        learn("with carries", lambda task: ledger.write_step, CLEAN_STEPS)
        learn("without", lambda task: careless, HABIT_STEPS)
    elif name == "reader":
        train("behind a solution and without", read, READER_STEPS)
    else:
        own = "its own with carries"
        learn(own, lambda task: ledger.write_step if task == name else careless, SPECIALIST_STEPS)
    save(model, tokenizer, out / name, MAX_TOKENS)


if __name__ == "__main__":
    main()
