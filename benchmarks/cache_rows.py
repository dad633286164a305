"""Rows for the codec benchmark: two real teachers and one synthetic family, as engine batches."""

from pathlib import Path

import numpy as np

from opd_stream.engines import open_engine
from opd_stream.engines.base import SamplingSettings, ScoringSettings
from opd_stream.tasks.ledger import make_problems, prompt_text
from opd_stream.types import PromptBatch, RolloutBatch, ScoreBatch

MODELS = Path(__file__).parent.parent / "configs" / "models"
SYNTHETIC_VOCABULARY = 151_936
DRAWN_RANKS = 300  # of the synthetic distribution; the ranks after them are smooth


def ledger_rows(*, rows: int, top_k: int) -> tuple[RolloutBatch, ScoreBatch, int]:
    """Rollouts of the shipped student and the shipped teacher's scores (V = 606)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODELS / "ledger-student")
    texts = [prompt_text(problem) + "\n" for problem in make_problems(count=rows, seed=4242)]
    prompts = [[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]] for text in texts]
    return _real(MODELS / "ledger-student", MODELS / "ledger-teacher", prompts, 208, top_k, (1,))


def text_rows(folder: Path, *, rows: int, top_k: int) -> tuple[RolloutBatch, ScoreBatch, int]:
    """Code written and scored by the model of `text_teacher.py` (V = 16,384)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    starts = ("def ", "class ", "import ", "    def test_", "# ", "if ", "for ", "return ")
    prompts = [[0, *tokenizer(starts[row % len(starts)])["input_ids"]] for row in range(rows)]
    return _real(folder, folder, prompts, 128, top_k, (0,))


def synthetic_rows(
    *, rows: int, tokens_per_row: int, top_k: int, seed: int = 0
) -> tuple[RolloutBatch, ScoreBatch, int]:
    """A documented family with V = 151,936.

    log q of rank r is -a log r plus Gumbel noise of scale 0.15, sorted and normalised over 4,000
    ranks. The exponent a is drawn per position: half normal(9, 1), three tenths
    normal(4, 0.7), a fifth normal(1.8, 0.35). That is near what is reported for reasoning rollouts
    (half of the tokens below 0.01 nats of entropy, a fifth above 0.67; 2506.01939), with heavier
    tails: a third lies below 0.01 nats. Ids are drawn without replacement
    from a Zipf law of exponent 1, and the id of a word is its frequency rank multiplied by
    log-normal noise, as in a byte-pair vocabulary; they are independent from position to position,
    which no text is, so this is the hard case for ids.
    """
    random = np.random.default_rng(seed)
    positions = rows * tokens_per_row
    kind = random.choice(3, positions, p=[0.5, 0.3, 0.2])
    center, spread = np.array([10, 4, 1.8])[kind], np.array([1, 0.7, 0.35])[kind]
    exponent = random.normal(center, spread).clip(np.array([6, 2.5, 1.1])[kind])[:, None]
    ranks = np.log(np.arange(1, 4001))
    drawn = -exponent * ranks[:DRAWN_RANKS]
    drawn = -np.sort(-(drawn + 0.15 * random.gumbel(size=drawn.shape)), axis=1)
    smooth = np.exp(-exponent * ranks[DRAWN_RANKS:]).sum(1)
    logprobs = drawn - np.log(np.exp(drawn).sum(1) + smooth)[:, None]
    ids = _zipf_ids(positions, top_k, random)
    top = logprobs[:, :top_k].astype(np.float32)
    tail = np.log(np.maximum(1 - np.exp(logprobs[:, :top_k]).sum(1), 1e-12)).astype(np.float32)
    choice = (random.random(positions)[:, None] > np.exp(logprobs[:, :top_k]).cumsum(1)).sum(1)
    choice = choice.clip(max=top_k - 1)
    sampled, sampled_logprobs = (
        np.take_along_axis(values, choice[:, None], 1)[:, 0] for values in (ids, top)
    )

    def split(values: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(np.split(values, rows))

    prompt = random.integers(0, 5000, 48).astype(np.int32)
    rollouts = RolloutBatch(
        prompt_id=tuple(f"synthetic-{row}" for row in range(rows)),
        sample_index=np.zeros(rows, np.int32),
        prompt_ids=(prompt,) * rows,
        completion_ids=split(sampled),
        behavior_logprobs=split(
            sampled_logprobs + 0.1 * random.normal(size=positions).astype(np.float32)
        ),
        finish_reason=("length",) * rows,
    )
    scores = ScoreBatch(
        teacher_logprobs=split(sampled_logprobs),
        teacher_top_ids=split(ids),
        teacher_top_logprobs=split(top),
        teacher_tail_logprobs=split(tail),
        teacher_forced_logprobs=split(np.full((positions, 1), -12.0, np.float32)),
        refused={},
    )
    return rollouts, scores, SYNTHETIC_VOCABULARY


def _real(
    student: Path,
    teacher: Path,
    prompts: list[list[int]],
    window: int,
    top_k: int,
    stop_ids: tuple[int, ...],
) -> tuple[RolloutBatch, ScoreBatch, int]:
    batch = PromptBatch(
        prompt_id=tuple(f"p{number}" for number in range(len(prompts))),
        prompt_ids=tuple(np.array(ids, np.int32) for ids in prompts),
    )
    engine = open_engine(engine="transformers", folder=student, dtype="float32", batch_rows=64)
    rollouts = engine.sample(batch, SamplingSettings(window_tokens=window, stop_ids=stop_ids))
    engine.load(teacher)
    scores = engine.score(rollouts, ScoringSettings(top_k=top_k, forced_ids=stop_ids))
    from transformers import AutoConfig

    return rollouts, scores, AutoConfig.from_pretrained(teacher).vocab_size


def _zipf_ids(positions: int, top_k: int, random: np.random.Generator) -> np.ndarray:
    """Distinct ids per position [positions, top_k]: exponential races over a Zipf law."""
    weights = 1 / np.arange(1, SYNTHETIC_VOCABULARY + 1)
    cumulative = np.cumsum(weights) / weights.sum()
    noisy = np.arange(SYNTHETIC_VOCABULARY) * np.exp(random.normal(0, 1, SYNTHETIC_VOCABULARY))
    id_of_rank = np.argsort(noisy).astype(np.int32)
    ids = np.empty((positions, top_k), np.int32)
    for position in range(positions):
        kept: dict[int, None] = {}
        while len(kept) < top_k:
            drawn = np.searchsorted(cumulative, random.random(2 * top_k))
            kept.update(dict.fromkeys(drawn.tolist()))
        ids[position] = list(kept)[:top_k]
    return id_of_rank[ids]
