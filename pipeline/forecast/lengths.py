"""How long rows will be: prompts counted, completions measured or taken to fill their window.

A measured round gives three facts about completions c under a window W: their mean, the mean of
their squares (from the attended pairs) and the share u that the window cut. For another window w
follow bounds that hold for the same policy, whatever the distribution of lengths:

    w <= W    mean min(c, w) <= min(w, mean)
    w >  W    mean min(c, w) <= mean + u (w - W)
"""

from collections.abc import Mapping
from dataclasses import dataclass

from opd_stream.costs import TokenCounts


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLengths:
    """Example:
    >>> PromptLengths(mean=60.3, mean_square=3_650.1, longest=71)
    """

    mean: float  # tokens
    mean_square: float
    longest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Completions that were sampled under a window.

    Example:
        >>> measured_of(64, summed_counts(rollouts.commits().values()))
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


def measured_of(window_tokens: int, counts: Mapping[str, float]) -> Measured | None:
    """The lengths behind the counts of commit records; None where they hold no rows."""
    rows, tokens = counts.get("rows", 0.0), counts.get("tokens", 0.0)
    if not rows or not tokens:
        return None
    completion = counts["completion_tokens"]
    return Measured(
        window_tokens=window_tokens,
        completion_mean=completion / rows,
        prompt_mean=(tokens - completion) / rows,
        row_square_mean=(2 * counts["pairs"] - tokens) / rows,
        cut_share=counts.get("length_rows", 0.0) / rows,
    )


def expected_counts(
    rows: float, window_tokens: int, prompts: PromptLengths, measured: Measured | None
) -> TokenCounts:
    """Counts of rows under a window; without a measurement, of rows that all fill it."""
    mean, square = float(window_tokens), float(window_tokens) ** 2
    if measured is not None:
        mean = measured.mean(window_tokens)
        square = measured.mean_square(window_tokens, prompts)
    tokens = prompts.mean + mean
    squares = prompts.mean_square + 2 * prompts.mean * mean + square
    return TokenCounts(
        tokens=rows * tokens,
        completion_tokens=rows * mean,
        pairs=rows * (squares + tokens) / 2,
    )
