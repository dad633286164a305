"""Ids that a model, its tokenizer or the other model does not have; and what config files say."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from opd_stream.engines.base import SamplingSettings
from opd_stream.engines.decoding import draw
from opd_stream.engines.vllm_scores import scores_of_asked, scores_of_whole
from opd_stream.errors import UserError
from opd_stream.logprobs import head_scores
from opd_stream.model_config import read_model_config
from opd_stream.store.shards import PROMPTS, id_lists
from opd_stream.store.store import Store
from pipeline.estimate.reading import read_inputs
from pipeline.setup import check_prompt_ids, stop_token_ids
from stages.checkpoints import Vocabulary, open_checkpoint, shared_vocabulary
from stages.recipes import evaluation_rollouts_recipe
from tests.conftest import small_config

LLAMA = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": [3, 5],
}


def written(folder: Path, config: Any, generation: Any = None) -> Path:
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def drawn(settings: SamplingSettings, draws: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [1, V], and how often each id is drawn."""
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(0))
    numbers = (torch.arange(draws, dtype=torch.float64) + 0.5)[None] / draws
    ids, logprobs = draw(logits, numbers, settings)
    raw = logits.log_softmax(1)[0][ids[0]]
    assert torch.allclose(logprobs[0], raw)  # of all logits, whatever is left out
    return logits[0], torch.bincount(ids[0], minlength=20) / draws


@pytest.mark.parametrize(
    "settings", [{}, {"vocabulary": 7}, {"top_k": 4}, {"top_p": 0.6}, {"min_p": 0.3}]
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_draws_follow_what_is_kept(settings: dict[str, Any], temperature: float) -> None:
    logits, shares = drawn(
        SamplingSettings(window_tokens=1, stop_ids=(), temperature=temperature, **settings)
    )
    weights = (logits / temperature).softmax(0)
    order = weights.argsort(descending=True)
    kept = torch.ones(20, dtype=torch.bool)
    if "vocabulary" in settings:
        kept = torch.arange(20) < 7
    if "top_k" in settings:
        kept = torch.isin(torch.arange(20), order[:4])
    if "top_p" in settings:
        needed = int((weights[order].cumsum(0) < 0.6).sum()) + 1
        kept = torch.isin(torch.arange(20), order[:needed])
    if "min_p" in settings:
        kept = weights >= 0.3 * weights.max()
    expected = weights * kept / (weights * kept).sum()
    assert torch.allclose(shares.float(), expected, atol=1e-3)


def test_greedy_draws_stay_below_the_vocabulary() -> None:
    logits, shares = drawn(
        SamplingSettings(window_tokens=1, stop_ids=(), temperature=0, vocabulary=5)
    )
    assert shares[int(logits[:5].argmax())] == 1


@pytest.mark.parametrize("chunk_rows", [2, 64])
def test_candidates_stay_below_the_vocabulary_and_the_tail_holds_the_rest(chunk_rows: int) -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(5, 8), torch.nn.Linear(8, 40)
    scores = head_scores(
        hidden,
        head,
        asked_ids_NJ=torch.tensor([[1]] * 5),
        forced_ids_F=torch.tensor([2, 39]),
        top_k=6,
        chunk_rows=chunk_rows,
        vocabulary=30,
    )
    dense = head(hidden).detach().double().log_softmax(1)
    top, ids = dense[:, :30].topk(6, 1)
    assert torch.equal(scores.top_ids_NK, ids)
    assert torch.allclose(scores.top_NK.double(), top, atol=1e-5)
    assert torch.allclose(scores.tail_N.double(), (1 - top.exp().sum(1)).log(), atol=1e-5)
    assert torch.allclose(scores.forced_NF.double(), dense[:, [2, 39]], atol=1e-5)
    drawn = head_scores(
        hidden,
        head,
        asked_ids_NJ=torch.tensor([[1]] * 5),
        forced_ids_F=torch.tensor([2]),
        top_k=6,
        chunk_rows=chunk_rows,
        draws_ND=torch.rand(5, 64, dtype=torch.float64),
        vocabulary=30,
    )
    assert int(drawn.top_ids_NK.max()) < 30


def test_vllm_candidates_stay_below_the_vocabulary() -> None:
    dense = torch.randn(3, 30, generator=torch.Generator().manual_seed(1)).log_softmax(1).numpy()
    asked = np.zeros((3, 2), np.int32)
    whole = scores_of_whole(dense, asked, top_k=4, forced=1, limit=20)
    order = np.argsort(-dense, axis=1)[:, :20]

    class Flat:
        token_ids = np.concatenate([np.zeros((3, 1), int), order], axis=1).ravel()
        logprobs = np.take_along_axis(dense, token_ids.reshape(3, 21), axis=1).ravel()

    class Output:
        prompt_logprobs = Flat
        prompt_token_id_logprobs = np.take_along_axis(dense, asked, axis=1)

    some = scores_of_asked(Output, 3, top_k=4, forced=1, limit=20, vocabulary=30)
    assert whole.top_ids.max() < 20
    np.testing.assert_array_equal(some.top_ids, whole.top_ids)
    np.testing.assert_allclose(some.tail, whole.tail, atol=1e-5)
    with pytest.raises(UserError, match="engine vllm cannot leave so many out"):
        scores_of_asked(Output, 3, top_k=4, forced=1, limit=1, vocabulary=30)


def test_a_prompt_with_an_id_that_a_model_lacks_is_named() -> None:
    columns = [
        pa.array(["a", "b"]),
        id_lists([np.array([1, 2]), np.array([3, 9, 4])]),
        *[pa.array(["", ""])] * 2,
    ]
    table = pa.Table.from_arrays(columns, schema=PROMPTS)
    check_prompt_ids(table, Vocabulary(size=10, head=10, stop_ids=()))
    with pytest.raises(UserError, match=r"prompt 'b' holds id 9, and the models share ids below 9"):
        check_prompt_ids(table, Vocabulary(size=9, head=10, stop_ids=()))


def test_config_files_are_read(tmp_path: Path) -> None:
    found = read_model_config(written(tmp_path, LLAMA, {"eos_token_id": 7}))
    assert (found.vocabulary, found.context) == (50, 64)
    assert found.terminators == {
        "config.json": frozenset({3, 5}),
        "generation_config.json": frozenset({7}),
    }
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 16}
    assert read_model_config(written(tmp_path, {**LLAMA, "rope_parameters": rope})).context == 16


