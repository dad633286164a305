"""How often the 95 % interval of pass@1 holds the truth: `make bench-intervals`.

Problems are drawn whose chances of a right answer are known, so the truth is, too; the table of
docs/evaluation.md.
"""

import numpy as np

from opd_stream.tasks.pass_at_k import Bootstrap, Counts, estimates

A, B = 0.5, 0.8  # of the Beta distribution of chances: many problems are hopeless or sure
SETS, SAMPLES, RESAMPLES = 5_000, 8, 1_000


def coverage(problems: int) -> float:
    """Share of the simulated sets of problems whose interval holds the mean chance."""
    random, held = np.random.default_rng(problems), 0
    for seed in range(SETS):
        right = random.binomial(SAMPLES, random.beta(A, B, size=problems))
        counts = Counts(correct={str(n): int(c) for n, c in enumerate(right)}, samples=SAMPLES)
        bootstrap = Bootstrap(confidence=0.95, resamples=RESAMPLES, seed=seed)
        _, (low, high) = estimates([counts], (1,), bootstrap)["pass@1"]
        held += low <= A / (A + B) <= high
    return held / SETS


if __name__ == "__main__":
    for size in (30, 50, 100, 200):
        print(f"{size} problems: {100 * coverage(size):.1f} %", flush=True)
