"""The cache as others meet it: the specification, damage, many writers, garbage, exchange."""

import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from opd_stream.errors import UserError
from opd_stream.store import Store, inventory, open_scores
from opd_stream.store.artifact import Artifact, DamagedUnit
from opd_stream.store.files import stale_temporaries
from opd_stream.store.garbage import RUN_SECONDS, garbage, remove_garbage
from opd_stream.store.inventory import entries, fidelity_report
from opd_stream.store.recipe import Recipe
from opd_stream.store.shards import rollouts_table
from opd_stream.store.verification import damages
from pipeline.cli import app
from pipeline.run_folder import RunFolder
from stages.step import Silent
from tests.conftest import MODELS, SmallRuns, rewrite, run, small_config
from tests.test_store import batch_of

PAGE = (Path(__file__).parent.parent / "docs" / "cache-format.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
GONE = ("--run-days", "0")  # no run whose folder is away counts
NOW = ("--hours", "0", *GONE)
CODECS = ["{kind: exact}", "{kind: exact, dtype: float32}", "{kind: compact, mass: 0.99}"]


@pytest.fixture(
    scope="module",
    params=[pytest.param(codec, marks=[pytest.mark.slow] * ("32" in codec)) for codec in CODECS],
)
def finished(request: pytest.FixtureRequest, small_runs: SmallRuns) -> Path:
    """A folder with a finished small run in `run` and its store in `store`."""
    return small_runs(f"scores.codec={request.param}")


def finish(folder: Path, name: str, *overrides: str) -> dict[str, Any]:
    directory = RunFolder(folder / name)
    return run(small_config(folder, *overrides), directory, Silent())


def scores_names(folder: Path) -> list[str]:
    summary = json.loads((folder / "run" / "summary.json").read_text())
    return [f"scores/{cache['scores'][:16]}" for caches in summary["caches"] for cache in caches]


def said(*arguments: object) -> str:
    """What a `cache` command prints."""
    words = ["cache", *map(str, arguments)]
    return CliRunner().invoke(app, words, catch_exceptions=False).stdout


def test_the_forty_line_reader_of_the_specification_reads_what_we_read(finished: Path) -> None:
    reader: dict[str, Any] = {}
    exec(BLOCKS[0], reader)
    for name in scores_names(finished):
        ours = open_scores(finished / "store" / name)
        theirs = list(reader["rows"](finished / "store", name))
        assert len(ours) == len(theirs) > 0
        for position, (rollout, ids, logprobs) in enumerate(theirs):
            row = ours[position]
            assert rollout["prompt_id"] == row.prompt_id
            assert rollout["completion_ids"] == row.completion_ids.tolist()
            for place in range(len(ids)):
                kept = np.isfinite(row.teacher_top_logprobs[place])
                assert list(ids[place]) == row.teacher_top_ids[place][kept].tolist()
                mine = row.teacher_top_logprobs[place][kept]
                np.testing.assert_allclose(np.array(logprobs[place], float), mine, atol=2e-6)


def test_the_page_names_every_column_that_is_written(finished: Path) -> None:
    store = Store(finished / "store")
    for kind in ("rollouts", "scores"):
        for recipe in store.recipes(kind):
            for name in store.artifact(recipe).read_unit(0).column_names:
                assert re.sub(r"_\d$", "_*", name) in PAGE, name


def test_show_gives_the_fidelity_and_ls_every_artifact(finished: Path) -> None:
    name = scores_names(finished)[0]
    shown = said("show", str(finished / "store"), name)
    for figure in ("bytes_per_token", "retained_mass_p1", "logprob_error_max", "coverage.share"):
        assert figure in shown
    listed = said("ls", str(finished / "store"))
    assert all(entry.name in listed for entry in entries(Store(finished / "store")))
    store = Store(finished / "store")
    report = fidelity_report(store.by_fingerprint("scores", name.split("/")[1]))
    bound = report["logprob_error_bound"]
    assert bound is None or report["logprob_error_max"] <= bound
    assert 0 < report["retained_mass_p1"] <= report["retained_mass_mean"] <= 1 + 1e-6


def test_a_thousand_bit_flips_are_found_and_only_what_was_hit_is_made_again(
    small_runs: SmallRuns, tmp_path: Path
) -> None:
    small_runs.copy(tmp_path, "scores.codec={kind: compact, mass: 0.99}")
    store = Store(tmp_path / "store")
    shards = [p for p in store.root.rglob("*.arrow") if "prompts" not in str(p)]
    rng = random.Random(7)
    for _ in range(1000):
        path = rng.choice(shards)
        healthy = path.read_bytes()
        bit = rng.randrange(8 * len(healthy))
        damaged = bytearray(healthy)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(bytes(damaged))
        artifact = store.by_fingerprint(path.parts[-4], path.parts[-3])
        unit = int(path.name.split("-")[0])
        with pytest.raises(DamagedUnit, match=f"unit {unit} of {artifact.name} is damaged"):
            artifact.read_unit(unit)
        path.write_bytes(healthy)
    assert list(damages(store)) == []
    for path in (hit := rng.sample(shards, 3)):
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 4
        path.write_bytes(bytes(data))
    named = list(damages(store))
    assert len(named) == 3
    before = {path: path.stat().st_mtime_ns for path in shards if path not in hit}
    for policy in store.folders("policies"):
        (policy / "manifest.json").unlink()  # so that the run reads its caches again
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    again = finish(tmp_path, "again", "scores.codec={kind: compact, mass: 0.99}")
    assert again["policies"] == summary["policies"]
    assert list(damages(store)) == []
    untouched = {path: path.stat().st_mtime_ns for path in before if path.exists()}
    scored_again = {p for p in before if p not in untouched}
    assert len(scored_again) <= 3  # scores of a rollouts unit that was hit
    assert all(before[path] == untouched[path] for path in untouched)


def test_a_part_with_a_flipped_bit_is_never_decoded(finished: Path) -> None:
    name = scores_names(finished)[0]
    folder = finished / "store" / name / "units"
    (shard, *_) = sorted(folder.glob("*.arrow"))
    healthy = shard.read_bytes()
    record = json.loads((folder / "00000.json").read_text())
    for part in record["parts"]:
        damaged = bytearray(healthy)
        damaged[part["offset"] + part["length"] // 2] ^= 1
        shard.write_bytes(bytes(damaged))
        with pytest.raises(DamagedUnit):
            open_scores(finished / "store" / name)[0]
    shard.write_bytes(healthy)
    assert open_scores(finished / "store" / name)[0].prompt_id


def test_nothing_that_was_planted_is_unpickled(small_runs: SmallRuns, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "exploded"),))

    small_runs.copy(tmp_path)
    bomb = pickle.dumps(Bomb())
    store = Store(tmp_path / "store")
    for folder in [
        *store.folders("policies"),
        *store.folders("scores"),
        *store.folders("rollouts"),
    ]:
        (folder / "pytorch_model.bin").write_bytes(bomb)
        (folder / "data.pkl").write_bytes(bomb)
        for attempt in folder.glob("attempt-*"):
            (attempt / "pytorch_model.bin").write_bytes(bomb)
            (attempt / "optimizer").mkdir(exist_ok=True)
            (attempt / "optimizer" / "state.pt").write_bytes(bomb)
    for policy in store.folders("policies"):
        if policy != store.folders("policies")[0]:
            (policy / "manifest.json").unlink()
    finish(tmp_path, "again")
    said("verify", str(store.root))
    said("gc", store.root, *NOW)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "units/../../../x"])
