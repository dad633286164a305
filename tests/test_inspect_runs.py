"""Rollouts of runs of other kinds: windows, codecs, kept and continued units, imported rows."""

import json
from pathlib import Path

import numpy as np
import pytest

from opd_stream.config_file import override_config
from opd_stream.errors import UserError
from opd_stream.store.codecs import ExactCodec
from opd_stream.store.exchange import export_scores, import_scores
from opd_stream.store.store import Store
from pipeline.inspect.command import inspect_rollout, inspect_worst
from pipeline.inspect.page import page
from pipeline.run_folder import RunFolder
from tests.conftest import SmallRuns, rewrite, small_config
from tests.test_inspect import printed, rows_of, run_small


def test_windows_and_masks_are_marked_and_left_out_of_the_mean(tmp_path: Path) -> None:
    """Planned steps of windows 16 and 32, a first full stop that does not train."""
    window = "{kind: linear, h0: 16, delta: 16, every: 2, max_window_tokens: 48}"
    overrides = [f"rollouts.window={window}", "train.guards.mask_first=['.']", "rounds=1"]
    directory, config = run_small(tmp_path, *overrides, "evaluation=null")
    row = rows_of(directory, config)[0]
    view = inspect_rollout(directory, config, round_index=0, prompt_id=row.prompt_id)
    assert len(row.completion_ids) == 32
    assert [(mark.place, mark.text) for mark in view.marks] == [(16, "window 16 from step 0")]
    stop = view.pieces.index(".")
    assert np.flatnonzero(~view.trains).tolist() == [stop]
    assert view.mean == pytest.approx(np.delete(view.values, stop).mean())
    assert stop not in view.worst(99)
    text = printed(view)
    assert "⟦.⟧" in text
    assert "┃ in front of token 16: window 16 from step 0" in text
    shorter = override_config(config, ["rollouts.window.max_window_tokens=20"])
    view = inspect_rollout(directory, shorter, round_index=0, prompt_id=row.prompt_id)
    assert not view.trains[20:].any()
    assert view.mean == pytest.approx(np.delete(view.values[:20], stop).mean())


@pytest.mark.parametrize(
    "codec",
    [
        "{kind: sampled, draws: 8}",
        pytest.param("{kind: compact, mass: 0.9999}", marks=pytest.mark.slow),
    ],
)
def test_other_codecs_say_what_they_know(tmp_path: Path, codec: str) -> None:
    overrides = [f"scores.codec={codec}", "rounds=1", "evaluation=null"]
    if "sampled" in codec:
        overrides.append("train.objective={kind: sampled_pg}")
    directory, config = run_small(tmp_path, *overrides)
    row = rows_of(directory, config)[0]
    view = inspect_rollout(directory, config, round_index=0, prompt_id=row.prompt_id)
    assert page(view).count('class="t ') == len(row.completion_ids)
    if "sampled" in codec:
        assert set(view.figures) == {"reverse_kl", "teacher_nll"}
        shown = [c.probability for c in view.candidates(0, 9)]
        assert shown == sorted(shown, reverse=True)
        assert sum(shown) == pytest.approx(1)
        with pytest.raises(UserError, match="and so no entropy; choose --by reverse_kl or"):
            inspect_worst(directory, config, round_index=0, count=1, by="entropy")
        return
    counts = np.isfinite(row.teacher_top_logprobs).sum(1)
    assert counts.min() < counts.max(), "positions differ in how many candidates they keep"
    for place, token in enumerate(row.completion_ids.tolist()):
        ids = row.teacher_top_ids[place][: counts[place]].tolist()
        expected = str(ids.index(token) + 1) if token in ids else f">{counts[place]}"
        assert view.ranks[place] == expected


def test_a_round_with_several_caches_shows_the_newest_and_names_the_other(tmp_path: Path) -> None:
    """Both rounds write to all prompts; the plan of the second says that it kept the first's."""
    directory, config = run_small(tmp_path, "prompts.count=8", "evaluation=null")
    path = directory.path / "rounds" / "0001" / "plan.json"
    plan = json.loads(path.read_text())
    caches = [*directory.plan(0).as_json()["caches"], *plan["caches"]]
    rows = [rows_of(directory, config, round_index) for round_index in (0, 1)]
    rewrite(path, caches=caches)
    name = rows[0][0].prompt_id

    def drawn_with(cache: int | None) -> list[float]:
        view = inspect_rollout(directory, config, round_index=1, prompt_id=name, cache=cache)
        return view.row.behavior_logprobs.tolist()

    wanted = [
        next(r.behavior_logprobs.tolist() for r in some.ahead(range(8)) if r.prompt_id == name)
        for some in rows
    ]
    assert wanted[0] != wanted[1]
    assert [drawn_with(0), drawn_with(1), drawn_with(None)] == [wanted[0], wanted[1], wanted[1]]
    view = inspect_rollout(directory, config, round_index=1, prompt_id=name)
    assert "the round has another rollout of this name: --cache 0" in printed(view)
    listed = inspect_worst(directory, config, round_index=1, count=99)
    assert len(listed) == 16
    assert {entry.command[entry.command.index("--cache") :] for entry in listed} == {
        "--cache 0",
        "--cache 1",
    }


def test_where_a_later_policy_went_on_is_marked(tmp_path: Path) -> None:
    directory, config = run_small(
        tmp_path,
        "rollouts.window={kind: linear, h0: 16, delta: 16, every: 2, max_window_tokens: 48}",
        "staleness={max_policies: 2, max_epochs: 1}",
        "train.learning_rate=1e-4",
        "evaluation=null",
    )
    row = rows_of(directory, config, 1)[0]
    view = inspect_rollout(directory, config, round_index=1, prompt_id=row.prompt_id)
    assert len(view.pieces) == 32
    assert [(mark.place, mark.text) for mark in view.marks] == [(16, "a later policy continues")]


def test_imported_rows_are_shown_without_what_they_do_not_say(
    small_runs: SmallRuns, tmp_path: Path
) -> None:
    settings = ("rounds=1", "evaluation=null")
    folder = small_runs(*settings)
    directory, config = RunFolder(folder / "run"), small_config(folder, *settings)
    row, store = rows_of(directory, config)[0], Store(tmp_path / "store")
    (cache,) = directory.plan(0).as_json()["caches"]
    scores = Store(config.store).by_fingerprint("scores", cache["scores"])
    export_scores(Store(config.store), scores, tmp_path / "out", form="parquet")
    imported = import_scores(tmp_path / "out", store, ExactCodec(dtype="float32"))
    other = run_small(tmp_path, f"replay.scores=[{imported.name}]", "rounds=1")
    view = inspect_rollout(*other, round_index=0, prompt_id=row.prompt_id)
    first = inspect_rollout(directory, config, round_index=0, prompt_id=row.prompt_id)
    assert view.pieces == first.pieces
    assert view.mean == pytest.approx(first.mean, abs=1e-3)
    assert view.verdict is None
    assert view.finish == "length: no terminator in 48 tokens; imported rows do not say why"
