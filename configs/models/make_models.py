"""Make a pair of tiny models from nothing: a careful teacher, a careless student.

    python configs/models/make_models.py --out configs/models --task ledger
    python configs/models/make_models.py --out configs/models --task routine
    python configs/models/make_models.py --out configs/models --task programs

All have the same Qwen3 architecture and 360 to 380 thousand parameters. A teacher sees only correct
solutions. A student sees as many, of other problems, and then a careless corpus (careless.py).

Seeds. Nothing that a number is reported on was trained or tuned on:
    0, 1, 2, ...            prompts of distillation runs
    1000, 1001, 1002        tokenizer, teacher and student (this script)
    4242                    evaluation while tuning
    900001, 900002, 900003  held out: for final reports only, never for a choice
"""

import argparse
import json
import multiprocessing
import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from model_training import Example, ExampleSource, train_phase
from pairs import PAIRS, Lesson, Pair
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from opd_stream.tasks.judges import Judge, embedded_judge
from opd_stream.tasks.ledger import LedgerProblem, make_problems, prompt_text

SUMMARY = "Make a pair of tiny models, or measure those that are there."
PAD, EOS, BOS = SPECIAL_TOKENS = ["<pad>", "<eos>", "<bos>"]
PAD_ID, EOS_ID, BOS_ID = range(3)
TOKENIZER_SEED, TEACHER_SEED, STUDENT_SEED, TUNING_SEED = 1000, 1001, 1002, 4242
NUM_SAMPLES = 8
PROBLEMS_PER_BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=SUMMARY)
    parser.add_argument("--out", type=Path, required=True, help="where the two folders are")
    parser.add_argument("--task", choices=sorted(PAIRS), required=True, help="what they learn")
    parser.add_argument("--evaluate-only", action="store_true", help="measure what is there")
    parser.add_argument("--problems", type=int, default=192, help="problems of the evaluation")
    parser.add_argument("--seed", type=int, default=TUNING_SEED, help="seed of the evaluation")
    arguments = parser.parse_args()
    started = time.perf_counter()
    # The two models have nothing to do with each other: one process, one core for each.
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(make_and_evaluate, role, arguments) for role in ("teacher", "student")]
        for job in jobs:
            print(job.result())
    print(f"{time.perf_counter() - started:.0f} s in all")


def make_and_evaluate(role: str, arguments: argparse.Namespace) -> str:
    """The work of one process; returns the figures of the files as they lie on the disk."""
    torch.set_num_threads(1)  # matrices this small lose more than they win on a second thread
    pair = PAIRS[arguments.task]
    folder = arguments.out / f"{arguments.task}-{role}"
    if not arguments.evaluate_only:
        tokenizer = make_tokenizer(pair)
        make_model = make_teacher if role == "teacher" else make_student
        save(make_model(pair, tokenizer), tokenizer, folder, pair.max_completion_tokens)
    problems = make_problems(count=arguments.problems, seed=arguments.seed, task=arguments.task)
    return evaluate(folder, problems, embedded_judge(arguments.task), seed=arguments.seed)


