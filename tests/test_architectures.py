"""Some kinds of architectures against plain transformers; all of them are a slow test."""

from collections import Counter

import pytest

from opd_stream.engines.reading import decoder_of, layers_of, reading_of
from tests.architectures import PAGE, causal_types, page, stored, verdict_of, verdicts
from tests.tiny_models import build

EACH = "cached, rows of equal length together"
KINDS = {
    "qwen3_5": "cached",  # a wrapper, whose language model is a hybrid of two kinds of layers
    "mamba2": "cached",  # recurrent layers only
    "granite": "cached",  # logits divided
    "bloom": "cached",  # positions by ALiBi
    "mixtral": "cached",  # experts
    "trocr": EACH,  # positions are those of the columns
    "zamba2": "cached, the latest tokens read again",  # whose single steps are not its whole pass
    "rwkv": "no cache: slow",  # a state that cannot be continued in a batch
}


QUICK = ("qwen3_5", "bloom", "trocr", "zamba2")  # without a cache: a test below


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(kind, marks=[] if kind in QUICK else [pytest.mark.slow]) for kind in KINDS],
)
def test_a_kind_of_architecture_is_that_of_plain_transformers(model_type: str) -> None:
    verdict = verdict_of(model_type)
    assert (verdict.state, verdict.reason) == ("works", KINDS[model_type]), verdict
    assert set(verdict.gaps) == {"sampling", "scoring", "training"}


@pytest.mark.parametrize(
    ("model_type", "line"),
    [
        ("bert", "decoder and head apart gives log-probabilities"),
        ("cpmant", "CpmAntModel reads a row of a batch otherwise than alone"),
    ],
)
def test_what_would_be_wrong_is_refused_in_one_line(model_type: str, line: str) -> None:
    verdict = verdict_of(model_type)
    assert verdict.state == "refused"
    assert line in verdict.reason


def test_the_page_is_that_of_the_stored_results() -> None:
    found = stored()
    assert PAGE.read_text() == page(found)
    assert Counter(verdict.state for verdict in found)["works"] >= 120


@pytest.mark.slow
def test_no_architecture_is_wrong_or_ends_in_a_traceback() -> None:
    found = list(verdicts(causal_types()))
    assert not [verdict for verdict in found if verdict.state in ("wrong", "traceback")]
    assert sum(verdict.state == "works" for verdict in found) >= 120


def test_a_slow_way_is_told(caplog: pytest.LogCaptureFixture) -> None:
    assert reading_of(decoder_of(build("openai-gpt"))).cache == "none"
    assert "OpenAIGPTModel has no cache that goes on exactly" in caplog.text


@pytest.mark.parametrize(
    ("model_type", "shares"),
    [("llama", True), ("gpt2", True), ("mpt", False), ("gpt_neo", False), ("gemma3_text", False)],
)
def test_padding_behind_a_shared_beginning_is_left_out_where_columns_count(
    model_type: str, shares: bool
) -> None:
    reading = reading_of(decoder_of(build(model_type)))
    assert (reading.continues, reading.shares) == (True, shares)


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral", "mpt"])
def test_layers_are_found_by_any_name(model_type: str) -> None:
    model = build(model_type)
    assert len(layers_of(decoder_of(model))) == model.config.num_hidden_layers
