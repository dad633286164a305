"""Caches for others: folders and a stand-in of the hub; hostile ones are kept out."""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from opd_stream.errors import UserError
from opd_stream.store import open_scores
from opd_stream.store.artifact import Artifact
from opd_stream.store.files import sha256
from opd_stream.store.shards import shard_bytes, table_of
from opd_stream.store.sharing import read_cache
from opd_stream.store.store import Store
from opd_stream.store.tokenizer_folder import open_tokenizer
from opd_stream.store.verification import damages
from opd_stream.trainers.serving import check_tokenizer
from pipeline.run_folder import RunFolder
from stages.step import Silent
from tests.conftest import MODELS, Command, SmallRuns, rewrite, run, small_config
from tests.hub_server import Hub
from tests.test_export import hub
from tests.test_hidden_runs import HIDDEN

__all__ = ["hub"]


def scores_name(folder: Path) -> str:
    return f"scores/{RunFolder(folder / 'run').plan(0).caches[0].scores[:16]}"


@pytest.fixture
def shared(finished_run: Path, tmp_path: Path, opd_stream: Command) -> Path:
    """A shared folder of the first round's scores."""
    out = tmp_path / "shared"
    words = ("cache", "push", str(finished_run / "store"), scores_name(finished_run), str(out))
    assert opd_stream(*words, "--teacher", "the teacher")[0] == 0
    return out


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_shared_cache_is_not_trained_on_under_another_tokenizer(
    finished_run: Path, shared: Path, tmp_path: Path, opd_stream: Command
) -> None:
    name, other = scores_name(finished_run), MODELS / "routine-student"
    assert opd_stream("cache", "pull", str(tmp_path / "store"), str(shared))[0] == 0
    replay = (f"replay.scores=[{name}]", f"student.path={other}", "rounds=1", "evaluation=null")
    with pytest.raises(UserError, match="they give texts other ids"):
        run(small_config(tmp_path, *replay), RunFolder(tmp_path / "replay"), Silent())
    for store in (shared, tmp_path / "store", finished_run / "store"):
        opened = Store(store, remembers=False)
        scores = opened.by_fingerprint("scores", name.partition("/")[2])
        with pytest.raises(UserError, match="they give texts other ids"):
            check_tokenizer([(opened.scored_rollouts(scores), scores)], open_tokenizer(other))


def test_a_folder_brings_the_same_bytes_into_another_store(
    finished_run: Path, shared: Path, tmp_path: Path, opd_stream: Command
) -> None:
    name, student = scores_name(finished_run), str(MODELS / "ledger-student")
    code, said, _ = opd_stream(
        "cache", "pull", str(tmp_path / "store"), str(shared), "--student", student
    )
    assert (code, said) == (0, f"{name}: train on it with replay: {{scores: [{name}]}}\n")
    assert files_of(tmp_path / "store" / name) == files_of(finished_run / "store" / name)
    assert not list(damages(Store(tmp_path / "store"), deep=True))
    ours, theirs = (open_scores(at / name) for at in (finished_run / "store", shared))
    np.testing.assert_array_equal(ours[3].teacher_top_ids, theirs[3].teacher_top_ids)
    kinds = {path.name for path in (tmp_path / "store").iterdir()}
    assert kinds == {"store.json", "rollouts", "scores", "prompts"}  # no policies
    prompts = files_of(tmp_path / "store" / "prompts")
    assert [Path(path).name for path in prompts] == ["recipe.json"]  # no texts


@pytest.mark.parametrize("pulls", [True, False])
def test_a_run_trains_on_what_was_shared(
    finished_run: Path, shared: Path, tmp_path: Path, pulls: bool
) -> None:
    """Pulled into its store, or where the folder lies."""
    new, name = tmp_path / "new", scores_name(finished_run)
    replay = [f"replay.scores=[{name}]", "rounds=1", "teacher=null", "evaluation=null"]
    if pulls:
        assert read_cache(shared, Store(new / "store")).name == name
    else:
        replay.append(f"replay.store={shared}")
    summary = run(small_config(new, *replay), RunFolder(tmp_path / "r"), Silent())
    ours = RunFolder(finished_run / "run").summary()
    assert ours is not None
    assert summary["tokens"]["teacher_scored"] == 0
    assert summary["policies"][1]["weights_sha256"] == ours.policies[1].weights_sha256


