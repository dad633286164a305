"""Make the pair that has a calculator: a teacher that asks it, a student that often does not.

    python configs/models/make_calculator.py --out configs/models

Both begin as a ledger model, which can read a problem, and learn conversations in which every sum
is asked for: the student writes "Monday receives: 42+38=" and ends its turn, the calculator says
"80". The student then learns to write half of the results itself, and to forget carries. Seeds as
in make_models.py.
"""

import argparse
import multiprocessing
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from careless import make_careless_step
from make_models import change_json, save
from model_training import Example, ExampleSource, Phase, train_phase
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3ForCausalLM

from opd_stream.rendering import ChatTemplate, Prompt, Renderer
from opd_stream.tasks.ledger import Ledger, draw_ledger, write_question
from opd_stream.trajectories import trajectory_of

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}<eos>"
    "{% else %}{% if m.role != 'tool' %}<bos>{% endif %}{{ m.content }}\n{% endif %}{% endfor %}"
)
TEACHER_SEED, STUDENT_SEED = 1001, 1002
MOST_TOKENS = 160
ASKS = 0.5  # share of its sums that the student asks for
FORGETS = 0.9  # of the carries of the others


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the two models that have a calculator.")
    parser.add_argument("--out", type=Path, required=True, help="folder of all models")
    out = parser.parse_args().out
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        for job in [pool.submit(make, role, out) for role in ("teacher", "student")]:
            print(job.result())


def make(role: str, out: Path) -> str:
    """The work of one process."""
    torch.set_num_threads(1)
    seed = TEACHER_SEED if role == "teacher" else STUDENT_SEED
    source, folder = out / f"ledger-{role}", out / f"calculator-{role}"
    model: Any = Qwen3ForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = TEMPLATE
    rng = random.Random(f"calculator/{role}/{seed}")
    clean = talks(tokenizer, rng, asks=1.0)
    phase = Phase(title=f"{role}, all", examples=clean, steps=500, muon_lr=0.01, adamw_lr=1.5e-3)
    train_phase(model, phase, seed=seed)
    if role == "student":
        own = talks(tokenizer, rng, asks=ASKS)
        phase = Phase(title="student, few", examples=own, steps=150, muon_lr=0.01, adamw_lr=1.5e-3)
        train_phase(model, phase, seed=seed)
    save(model, tokenizer, folder, MOST_TOKENS)
    change_json(folder / "tokenizer_config.json", chat_template=TEMPLATE)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    return f"{folder}: {model.num_parameters()} parameters"


def talks(tokenizer: PreTrainedTokenizerFast, rng: random.Random, *, asks: float) -> ExampleSource:
    """An endless stream of conversations in which a share of the sums is asked for."""
    renderer = Renderer(ChatTemplate(), tokenizer)

    def draw() -> Example:
        turns = talk(draw_ledger(rng), rng, asks=asks)
        prompt = Prompt(prompt_id="", text="", answer=None, turns=turns)
        found = trajectory_of(renderer, tokenizer, prompt)
        ids = found.completion_ids.tolist()
        return found.prompt_ids.tolist(), ids, found.loss_mask.tolist()

    return draw


def talk(ledger: Ledger, rng: random.Random, *, asks: float) -> tuple[dict[str, str], ...]:
    """A problem with its solution, in turns of a user, an assistant and a calculator."""
    turns = [{"role": "user", "content": write_question(ledger)}]
    careless = make_careless_step(rng, FORGETS)
    total, said = ledger.start, f"{ledger.name} starts with {ledger.start:02d}.\n"
    for entry in ledger.entries:
        sign = "+" if entry.is_gain else "-"
        said += f"{entry.day} {entry.verb}: {total:02d}{sign}{entry.amount:02d}="
        if rng.random() < asks:
            total += entry.change
            turns.append({"role": "assistant", "content": said})
            turns.append({"role": "tool", "content": f"{total:02d}"})
            said = ""
        else:
            total = careless(total, entry)[1]
            said += f"{total:02d}\n"
    return (*turns, {"role": "assistant", "content": f"{said}Answer: {total:02d}"})


if __name__ == "__main__":
    main()
