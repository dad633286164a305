"""The real pair of `make real-models` against plain transformers; skipped where it was not made."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opd_stream.config_file import load_config
from opd_stream.engines import open_engine
from opd_stream.engines.base import SamplingSettings, ScoringSettings
from opd_stream.engines.loading import load_model
from opd_stream.store.shards import prompts_batch, rollouts_batch
from opd_stream.store.store import Store
from pipeline.run import run as run_rounds
from pipeline.run_folder import RunFolder
from pipeline.setup import open_setup
from stages.step import Silent
from tests.page_blocks import blocks_of

ROOT = Path(__file__).parent.parent
REAL = ROOT / "models" / "real"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (REAL / "teacher").is_dir(), reason="models/real is missing: make real-models"
    ),
]
FEW = (
    *("prompts.limit=8", "rollouts.prompts_per_round=4", "rounds=1", "train.rows_per_step=4"),
    *("rollouts.window={kind: fixed, tokens: 12}", "evaluation=null"),
)


def config_of(folder: Path, *changes: str) -> Any:
    return load_config(
        ROOT / "configs" / "real.yaml", [f"store={folder / 'store'}", *FEW, *changes]
    )


def logprobs(folder: Path, ids: list[int]) -> torch.Tensor:
    """Of plain transformers, normalised in float64, nats [L, V]."""
    model = load_model(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(1)


def test_prompts_samples_and_scores_are_those_of_plain_transformers(tmp_path: Path) -> None:
    setup = open_setup(config_of(tmp_path))
    table = setup.prompts.read_unit(0)
    turns = [{"role": "user", "content": "What is the capital of Portugal?"}]
    tokenizer = setup.student.tokenizer()
    own = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert table["prompt_ids"][0].as_py() == own
    settings: dict[str, Any] = {"engine": "transformers", "dtype": "float32", "batch_rows": 8}
    student = open_engine(folder=REAL / "noisy", **settings)
    prompts = prompts_batch(table.slice(0, 3))
    stops = setup.vocabulary.stop_ids
    rollouts = student.sample(prompts, SamplingSettings(window_tokens=10, stop_ids=stops))
    teacher = open_engine(folder=REAL / "teacher", **settings)
    scores = teacher.score(rollouts, ScoringSettings(top_k=16, forced_ids=stops))
    for row in range(len(rollouts)):
        prompt, new = rollouts.prompt_ids[row].tolist(), rollouts.completion_ids[row].tolist()
        places = np.arange(len(new)) + len(prompt) - 1
        of_student, of_teacher = (
            logprobs(REAL / name, [*prompt, *new])[places] for name in ("noisy", "teacher")
        )
        drawn = torch.tensor(new)[:, None]
        for mine, right in (
            (rollouts.behavior_logprobs[row], of_student.gather(1, drawn)[:, 0]),
            (scores.teacher_logprobs[row], of_teacher.gather(1, drawn)[:, 0]),
            (scores.teacher_top_logprobs[row], of_teacher.topk(16, 1).values),
            (scores.teacher_tail_logprobs[row], of_teacher.sort(1).values[:, :-16].logsumexp(1)),
        ):
            np.testing.assert_allclose(mine, right.numpy(), atol=1e-4)


@pytest.mark.parametrize("student", ["noisy", "pruned26"])
def test_a_round_moves_a_student_towards_its_teacher(
    tmp_path: Path, student: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the rollouts that it trained on: the divergence from the teacher falls."""
    config = config_of(tmp_path, f"student.path={REAL / student}")
    summary = run_rounds(config, RunFolder(tmp_path / "run"), Silent())
    assert summary.finished
    store = Store(tmp_path / "store")
    policy = store.policy(next(store.recipes("policies"))).folder()
    (recipe,) = store.recipes("rollouts")
    rows = rollouts_batch(store.artifact(recipe).read_unit(0))
    before, after = [], []
    for row in range(len(rows)):
        ids = [*rows.prompt_ids[row].tolist(), *rows.completion_ids[row].tolist()]
        kept = slice(len(rows.prompt_ids[row]) - 1, len(ids) - 1)
        teacher = logprobs(REAL / "teacher", ids)[kept]
        for folder, found in ((REAL / student, before), (policy, after)):
            own = logprobs(folder, ids)[kept]
            found.append(float((own.exp() * (own - teacher)).sum(1).mean()))
    assert np.mean(after) < np.mean(before)
    blocks = [block for block in blocks_of(ROOT / "docs" / "tutorial.md") if block.kind == "python"]
    assert len(blocks) == 1
    text = blocks[0].text.replace("store/policies/…/attempt-…", str(policy))
    exec(text, {})
    assert "What is the capital of Portugal?" in capsys.readouterr().out
