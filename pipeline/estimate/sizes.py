"""Tokens of rows and bytes of files: from what was measured, else upper bounds.

A measured round gives three facts about completions c under a window W: their mean, the mean of
their squares (from the attended pairs) and the share u that the window cut. For another window w
follow bounds that hold for the same policy, whatever the distribution of lengths:

    w <= W    mean min(c, w) <= min(w, mean)
    w >  W    mean min(c, w) <= mean + u (w - W)

A shard that nothing like it was measured for is taken as large as its columns before zstd
(docs/cache-format.md has them); a policy follows from the shapes of the student's weights.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import log2, prod
from pathlib import Path

from opd_stream.config import Config
from opd_stream.config.sections import Train
from opd_stream.costs import TokenCounts, adapter_weights
from opd_stream.store.artifact import Commit, summed_counts
from opd_stream.store.codecs import CompactCodec, ExactCodec, HiddenCodec, SampledCodec
from opd_stream.store.shards import ROWS_PER_PART
from stages.checkpoints import published_dtype, weight_shapes

UNIT_BYTES = 8_192  # schema and footer of a shard
PART_BYTES = 4_096  # head of a record batch
ROW_BYTES = 192  # names and offsets of a row
RECORD_BYTES = 4_096  # commit record of a unit
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FLOAT32 = BYTES["float32"]
STATE_KL = 0.0005  # bound at which a channel of a hidden state takes at most a byte


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLengths:
    """Example:
    >>> PromptLengths(mean=60.3, mean_square=3_650.1)
    """

    mean: float  # tokens
    mean_square: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Completions:
    """Completions that were sampled under a window, measured.

    Example:
        >>> completions_of(64, summed_counts(rollouts.commits().values()))
    """

    window_tokens: int
    completion_mean: float
    prompt_mean: float
    row_square_mean: float  # of the tokens of prompt and completion
    cut_share: float  # that the window ended

    def mean(self, window: int) -> float:
        """Completion tokens under another window, at most."""
        if window <= self.window_tokens:
            return min(float(window), self.completion_mean)
        more = self.cut_share * (window - self.window_tokens)
        return min(float(window), self.completion_mean + more)

    def mean_square(self, window: int, prompts: PromptLengths) -> float:
        """Of the completion tokens: spread as they were measured, within what is possible."""
        crossed = 2 * self.prompt_mean * self.completion_mean
        measured = self.row_square_mean - prompts.mean_square - crossed
        mean = self.mean(window)
        spread = measured / max(self.completion_mean, 1e-9) ** 2
        return min(max(spread, 1.0) * mean**2, window * mean)


def completions_of(window_tokens: int, counts: Mapping[str, float]) -> Completions | None:
    """The lengths behind the counts of commit records; None where they hold no rows."""
    rows, tokens = counts.get("rows", 0.0), counts.get("tokens", 0.0)
    if not rows or not tokens:
        return None
    completion = counts["completion_tokens"]
    return Completions(
        window_tokens=window_tokens,
        completion_mean=completion / rows,
        prompt_mean=(tokens - completion) / rows,
        row_square_mean=(2 * counts["pairs"] - tokens) / rows,
        cut_share=counts.get("length_rows", 0.0) / rows,
    )


def expected_counts(
    rows: float, window_tokens: int, prompts: PromptLengths, measured: Completions | None
) -> TokenCounts:
    """Counts of rows under a window; without a measurement, of rows that all fill it."""
    mean, square = float(window_tokens), float(window_tokens) ** 2
    if measured is not None:
        mean = measured.mean(window_tokens)
        square = measured.mean_square(window_tokens, prompts)
    tokens = prompts.mean + mean
    squares = prompts.mean_square + 2 * prompts.mean * mean + square
    return TokenCounts(
        tokens=rows * tokens, completion_tokens=rows * mean, pairs=rows * (squares + tokens) / 2
    )


def behind_other_prompts(
    counts: TokenCounts, rows: float, prompts: PromptLengths, others: PromptLengths
) -> TokenCounts:
    """Counts of the same completions behind other prompts, of which they do not depend.

    Args:
        counts: of the rows behind `prompts`.
        rows: that were counted.
        prompts: lengths of their prompts.
        others: lengths of the other prompts.
    """
    if not rows:
        return counts
    completion = counts.tokens / rows - prompts.mean
    tokens = rows * (others.mean - prompts.mean)
    squares = others.mean_square - prompts.mean_square
    squares += 2 * completion * (others.mean - prompts.mean)
    more = TokenCounts(tokens=tokens, completion_tokens=0, pairs=(rows * squares + tokens) / 2)
    return counts + more


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSizes:
    """Bytes of shards as a function of what is in them."""

    per_token: float  # of the prompt
    per_completion_token: float
    per_row: float = ROW_BYTES
    per_unit: float = UNIT_BYTES
    per_part: float = PART_BYTES

    def bytes(self, counts: TokenCounts, rows: float, units: float) -> float:
        """Of shards that hold these rows."""
        if not rows:
            return 0.0
        return (
            self.per_token * (counts.tokens - counts.completion_tokens)
            + self.per_completion_token * counts.completion_tokens
            + self.per_row * rows
            + self.per_unit * units
            + self.per_part * (rows / ROWS_PER_PART + units)
        )


def measured_sizes(commits: Collection[Commit]) -> ShardSizes | None:
    """As shards were measured, if any were; what grows belongs to their completion tokens."""
    tokens = summed_counts(commits).get("completion_tokens", 0.0)
    if not tokens:
        return None
    batches = sum(part.length for commit in commits for part in commit.parts[1:])
    whole = sum(commit.bytes for commit in commits)
    return ShardSizes(
        per_token=0.0,
        per_completion_token=batches / tokens,
        per_row=0.0,
        per_unit=(whole - batches) / len(commits),
        per_part=0.0,
    )


def rollouts_sizes(
    extra_draws: int = 0, *, student_top_k: int = 0, vocabulary: int = 1
) -> ShardSizes:
    """Before zstd: ids and log-probabilities of what is drawn, and the student's own ids."""
    own = student_top_k * _planes(vocabulary)
    return ShardSizes(per_token=4, per_completion_token=8 * (1 + extra_draws) + own)


