"""Judges and pass@k."""

from itertools import combinations

import pytest

from opd_stream.tasks.judges import final_number, is_final_number, judge
from opd_stream.tasks.pass_at_k import pass_at_k, standard_error


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("so 9 * 2 = 18\n#### 18", "16 - 3 - 4 = 9\n#### 18", True),
        ("The answer is $1,234.00.", "#### 1234", True),
        ("#### -5", "-5", True),
        ("#### 18 eggs, not 19", "#### 18", True),
        ("3.5", "#### 3.50", True),
        ("#### 5", "#### -5", False),
        ("no number here", "#### 5", False),
        ("####", "#### 5", False),
        ("", "0", False),
    ],
)
def test_the_final_number_decides(completion: str, answer: str, right: bool) -> None:
    assert is_final_number(completion, answer) is right


def test_a_marked_number_counts_before_later_ones() -> None:
    assert final_number("12 and 13 #### 7 then 9") == 7
    assert final_number("12 and 13") == 13


def test_a_judge_has_a_name() -> None:
    assert judge("final_number") is is_final_number
    assert judge("ledger")("...\nAnswer: 07", "07")


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_share_of_k_subsets_with_a_right_sample(k: int) -> None:
    samples, correct = 5, [0, 1, 3, 5]
    shares = []
    for right in correct:
        subsets = list(combinations(range(samples), k))
        shares.append(sum(min(subset) < right for subset in subsets) / len(subsets))
    assert pass_at_k(correct, samples=samples, k=k) == pytest.approx(sum(shares) / len(shares))


def test_pass_at_more_than_there_are_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="pass@9 needs at least 9 samples"):
        pass_at_k([1], samples=8, k=9)


def test_the_standard_error_is_over_problems() -> None:
    assert standard_error([8, 8, 8], samples=8) == 0
    assert standard_error([0, 8], samples=8) == pytest.approx(0.5)
    assert standard_error([3], samples=8) == 0
