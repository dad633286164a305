"""What names a policy: every setting that decides its weights, and nothing else."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from opd_stream.errors import UserError
from opd_stream.store.recipe import Recipe
from pipeline.rounds import rounds
from pipeline.setup import open_setup
from stages.answers import open_reward
from tests.conftest import small_config

EVALUATED = {
    "max_new_tokens": "evaluation.max_new_tokens=17",
    "temperature": "evaluation.temperature=0.5",
    "seed": "evaluation.seed=5",
    "judge": "evaluation.judge.kind=exact",
}


def policy_of(folder: Path, signal: str, *overrides: str) -> Recipe:
    """The recipe of a run's first policy."""
    extrapolation = f"train.extrapolation={{signal: {signal}}}"
    return next(rounds(open_setup(small_config(folder, extrapolation, *overrides)))).policy.recipe


@pytest.mark.parametrize("signal", ["reward", "both"])
@pytest.mark.parametrize("changed", list(EVALUATED))
def test_what_decides_a_reward_names_the_policy(signal: str, changed: str, tmp_path: Path) -> None:
    before = policy_of(tmp_path, signal)
    after = policy_of(tmp_path, signal, EVALUATED[changed])
    assert after.fingerprint != before.fingerprint
    assert after.settings["reward"] != before.settings["reward"]
    rest = {**after.settings, "reward": {**after.settings["reward"]}}
    rest["reward"][changed] = before.settings["reward"][changed]
    assert (rest, after.inputs) == (before.settings, before.inputs)


def test_a_reward_is_of_the_training_prompts_and_ends_at_the_stop_ids(tmp_path: Path) -> None:
    setup = open_setup(small_config(tmp_path, "train.extrapolation={signal: reward}"))
    recipe = next(rounds(setup)).policy.recipe
    assert recipe.inputs["prompts"] == setup.prompts.fingerprint
    assert recipe.settings["reward"]["stop_ids"] == list(setup.vocabulary.stop_ids)


def test_without_a_reward_nothing_of_the_evaluation_names_the_policy(tmp_path: Path) -> None:
    plain = policy_of(tmp_path, "kl")
    assert "reward" not in plain.settings
    assert set(plain.inputs) == {"base", "scores.0.version_0", "prompts"}
    assert policy_of(tmp_path, "kl", *EVALUATED.values()) == plain


def test_a_reward_is_of_the_prompts_that_the_judge_can_read(tmp_path: Path) -> None:
    answers = ["see below", "2", None, "3", "4"]
    rows = [{"prompt": f"{n}?", "answer": answer} for n, answer in enumerate(answers)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f"kind: jsonl, path: {tmp_path / 'rows.jsonl'}"
    asked = ["evaluation.judge.kind=final_number", "rollouts.prompts_per_round=2"]
    asked += ["train.extrapolation={signal: reward, prompts: 2}", "evaluation.prompts.count=1"]
    setup = open_setup(
        small_config(tmp_path, *asked, f"prompts={{{source}, answer_field: answer}}")
    )
    assert any("prompts: 2 of 5 prompts are left out" in line for line in setup.warnings)
    job = SimpleNamespace(
        config=setup.config,
        prompts=setup.prompts.fingerprint,
        base=str(setup.student.folder),
        vocabulary=setup.vocabulary,
        first_step=0,
        store=lambda: setup.store,
    )
    reward = open_reward(cast(Any, job))
    assert len(reward.answers) == 2
    assert set(reward.asked.prompts.prompt_id) < {"row-1", "row-3", "row-4"}
    number = {"row-1": "2", "row-3": "3", "row-4": "4"}
    assert reward.answers == tuple(number[name] for name in reward.asked.prompts.prompt_id)
    with pytest.raises(UserError, match="prompts: none of 5 prompts has a reference answer"):
        open_setup(small_config(tmp_path, *asked, f"prompts={{{source}}}"))
