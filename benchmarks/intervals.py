"""How often 95 % intervals of pass@1 hold the truth: `make bench-intervals`.

Problems are drawn whose chances of a right answer are known, so the truth is, too: of one policy,
and of the paired difference to one whose every chance is raised to the power 0.6.
docs/evaluation.md names the range.
"""

import numpy as np

from opd_stream.tasks.pass_at_k import Counts, differences, estimates

KINDS = {"hard": (0.3, 3.0), "mixed": (0.5, 0.8), "easy": (3.0, 0.3)}  # Beta, of the chances
PROBLEMS, SAMPLES, SETS = (15, 30, 100), (1, 4, 8), 5_000


def coverage(kind: tuple[float, float], problems: int, samples: int) -> tuple[float, float]:
    """Share of simulated sets of problems whose interval holds the truth, and the paired one."""
    random = np.random.default_rng([problems, samples])
    chances = random.beta(*kind, size=10**6)
    truth, gain = kind[0] / sum(kind), float((chances**0.6 - chances).mean())
    held = paired = 0
    for _ in range(SETS):
        before_P = random.beta(*kind, size=problems)
        sides = [
            Counts(
                correct={str(n): int(c) for n, c in enumerate(random.binomial(samples, chance_P))},
                samples=samples,
            )
            for chance_P in (before_P, before_P**0.6)
        ]
        _, (low, high) = estimates(sides[:1], (1,))["pass@1"]
        held += low <= truth <= high
        low, high = differences(sides[:1], sides[1:], (1,))["pass@1"].interval
        paired += low <= gain <= high
    return held / SETS, paired / SETS


def main() -> None:
    print("| problems | samples of each | " + " | ".join(KINDS) + " |")
    print("|---|---|" + "---|" * len(KINDS))
    for problems in PROBLEMS:
        for samples in SAMPLES:
            found = [coverage(kind, problems, samples) for kind in KINDS.values()]
            cells = " | ".join(f"{100 * one:.1f}, {100 * two:.1f}" for one, two in found)
            print(f"| {problems} | {samples} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