def test_a_commit_record_that_points_out_of_the_store_is_refused(
    finished: Path, tmp_path: Path, name: str
) -> None:
    import shutil

    shutil.copytree(finished / "store", tmp_path / "store")
    scores = scores_names(finished)[0]
    path = tmp_path / "store" / scores / "units" / "00000.json"
    rewrite(path, file=name)
    with pytest.raises(UserError, match="expected a name inside that folder"):
        open_scores(tmp_path / "store" / scores)[0]
    assert "inside that folder" in said("verify", str(tmp_path / "store"))


# Order and reading


def test_the_order_of_an_epoch_depends_on_nothing_but_seed_epoch_and_rows(
    small_runs: SmallRuns, tmp_path: Path
) -> None:
    settings = ("rounds=1", "evaluation=null")
    plain, other = small_runs(*settings), tmp_path
    finish(other, "run", *settings, "prompts_per_unit=1")
    small, large = (
        open_scores(folder / "store" / scores_names(folder)[0]) for folder in (other, plain)
    )
    keys = [[row.prompt_id for row in rows.epoch(seed=4, epoch=1)] for rows in (small, large)]
    assert keys[0] == keys[1]
    assert sorted(keys[0]) == sorted(row.prompt_id for row in large.epoch(seed=4, epoch=2))
    assert keys[0] != [row.prompt_id for row in large.epoch(seed=4, epoch=2)]