def test_a_wrapper_has_the_settings_of_its_language_model(tmp_path: Path) -> None:
    text = {**LLAMA, "model_type": "gemma3_text", "eos_token_id": 4}
    found = read_model_config(written(tmp_path, {"model_type": "gemma3", "text_config": text}))
    assert (found.vocabulary, found.context) == (50, 64)
    names = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 32}
    found = read_model_config(written(tmp_path, {**names, "vocab_size": 60}))
    assert (found.settings["hidden_size"], found.context) == (8, 32)


@pytest.mark.parametrize(
    ("config", "generation", "message"),
    [
        ("[1]", None, "holds a list; expected a JSON object"),
        ('{"model_type": ', None, "cannot be read"),
        ({**LLAMA, "eos_token_id": 50}, None, "ids from 0 to 49"),
        (LLAMA, {"eos_token_id": [10**12]}, "ids from 0 to 49"),
        (LLAMA, {"eos_token_id": -1}, "ids from 0 to 49"),
        (LLAMA, {"eos_token_id": "</s>"}, "names eos_token_id '</s>'"),
        ({"model_type": "no-such-model"}, None, "cannot be read by transformers"),
        ({**LLAMA, "vocab_size": None}, None, "config"),
    ],
)
def test_config_files_that_no_model_has_are_refused(
    tmp_path: Path, config: Any, generation: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        read_model_config(written(tmp_path, config, generation))
    assert "\n" not in str(refused.value)


def test_tokens_are_left_out_in_evaluation_only(tmp_path: Path) -> None:
    config = small_config(tmp_path, "evaluation.top_p=0.9", "evaluation.top_k=20")
    assert config.evaluation is not None
    student = open_checkpoint(Store(tmp_path / "store"), config.student.folder)
    recipe = evaluation_rollouts_recipe(
        config,
        config.evaluation,
        prompts="",
        student=student,
        vocabulary=shared_vocabulary([student]),
    )
    assert (recipe.settings["top_p"], recipe.settings["top_k"]) == (0.9, 20)
    assert "min_p" not in recipe.settings
    with pytest.raises(UserError, match=r"rollouts\.top_p is set, which leaves out tokens"):
        small_config(tmp_path, "rollouts.top_p=0.9")


def test_stop_tokens_end_rollouts_beside_the_terminators(tmp_path: Path) -> None:
    config = small_config(tmp_path, "rollouts.stop_tokens=['.']")
    student = open_checkpoint(Store(tmp_path / "store"), config.student.folder)
    found = stop_token_ids(config, student)
    assert student.tokenizer().convert_ids_to_tokens(found) == ["."]
    ids = shared_vocabulary([student], stops=found).stop_ids
    assert set(ids) == {*student.terminators(), *found}
    line_end = small_config(tmp_path, 'rollouts.stop_tokens=["\\n"]')  # as text
    spelled = small_config(tmp_path, "rollouts.stop_tokens=[Ċ]")  # as in the vocabulary
    assert stop_token_ids(line_end, student) == stop_token_ids(spelled, student)
    assert read_inputs(line_end).setup.vocabulary == read_inputs(spelled).setup.vocabulary
    with pytest.raises(UserError, match=r"rollouts\.stop_tokens names 'nothing'"):
        stop_token_ids(small_config(tmp_path, "rollouts.stop_tokens=[nothing]"), student)