def scores_sizes(config: Config, *, forced: int, vocabulary: int, width: int) -> ShardSizes:
    """Before zstd, every candidate stored; `width` is that of the teacher's hidden states."""
    top_k, id_bytes = config.scores.stored_candidates, _planes(vocabulary)
    top_k = min(top_k + config.rollouts.student_top_k, vocabulary)  # where no id is of both
    match config.scores.codec:
        case ExactCodec(dtype=dtype):
            size = {"float16": 2, "float32": 4}[dtype]
            each, unit = 4 + top_k * (4 + size) + 4 + forced * size, 0
        case CompactCodec():
            each = 2 + top_k * (id_bytes + 2) + 2 + 2 + 2 * forced
            unit = 2 * 4 * vocabulary  # its dictionary, in schema and footer
        case SampledCodec(draws=draws):
            each, unit = 4 + 2 + draws * (id_bytes + _planes(draws + 1)) + 2 * forced, 0
        case HiddenCodec(max_kl=max_kl):
            each = 8 + top_k * (id_bytes + 2) + 2 * forced + width * _state_bytes(max_kl)
            unit = 2 * 4 * vocabulary + width
    return ShardSizes(
        per_token=0,
        per_completion_token=each + 4 * config.rollouts.extra_draws,
        per_unit=UNIT_BYTES + unit,
    )


def hidden_sizes(width: int, *, is_narrow: bool) -> ShardSizes:
    """Of hidden states, which hardly compress; `is_narrow`: of a 16-bit engine."""
    return ShardSizes(per_token=0, per_completion_token=width * (2 if is_narrow else FLOAT32) + 4)


def distance_sizes() -> ShardSizes:
    """Of four figures a token."""
    return ShardSizes(per_token=0, per_completion_token=4 * FLOAT32)


def _state_bytes(max_kl: float | None) -> float:
    """Of a channel: float32, or a byte at the default bound; half a bit for each halving of it."""
    return FLOAT32 if max_kl is None else max(0.25, 1 + log2(STATE_KL / max_kl) / 16)


def _planes(values: int) -> int:
    """Bytes of a number below `values`."""
    return max(1, -(-(values - 1).bit_length() // 8))


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySizes:
    """Bytes of what training writes."""

    policy: int  # a published policy: weights, adapter, tokenizer
    state: int  # beside it, for the round after: optimizer, exact weights
    checkpoint: int  # in the middle of a round: weights in training, optimizer


def policy_sizes(folder: Path, train: Train) -> PolicySizes:
    """From the shapes of the student's weights; training keeps float32 and two moments of AdamW."""
    shapes, lora = weight_shapes(folder), train.lora
    weights = sum(prod(shape) for shape in shapes.values())
    trained = weights if lora is None else adapter_weights(shapes, lora)
    width = BYTES[published_dtype(folder)]
    others = [
        path.stat().st_size
        for path in folder.iterdir()
        if path.is_file() and path.suffix not in (".safetensors", ".bin", ".pt", ".pth")
    ]
    adapter = 0 if lora is None else trained * FLOAT32
    exact = weights * FLOAT32 if lora is None and width < FLOAT32 else 0
    base = 0 if train.extrapolation is None else trained * FLOAT32
    each = {"adamw": 2 * FLOAT32, "adamw-8bit": 2, "adafactor": 0}[train.optimizer]
    moments = trained * each
    return PolicySizes(
        policy=weights * width + adapter + sum(others),
        state=moments + exact + base,
        checkpoint=trained * FLOAT32 + moments + base,
    )