def test_a_stopped_epoch_goes_on_with_another_number_of_ranks(finished: Path) -> None:
    rows = open_scores(finished / "store" / scores_names(finished)[0])
    whole = [row.prompt_id for row in rows.epoch(seed=0, epoch=0)]
    two = [rows.epoch(seed=0, epoch=0, rank=rank, world_size=2) for rank in range(2)]
    done = [next(two[rank]).prompt_id for _ in range(2) for rank in range(2)]
    rest = [
        [row.prompt_id for row in rows.epoch(seed=0, epoch=0, start=4, rank=rank, world_size=3)]
        for rank in range(3)
    ]
    assert done == whole[:4]
    assert sorted(done + [key for keys in rest for key in keys]) == sorted(whole)


def test_a_large_order_is_a_permutation_that_stays_near() -> None:
    from opd_stream.store.reader import BLOCK_ROWS, epoch_order

    order = epoch_order(100_003, (1, 2))
    assert sorted(order.tolist()) == list(range(100_003))
    assert (order == epoch_order(100_003, (1, 2))).all()
    blocks = [
        len(set((order[at : at + 512] // BLOCK_ROWS).tolist())) for at in range(0, 90_000, 512)
    ]
    assert max(blocks) <= 9


def test_a_reader_holds_no_more_than_it_may(finished: Path) -> None:
    name = finished / "store" / scores_names(finished)[0]
    bounded, free = open_scores(name, memory_bytes=1), open_scores(name)
    for rows in (bounded, free):
        for row in rows.epoch(seed=0, epoch=0):
            assert len(row.completion_ids)
    assert len(bounded._decoded) == 1
    assert len(free._decoded) > 1


# Many writers


MANY = Recipe(kind="rollouts", settings={"many": 1}, inputs={})


def write_units(root: str, seed: int) -> None:
    artifact = Artifact(Path(root), MANY)
    artifact.create(rows=24, rows_per_unit=1)
    units = list(artifact.units())
    random.Random(seed).shuffle(units)
    for unit in units[:16]:
        table = rollouts_table(batch_of([40 + unit], seed=1000 * seed + unit))  # never equal bytes
        artifact.commit(unit, table, counts={"rows": 1})
    artifact.finish()


def read_units(root: str) -> None:
    """Over and over while units are written, and once more when all are."""
    artifact = Artifact(Path(root), MANY)
    is_last = False
    while not is_last:
        is_last = artifact.is_complete()
        for unit in artifact.commits():
            first = artifact.commit_record(unit)
            artifact.read_unit(unit)  # raises on torn or foreign bytes
            assert artifact.commit_record(unit) == first  # the first record stands


def test_eight_writers_and_two_readers_lose_and_tear_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_units, args=(str(tmp_path), n)) for n in range(8)]
    readers = [
        context.Process(target=read_units, args=(str(tmp_path),), daemon=True) for _ in range(2)
    ]
    for process in [*readers, *writers]:
        process.start()
    for process in writers:
        process.join()
        assert process.exitcode == 0
    assert Artifact(tmp_path, MANY).is_complete()  # what the readers wait for
    for process in readers:
        process.join()
        assert process.exitcode == 0
    artifact = Artifact(tmp_path, MANY)
    listed = {record.unit: record.sha256 for record in artifact.manifest().units}
    assert listed == {unit: commit.sha256 for unit, commit in artifact.commits().items()}
    shards = {path.name for path in (artifact.folder / "units").glob("*.arrow")}
    assert shards == {Path(commit.file).name for commit in artifact.commits().values()}
    assert not list(tmp_path.rglob("*.tmp"))


def test_only_old_temporary_files_are_cleaned_up(tmp_path: Path) -> None:
    old, young = tmp_path / ".a.1.tmp", tmp_path / ".b.2.tmp"
    for path in (old, young):
        path.write_text("half")
    os.utime(old, (0, 0))
    assert stale_temporaries(tmp_path, (), before=time.time() - 3600) == [old]
    assert young.exists()


# Garbage


def names_in(folder: Path) -> set[str]:
    return {entry.name for entry in entries(Store(folder / "store"))}


def test_gc_frees_what_no_run_and_no_pin_reaches(small_runs: SmallRuns, tmp_path: Path) -> None:
    import shutil

    small_runs.copy(tmp_path)
    kept = names_in(tmp_path)
    finish(tmp_path, "other", "scores.top_k=3")
    others = names_in(tmp_path) - kept
    store = str(tmp_path / "store")
    pinned = next(name for name in sorted(others) if name.startswith("scores/"))
    assert said("gc", store, "--delete", *NOW).startswith("0 paths")
    shutil.rmtree(tmp_path / "other")
    said("pin", store, pinned)
    assert "would remove" in said("gc", store, *NOW)
    assert names_in(tmp_path) == kept | others
    assert said("gc", store, "--delete", *GONE).startswith("0 paths")  # all of it is young
    said("gc", store, "--delete", *NOW)
    assert kept <= names_in(tmp_path)
    assert pinned in names_in(tmp_path)
    assert len(names_in(tmp_path) - kept - {pinned}) < len(others) - 1
    said("unpin", store, pinned)
    said("gc", store, "--delete", *NOW)
    assert names_in(tmp_path) == kept
    assert finish(tmp_path, "run")["tokens"]["teacher_scored"] > 0  # of the run's own, before
    with pytest.raises(UserError, match="is not there; expected KIND/FINGERPRINT of one pin"):
        said("unpin", store, pinned)


def test_a_run_is_gone_when_its_record_is_old_and_its_folder_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store")
    artifact = store.artifact(Recipe(kind="rollouts", settings={}, inputs={}))
    artifact.create(rows=1, rows_per_unit=1)
    folder = tmp_path / "run"
    store.check_writable()
    store.record_run("a", folder, {artifact.name})
    record = store.root / "runs" / "a.json"

    def is_kept(host: str) -> bool:
        monkeypatch.setattr("platform.node", lambda: host)
        return garbage(store, grace_seconds=0) == []

    hosts = (json.loads(record.read_text())["host"], "a new container")
    assert all(map(is_kept, hosts))  # the folder is away, on another machine perhaps
    old = time.time() - RUN_SECONDS - 60
    os.utime(record, (old, old))
    assert not any(map(is_kept, hosts))
    assert "run a is gone" in said("gc", store.root, "--hours", 0)
    folder.mkdir()
    assert all(map(is_kept, hosts))
    folder.rmdir()
    store.add_to_run("a", folder, set())  # it goes on, with nothing new
    assert all(map(is_kept, hosts))


def test_a_record_of_a_later_version_is_one_line_and_nothing_is_freed(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.check_writable()
    store.record_run("a", tmp_path, ())
    record = store.root / "runs" / "a.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "format_version": 2}))
    with pytest.raises(UserError, match=r"a\.json has format version 2; .* reads version 1"):
        said("gc", store.root)


def test_a_killed_gc_leaves_no_unit_without_its_recipe(
    small_runs: SmallRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    small_runs.copy(tmp_path)
    shutil.rmtree(tmp_path / "run")
    removed: list[Path] = []

    def stops(folder: Path) -> None:
        removed.append(folder)
        shutil.rmtree(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr("opd_stream.store.garbage.remove_tree", stops)
    store = Store(tmp_path / "store")
    first, *_ = garbage(store, grace_seconds=0, run_seconds=0)
    with pytest.raises(KeyboardInterrupt):
        remove_garbage(first)
    (gone,) = removed
    assert gone.name in ("units", "attempts") or gone.name.startswith("attempt")
    assert (gone.parent / "recipe.json").exists()
    finish(tmp_path, "run")
    assert list(damages(Store(tmp_path / "store"))) == []


@pytest.fixture
def gone(small_runs: SmallRuns, tmp_path: Path) -> Path:
    """The store of a small run whose folder is away."""
    small_runs.copy(tmp_path)
    (tmp_path / "run").rename(tmp_path / "moved")
    return tmp_path / "store"


def removed_from(store: Path) -> set[Path]:
    """What gc says it removed."""
    lines = said("gc", str(store), "--delete", *NOW).splitlines()
    return {Path(line.split(" ")[-3]) for line in lines if line.startswith("removed")}


def test_gc_removes_what_it_lists_and_follows_no_link(gone: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    scores, *_ = (gone / "scores").iterdir()
    scores.rename(outside)
    scores.symlink_to(outside)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    rollouts, *_ = (gone / "rollouts").iterdir()
    (rollouts / "units" / "link").symlink_to(foreign)
    (gone / "mine").mkdir()
    temporaries = [gone / "runs" / ".a.tmp", gone / ".b.tmp"]
    others = [gone / "mine" / ".c.tmp", foreign / ".d.tmp", outside / ".e.tmp"]
    for path in (*temporaries, *others):
        path.write_text("half")
    text = said("gc", gone, *NOW)
    assert f"left {scores}: a link" in text
    removed = removed_from(gone)
    assert {path for path in removed if f"would remove {path} (" not in text} == set()
    assert set(temporaries) < removed
    assert all(path.exists() for path in (*others, outside / "recipe.json"))
    assert not any(path.exists() for path in removed)


def test_gc_leaves_what_a_link_in_a_policy_leads_to(gone: Path, tmp_path: Path) -> None:
    policy, *_ = (gone / "policies").iterdir()
    said("pin", gone, f"policies/{policy.name}")
    outside = tmp_path / "outside"
    shutil.copytree(policy, outside)
    (policy / "attempt-x").symlink_to(outside)
    before = sorted(outside.rglob("*"))
    said("gc", gone, "--delete", *NOW)
    assert sorted(outside.rglob("*")) == before


def test_gc_removes_nothing_while_what_is_pinned_has_lost_its_recipe(gone: Path) -> None:
    scores, *_ = (gone / "scores").iterdir()
    said("pin", gone, f"scores/{scores.name}")
    (scores / "recipe.json").unlink()
    before = sorted(gone.rglob("*"))
    with pytest.raises(UserError, match=f"scores/{scores.name} is kept.*nothing is removed"):
        said("gc", gone, "--delete", *NOW)
    assert sorted(gone.rglob("*")) == before


@pytest.mark.parametrize("name", ["runs", "pins"])
def test_gc_removes_nothing_where_nobody_says_what_is_kept(gone: Path, name: str) -> None:
    shutil.rmtree(gone / name, ignore_errors=True)
    (gone / name).write_text("")
    with pytest.raises(UserError, match="is no folder; expected the one that runs wrote to"):
        said("gc", gone, "--delete", *NOW)


@pytest.mark.parametrize("words", [("--hours", "-1"), ("--hours", "nan"), ("--run-days", "inf")])
def test_gc_takes_times_from_0_on(gone: Path, words: tuple[str, str]) -> None:
    with pytest.raises(UserError, match="expected numbers from 0 on"):
        said("gc", gone, *words)


def test_a_pipe_in_place_of_a_file_is_a_finding_and_not_waited_for(gone: Path) -> None:
    scores, *_ = (gone / "scores").iterdir()
    (record,) = list((scores / "units").glob("00000.json"))
    shard = next((scores / "units").glob("00001-*.arrow"))
    for path in (record, shard):
        path.unlink()
        os.mkfifo(path)
    (gone / "evaluations").rename(gone / "moved")
    (gone / "evaluations").write_text("")
    found = CliRunner().invoke(app, ["cache", "verify", str(gone)])
    assert found.exit_code == 1
    assert found.output.count(f"damaged: scores/{scores.name}") == 2
    assert "damaged: evaluations" in found.output


def test_gc_refuses_what_is_no_store(gone: Path, tmp_path: Path) -> None:
    (gone / "store.json").unlink()
    with pytest.raises(UserError, match=r"no store\.json.*expected a store"):
        said("gc", gone, "--delete", *NOW)
    assert sorted((gone / "scores").iterdir())


def test_gc_removes_nothing_while_the_recipe_of_what_is_kept_is_damaged(gone: Path) -> None:
    names = sorted(f"policies/{path.name}" for path in (gone / "policies").iterdir())
    said("pin", gone, names[0])
    (gone / names[0] / "recipe.json").write_text("{")
    with pytest.raises(UserError, match=f"{names[0]} is kept.*nothing is removed"):
        said("gc", gone, "--delete", *NOW)
    (pin,) = (gone / "pins").iterdir()
    pin.unlink()
    assert f"left {gone / names[0]}: " in said("gc", gone, "--delete", *NOW)
    assert not list((gone / "scores").iterdir())
    assert (gone / names[0]).exists()


def test_pins_take_paths_and_beginnings_of_names(
    gone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, *others = sorted((gone / "scores").iterdir())
    name = f"scores/{folder.name}"
    monkeypatch.chdir(gone.parent)
    shortest = next(n for n in range(1, 17) if all(o.name[:n] != folder.name[:n] for o in others))
    given = (name, f"{name}/", f"{folder}/", f"./store/{name}", f"scores/{folder.name[:shortest]}")
    for text in given:
        assert said("pin", "store", text) == f"pinned {name}\n"
        assert said("unpin", "store", text) == f"unpinned {name}\n"
    for text in ("", "scores", "scores/", "scores/zz", "../store", f"other/{folder.name}"):
        with pytest.raises(UserError, match="is not there; expected KIND/FINGERPRINT"):
            said("pin", "store", text)
    assert not list((gone / "pins").iterdir())


# Exchange


def test_what_holds_no_scores_is_not_exported(finished: Path) -> None:
    store = Store(finished / "store")
    scores = inventory.open_artifact(store, scores_names(finished)[0])
    rollouts = store.scored_rollouts(scores)
    with pytest.raises(UserError, match=f"{rollouts.name} holds no scores; expected scores/"):
        store.scored_rollouts(rollouts)


@pytest.mark.parametrize("form", ["parquet", "datasets"])
def test_what_is_exported_comes_back_the_same(finished: Path, tmp_path: Path, form: str) -> None:
    store, name = str(finished / "store"), scores_names(finished)[0]
    said("export", store, name, tmp_path / "out", "--form", form)
    source = tmp_path / "out"
    if form == "datasets":
        import datasets

        source = tmp_path / "table.parquet"
        datasets.load_from_disk(str(tmp_path / "out")).to_parquet(source)
    line = said("import", str(tmp_path / "store"), source, "--codec", CODECS[1])
    mine = open_scores(finished / "store" / name)
    theirs = open_scores(tmp_path / "store" / line.split(":")[0])
    assert len(mine) == len(theirs)
    for position in range(len(mine)):
        for field in ("prompt_ids", "completion_ids", "behavior_logprobs", "teacher_logprobs"):
            np.testing.assert_array_equal(
                getattr(mine[position], field), getattr(theirs[position], field)
            )
        a, b = mine[position], theirs[position]
        width = min(a.teacher_top_ids.shape[1], b.teacher_top_ids.shape[1])
        for field in ("teacher_top_ids", "teacher_top_logprobs"):
            np.testing.assert_array_equal(
                getattr(a, field)[:, :width], getattr(b, field)[:, :width]
            )
        assert not np.isfinite(a.teacher_top_logprobs[:, width:]).any()
        assert not np.isfinite(b.teacher_top_logprobs[:, width:]).any()
        np.testing.assert_array_equal(a.teacher_tail_logprobs, b.teacher_tail_logprobs)
        np.testing.assert_array_equal(a.teacher_forced_logprobs, b.teacher_forced_logprobs)


ROW = {
    "prompt_ids": [2, 3],
    "completion_ids": [4, 5],
    "behavior_logprobs": [-0.5, -0.25],
    "teacher_logprobs": [-0.5, -2.0],
    "teacher_top_ids": [[4, 9], [7]],
    "teacher_top_logprobs": [[-0.5, -1.5], [-0.25]],
}


def written(path: Path, rows: list[Any]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".zst":
        import zstandard

        text = zstandard.ZstdCompressor().compress(text)
    path.write_bytes(text)
    return path


def test_a_run_trains_on_rows_another_program_wrote(tmp_path: Path) -> None:
    source = written(tmp_path / "rows.jsonl.zst", [ROW | {"prompt_id": str(n)} for n in range(8)])
    line = said("import", str(tmp_path / "store"), source, "--codec", "{kind: compact}")
    name = line.split(":")[0]
    row = open_scores(tmp_path / "store" / name)[0]
    assert row.teacher_tail_logprobs[0] == pytest.approx(
        np.log(1 - np.exp(-0.5) - np.exp(-1.5)), abs=1 / 32
    )
    assert row.teacher_top_logprobs[1].tolist()[1] == -np.inf
    replay = ["rounds=1", f"replay.scores=[{name}]", "prompts_per_unit=4"]
    with pytest.raises(UserError, match="the rollouts are stale"):  # invented behavior
        finish(tmp_path, "reverse", *replay)
    summary = finish(tmp_path, "run", *replay, "train.objective.direction=forward")
    assert summary["tokens"]["teacher_scored"] == 0
    assert summary["tokens"]["trained"] == 8 * 2
    assert summary["decisions"][0].startswith("drift passed its bound")  # invented behavior
    losses = [json.loads(x)["loss"] for x in (tmp_path / "run" / "metrics.jsonl").open()]
    assert np.isfinite(losses).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"teacher_top_ids": None}, "line 2 has no teacher_top_ids"),
        ({"behavior_logprobs": [-1.0]}, "line 2 has 1 behavior_logprobs for 2 completion tokens"),
        ({"teacher_top_ids": [[4], [7]]}, "1 teacher_top_ids and 2 teacher_top_logprobs"),
        ({"teacher_tail_logprobs": [-1, -2, -9]}, "3 teacher_tail_logprobs for 2 scored tokens"),
        ({"teacher_forced_logprobs": [[-1.0]]}, "1 teacher_forced_logprobs for 2 scored tokens"),
        ({"teacher_forced_logprobs": [[-1.0], []]}, "unequal numbers of teacher_forced_logprobs"),
        ({"teacher_forced_logprobs": [[None], [-2.0]]}, "forced_logprobs that are no log-prob"),
        ({"teacher_forced_logprobs": [[-1.0], [-2.0]]}, r"have \[0, 1\] teacher_forced_logprobs"),
        ({"teacher_logprobs": [-0.5, float("nan")]}, "teacher_logprobs that are no log-prob"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    source = written(tmp_path / "rows.jsonl", [ROW, ROW | change])
    with pytest.raises(UserError, match=words):
        said("import", str(tmp_path / "store"), source)


def test_a_store_is_read_from_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = written(tmp_path / "rows.jsonl", [ROW])
    name = said("import", str(tmp_path / "store"), source).split(":")[0]
    monkeypatch.chdir(tmp_path / "store")
    assert len(open_scores(name)) == 1
    with pytest.raises(UserError, match="is no scores artifact"):
        open_scores(name.removeprefix("scores/"))


def test_a_torn_file_of_rows_is_refused(tmp_path: Path) -> None:
    source = written(tmp_path / "rows.jsonl.zst", [ROW] * 9)
    source.write_bytes(source.read_bytes()[:-6])
    with pytest.raises(UserError, match="not a whole zstd file"):
        said("import", str(tmp_path / "store"), source)


def test_what_is_no_store_codec_or_file_is_one_line(tmp_path: Path) -> None:
    for words, arguments in (
        ("does not exist", ("ls", str(tmp_path / "nothing"))),
        ("is no codec", ("import", tmp_path / "s", "x", "--codec", "{kind: magic}")),
        ("is no file", ("import", tmp_path / "s", tmp_path / "x.jsonl")),
    ):
        with pytest.raises(UserError, match=words):
            said(*arguments)
    with pytest.raises(UserError, match="is no scores artifact"):
        open_scores(tmp_path / "store" / "rollouts" / "0123")
    assert {command.name for command in app.registered_groups} == {"cache"}


# The page's training loops


@pytest.fixture
def page_names() -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODELS / "ledger-student", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return {"model": model, "optimizer": optimizer, "torch": torch}


def test_the_plain_loop_of_the_page_runs(finished: Path, page_names: dict[str, Any]) -> None:
    name = finished / "store" / scores_names(finished)[0]
    before = [p.clone() for p in page_names["model"].parameters()]
    code = BLOCKS[1].replace("store/scores/3f0c5d1a2b3c4d5e", str(name)).replace("== 16", "== 4")
    exec(code, page_names)
    assert torch.isfinite(page_names["loss"])
    after = page_names["model"].parameters()
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