def test_hidden_states_travel_with_head_and_basis(
    small_runs: SmallRuns, tmp_path: Path, opd_stream: Command
) -> None:
    folder, out = small_runs(*HIDDEN), tmp_path / "shared"
    name = scores_name(folder)
    assert opd_stream("cache", "push", str(folder / "store"), name, str(out))[0] == 0
    read_cache(out, Store(tmp_path / "store"))
    assert {path.name for path in (tmp_path / "store").iterdir()} >= {"heads", "bases"}
    states = [open_scores(at / name)[0].teacher_states for at in (folder / "store", out)]
    assert all(each is not None for each in states)


def test_the_card_says_what_it_is(shared: Path, finished_run: Path) -> None:
    text = (shared / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["license"] == "unknown"
    assert {each["config_name"] for each in head["configs"]} == {"rollouts", "scores"}
    for said in ("| teacher | the teacher |", "| candidates a token (K) | 4 |", "kind: exact"):
        assert said in text
    for figure in ("retained_mass_mean", "logprob_error_max", "coverage.share", "tokenizer's"):
        assert figure in text
    assert str(finished_run) not in "".join(
        each.decode(errors="replace") for each in files_of(shared).values()
    )


def test_a_hub_gives_back_what_it_got(
    finished_run: Path, tmp_path: Path, opd_stream: Command, hub: Hub
) -> None:
    name = scores_name(finished_run)
    words = ("cache", "push", str(finished_run / "store"), name, "org/cache")
    code, said, _ = opd_stream(*words)
    assert code == 0
    assert "pushed to" in said
    held = hub.repositories["dataset", "org/cache"]
    assert held.private
    held.files["load.py"] = b"raise SystemExit"  # nothing but records and shards is fetched
    assert opd_stream("cache", "pull", str(tmp_path / "store"), "org/cache")[0] == 0
    assert files_of(tmp_path / "store" / name) == files_of(finished_run / "store" / name)
    held.files["../../out/cache.json"] = b"{}"
    code, _, said = opd_stream("cache", "pull", str(tmp_path / "other"), "org/cache")
    assert (code, said.count("\n")) == (2, 1)
    assert "expected a name inside that folder" in said
    code, _, said = opd_stream("cache", "pull", str(tmp_path / "other"), "org/none")
    assert (code, said.count("\n")) == (2, 1)
    assert "org/none cannot be pulled" in said


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def of_kind(shared: Path, pattern: str) -> Path:
    return sorted(shared.glob(pattern))[0]


def other_shard(shared: Path) -> None:
    """A shard whose digests agree and whose rows break a law, as somebody would write it."""
    record = of_kind(shared, "scores/*/units/00000.json")
    commit = json.loads(record.read_bytes())
    shard = record.parent.parent / commit["file"]
    table = table_of(shard.read_bytes())
    place = table.column_names.index("teacher_logprobs")
    lists = [[5.0] * len(row) for row in table["teacher_logprobs"].to_pylist()]
    bad = table.set_column(
        place, table.schema.field(place), pa.array(lists, table.schema.types[place])
    )
    data, parts = shard_bytes(bad)
    name = f"units/00000-{sha256(data)[:8]}.arrow"
    (shard.parent / Path(name).name).write_bytes(data)
    name_first_unit(
        shared,
        file=name,
        sha256=sha256(data),
        bytes=len(data),
        parts=[asdict(part) for part in parts],
    )


def renamed_shard(shared: Path) -> None:
    """Sound bytes under the name of another file than a unit's, which they would replace."""
    record = of_kind(shared, "scores/*/units/00000.json")
    data = (record.parent.parent / json.loads(record.read_bytes())["file"]).read_bytes()
    (record.parent / "other.arrow").write_bytes(data)
    name_first_unit(shared, file="units/other.arrow")


def name_first_unit(shared: Path, **changed: Any) -> None:
    """Change the record of the first unit of the scores, and what repeats it."""
    rewrite(of_kind(shared, "scores/*/units/00000.json"), **changed)
    manifest = of_kind(shared, "scores/*/manifest.json")
    units = json.loads(manifest.read_bytes())["units"]
    rewrite(manifest, units=[units[0] | changed, *units[1:]])


def link(shared: Path) -> None:
    path = of_kind(shared, "scores/*/units/*.arrow")
    other = shared.parent / "elsewhere.arrow"
    shutil.move(path, other)
    path.symlink_to(other)


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped shard": (lambda s: flip(of_kind(s, "scores/*/units/*.arrow")), "SHA-256"),
    "flipped rollouts": (lambda s: flip(of_kind(s, "rollouts/*/units/*.arrow")), "SHA-256"),
    "lost shard": (lambda s: of_kind(s, "scores/*/units/*.arrow").unlink(), "missing|No such file"),
    "lost record": (
        lambda s: of_kind(s, "scores/*/units/*.json").unlink(),
        "commit record is missing",
    ),
    "lost rollouts": (lambda s: shutil.rmtree(s / "rollouts"), "has no rollouts/"),
    "no manifest": (lambda s: of_kind(s, "scores/*/manifest.json").unlink(), "is not complete"),
    "record of no JSON": (
        lambda s: of_kind(s, "scores/*/units/*.json").write_text("{"),
        "not valid JSON",
    ),
    "recipe of another": (
        lambda s: rewrite(of_kind(s, "scores/*/recipe.json"), settings={}),
        "its recipe belongs to",
    ),
    "broken law": (other_shard, "teacher_logprobs"),
    "name that leads out": (
        lambda s: name_first_unit(s, file="../../../x.arrow"),
        "expected a name inside",
    ),
    "name of a record": (renamed_shard, "names 'units/other.arrow' as a shard"),
    "link": (link, "is a link"),
    "entry that leads out": (
        lambda s: rewrite(s / "cache.json", scores="scores/../../elsewhere"),
        "expected a fingerprint",
    ),
    "no entry": (lambda s: (s / "cache.json").unlink(), "is no shared cache"),
    "pipe": (
        lambda s: (of_kind(s, "scores/*/units/*.arrow").unlink(), os.mkfifo(s / "scores" / "p")),
        "missing|No such file",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_nothing_of_a_hostile_folder_enters_a_store(
    shared: Path, tmp_path: Path, opd_stream: Command, case: str
) -> None:
    change, line = HOSTILE[case]
    change(shared)
    before = sorted(tmp_path.iterdir())
    code, _, said = opd_stream("cache", "pull", str(tmp_path / "store"), str(shared))
    assert (code, said.count("\n")) == (2, 1), said
    assert re.search(line, said), said
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["store.json"]
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "store"])


