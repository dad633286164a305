"""What the cache tells of single tokens, and how their text is read."""

from typing import Any

import numpy as np
import pytest

from opd_stream.store.tokenizer_folder import open_tokenizer
from opd_stream.tokens import FIGURES, TokenText, quoted, token_figures, visible
from tests.conftest import MODELS


def test_entropy_of_merged_outcomes_is_below_that_of_all() -> None:
    rng = np.random.default_rng(0)
    probabilities = np.sort(rng.dirichlet(np.ones(50), size=7))[:, ::-1]
    top, tail = np.log(probabilities[:, :4]), np.log(probabilities[:, 4:].sum(1))
    row: Any = type(
        "Row",
        (),
        {
            "teacher_logprobs": top[:, 0],
            "behavior_logprobs": top[:, 0],
            "completion_ids": np.zeros(7, np.int64),
            "teacher_top_ids": np.tile(np.arange(4), (7, 1)),
            "teacher_top_logprobs": top,
            "teacher_tail_logprobs": tail,
        },
    )
    whole = -(probabilities * np.log(probabilities)).sum(1)
    bound = token_figures(row, has_ranks=True)["entropy"]
    assert (bound < whole).all()
    assert (bound > 0).all()


def test_pieces_of_text_make_the_text() -> None:
    text = TokenText(open_tokenizer(MODELS / "ledger-student"))
    whole = "Ken has 42 cards.\nété 漢字 🙂 end"
    ids = open_tokenizer(MODELS / "ledger-student").encode(whole, add_special_tokens=False)
    pieces = text.pieces(ids)
    assert "".join(pieces) == whole
    assert "" in pieces, "some tokens are parts of a character"
    assert text.after(ids[0], ids[1]) == pieces[1]


def test_what_a_terminal_would_obey_is_spelled_out() -> None:
    assert visible("a\x1b[2J\u202eb\nc é 漢") == "a\\x1b[2J\\u202eb\nc é 漢"
    assert quoted("\n") == '"\\n"'


@pytest.mark.parametrize(
    ("value", "level"),
    [(0.0, 0), (0.09, 0), (0.1, 1), (1.9, 2), (10.0, 5), (float("inf"), 5), (-0.3, -1), (-50, -5)],
)
def test_a_level_is_that_of_the_absolute_value(value: float, level: int) -> None:
    assert FIGURES["reverse_kl"].level(value) == level