def make_tokenizer(pair: Pair) -> PreTrainedTokenizerFast:
    """Byte-level, so every text has ids; each digit is a token of its own."""
    rng = random.Random(f"tokenizer/{TOKENIZER_SEED}")
    texts = ["\n".join(pair.habit.draw(rng, pair.careful)) for _ in range(3000)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def make_teacher(pair: Pair, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Correct solutions only."""
    model = new_model(len(tokenizer), seed=TEACHER_SEED)
    learn(model, pair, tokenizer, stream=f"teacher/{TEACHER_SEED}", seed=TEACHER_SEED)
    return model


def make_student(pair: Pair, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Correct solutions until the skill is there, then careless ones until it is used less.

    A student that never learned the skill is no use here: distillation at this size corrects
    habits and does not grow circuits.
    """
    model = new_model(len(tokenizer), seed=STUDENT_SEED)
    learn(model, pair, tokenizer, stream=f"student/{STUDENT_SEED}/clean", seed=STUDENT_SEED)
    careless = example_source(
        tokenizer,
        random.Random(f"student/{STUDENT_SEED}/careless"),
        pair.habit,
        pair.careless,
    )
    train_phase(model, pair.habit.phase("student, careless", careless), seed=STUDENT_SEED)
    return model


def learn(
    model: Qwen3ForCausalLM,
    pair: Pair,
    tokenizer: PreTrainedTokenizerFast,
    *,
    stream: str,
    seed: int,
) -> None:
    """The clean lessons of a pair, in order."""
    rng = random.Random(stream)
    for lesson in pair.lessons:
        clean = example_source(tokenizer, rng, lesson, lambda _: pair.careful)
        train_phase(model, lesson.phase(f"{stream}, {lesson.title}", clean), seed=seed)


def new_model(vocab_size: int, *, seed: int) -> Qwen3ForCausalLM:
    """Three narrow layers with random weights."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        use_cache=True,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    return Qwen3ForCausalLM(config)


def example_source(
    tokenizer: PreTrainedTokenizerFast,
    rng: random.Random,
    lesson: Lesson,
    make_hand: Callable[[random.Random], Any],
) -> ExampleSource:
    """An endless stream of fresh problems with solutions by the given hand."""
    hand = make_hand(rng)

    def draw() -> Example:
        question, solution = lesson.draw(rng, hand)
        prompt_ids = tokenizer.encode(question + "\n")
        ids = [*tokenizer.encode(solution), EOS_ID]
        return [BOS_ID, *prompt_ids], ids, [True] * len(ids)

    return draw


def save(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    max_completion_tokens: int,
) -> None:
    """A normal Hugging Face folder: weights stored as float16, run as float32.

    Half the bytes in the repository, and no float16 arithmetic on a CPU.
    """
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_completion_tokens,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    model.half().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    change_json(folder / "config.json", dtype="float32")
    # The class name that every version of transformers knows.
    change_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def change_json(path: Path, **changes: str) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(values, indent=2) + "\n")


def evaluate(folder: Path, problems: list[LedgerProblem], judge: Judge, *, seed: int) -> str:
    """pass@1 and pass@8 at temperature 1, and the greedy pass rate, of the saved files."""
    started = time.perf_counter()
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    torch.manual_seed(seed)
    sampled = draw_verdicts(model, tokenizer, problems, judge, num_samples=NUM_SAMPLES)
    greedy = draw_verdicts(model, tokenizer, problems, judge, num_samples=None)
    pass_1 = sum(map(sum, sampled)) / (len(problems) * NUM_SAMPLES)
    pass_all = sum(map(any, sampled)) / len(problems)
    return (
        f"{folder.name}: {model.num_parameters()} parameters, {len(problems)} problems of seed "
        f"{seed}: pass@1 {pass_1:.3f}, pass@{NUM_SAMPLES} {pass_all:.3f}, "
        f"greedy {sum(map(sum, greedy)) / len(problems):.3f} "
        f"({time.perf_counter() - started:.0f} s)"
    )


@torch.inference_mode()
def draw_verdicts(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: list[LedgerProblem],
    judge: Judge,
    *,
    num_samples: int | None,
) -> list[list[bool]]:
    """One verdict per problem and sample; `num_samples=None` decodes once, greedily."""
    verdicts: list[list[bool]] = []
    for first in range(0, len(problems), PROBLEMS_PER_BATCH):
        batch = problems[first : first + PROBLEMS_PER_BATCH]
        prompts = [[BOS_ID, *tokenizer.encode(prompt_text(problem))] for problem in batch]
        width = max(map(len, prompts))
        input_ids = torch.tensor([[PAD_ID] * (width - len(ids)) + ids for ids in prompts])
        output_ids = model.generate(
            input_ids,
            attention_mask=(input_ids != PAD_ID).long(),
            do_sample=num_samples is not None,
            num_return_sequences=num_samples or 1,
        )
        texts = tokenizer.batch_decode(output_ids[:, width:], skip_special_tokens=True)
        per_problem = len(texts) // len(batch)
        for row, problem in enumerate(batch):
            own_texts = texts[row * per_problem : (row + 1) * per_problem]
            verdicts.append(judge.verdicts([(text, problem.answer) for text in own_texts]))
    return verdicts


if __name__ == "__main__":
    main()