def test_a_pull_that_was_killed_leaves_no_artifact_and_can_be_repeated(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, calls, plain = Store(tmp_path / "store"), [0], Artifact.adopt

    def killed(self: Artifact, *inputs: Any) -> None:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        plain(self, *inputs)

    monkeypatch.setattr(Artifact, "adopt", killed)
    with pytest.raises(KeyboardInterrupt):
        read_cache(shared, store)
    assert not list((tmp_path / "store").glob("scores/*/manifest.json"))
    assert not list(damages(store, deep=True))
    scores = read_cache(shared, store)
    assert len(open_scores(tmp_path / "store" / scores.name)) == 8
    assert calls[0] == 5  # the other three were there


def test_other_bytes_of_the_same_recipe_are_refused(
    shared: Path, copied_run: Path, tmp_path: Path
) -> None:
    read_cache(shared, Store(copied_run / "store"))  # the same
    entry = json.loads((shared / "cache.json").read_bytes())["scores"]
    record = copied_run / "store" / entry / "units" / "00000.json"
    rewrite(record, sha256="0" * 64)
    with pytest.raises(UserError, match="of other bytes or with other units"):
        read_cache(shared, Store(copied_run / "store"))


def test_another_tokenizer_is_refused(shared: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="they give texts other ids"):
        read_cache(shared, Store(tmp_path / "store"), student=MODELS / "routine-student")
    rewrite(shared / "cache.json", tokenizer=None)
    with pytest.raises(UserError, match="does not say which tokenizer"):
        read_cache(shared, Store(tmp_path / "store"), student=MODELS / "ledger-student")
    assert not (tmp_path / "store").exists()


def test_what_cannot_be_pushed_is_one_line(
    finished_run: Path, copied_run: Path, tmp_path: Path, opd_stream: Command
) -> None:
    store, name = str(finished_run / "store"), scores_name(finished_run)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    rollouts = sorted((finished_run / "store" / "rollouts").iterdir())[0]
    for words, line in (
        ((store, name, str(tmp_path / "full")), "expected a new or empty folder"),
        ((store, f"rollouts/{rollouts.name}", str(tmp_path / "out")), "holds no scores"),
        ((store, "scores/0000", str(tmp_path / "out")), "is not there"),
    ):
        code, _, said = opd_stream("cache", "push", *words)
        assert (code, said.count("\n")) == (2, 1), said
        assert line in said
    flip(of_kind(copied_run / "store" / name, "units/*.arrow"))
    code, _, said = opd_stream(
        "cache", "push", str(copied_run / "store"), name, str(tmp_path / "o")
    )
    assert (code, said.count("\n")) == (2, 1)
    assert "is damaged" in said
    assert not (tmp_path / "o").exists()
    code, _, said = opd_stream(
        "cache", "pull", str(tmp_path / "s"), str(tmp_path), "--revision", "x"
    )
    assert (code, said.count("\n")) == (2, 1)
