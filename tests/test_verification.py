"""What `cache verify` says of a store that lost something, or got something."""

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opd_stream.errors import UserError
from opd_stream.store.artifact import DamagedUnit
from opd_stream.store.exchange import export_scores
from opd_stream.store.garbage import garbage
from opd_stream.store.store import Store
from opd_stream.store.verification import damages
from opd_stream.style_bias import StyleSettings
from pipeline.rounds import checkpoint_of
from pipeline.run import check_loaded
from stages.residual import make_residual
from tests.conftest import Command, rewrite

Case = Callable[[Path], object]


def first(store: Path, pattern: str) -> Path:
    """The first of the store's files or folders of a pattern."""
    return min(store.glob(pattern))


def replaced(path: Path) -> Path:
    """A file's place, free for something else."""
    path.unlink()
    return path


def last_policy(store: Path) -> Path:
    """The policy that no other was trained on from."""
    policies = {
        path: json.loads((path / "recipe.json").read_text()) for path in store.glob("policies/*")
    }
    return next(path for path, recipe in policies.items() if "optimizer" in recipe["inputs"])


def sampled_again(store: Path) -> str:
    """A unit of rollouts committed once more, with other bytes; the name of its scores."""
    scores = first(store, "scores/*")
    rollouts = json.loads((scores / "recipe.json").read_text())["inputs"]["rollouts"][:16]
    folder = store / "rollouts" / rollouts
    record = folder / "units" / "00001.json"
    shard = folder / json.loads(record.read_text())["file"]
    shard.write_bytes(data := shard.read_bytes() + b" ")
    rewrite(record, sha256=sha256(data).hexdigest())
    (folder / "manifest.json").unlink()
    return f"scores/{scores.name}"


NOTES: dict[str, tuple[Case, str]] = {
    "a manifest": (
        lambda store: first(store, "scores/*/manifest.json").unlink(),
        "has no manifest.json, and 2 of 2 units: the run writes it",
    ),
    "a manifest of a policy": (
        lambda store: first(store, "policies/*/manifest.json").unlink(),
        "has no manifest.json: cut short, or lost; the run trains its round again",
    ),
    "a manifest of an evaluation": (
        lambda store: first(store, "evaluations/*/manifest.json").unlink(),
        "the run judges the answers again",
    ),
    "a recipe's input": (
        lambda store: shutil.rmtree(first(store, "scores/*")),
        "it was made of scores",
    ),
    "what a run names": (
        lambda store: shutil.rmtree(last_policy(store)),
        "names what is not there (policies/",
    ),
    "the records of runs": (
        lambda store: shutil.rmtree(store / "runs"),
        "no record of a run is in runs",
    ),
    "the record of its maker": (
        lambda store: rewrite(replaced_by_name(first(store, "runs/*"), "aa.json"), id="aa"),
        "made it and has no record in runs",
    ),
    "a kind of another name": (
        lambda store: (store / "scores").rename(store / "scores.bak"),
        "scores.bak beside it is nothing that opd-stream wrote",
    ),
    "store.json": (
        lambda store: (store / "store.json").unlink(),
        "store.json: is missing: `cache gc` refuses",
    ),
    "an orphan shard": (
        lambda store: (first(store, "scores/*") / "units" / "00000-ab.arrow").write_bytes(b"a"),
        "units/00000-ab.arrow is in none of its records",
    ),
    "a file that no loader reads": (
        lambda store: (first(store, "policies/*/attempt-*") / "notes.md").write_text("mine"),
        "/notes.md is in none of its records",
    ),
}


def replaced_by_name(path: Path, name: str) -> Path:
    """A record under another name, as its writer would have written it."""
    target = path.with_name(name)
    value = json.loads(path.read_text())
    path.unlink()
    target.write_text(json.dumps(value | {"record": f"runs/{name}"}))
    return target


DAMAGES: dict[str, tuple[Case, str]] = {
    "rollouts that were committed again": (
        sampled_again,
        "unit 1 is damaged: it was made of other rollouts than those that are there",
    ),
    "a key twice": (
        lambda store: (path := first(store, "scores/*/units/00000.json")).write_text(
            '{"unit": 3, ' + path.read_text()[1:]
        ),
        "is not valid JSON (a key stands in it twice)",
    ),
    "a kind that links to itself": (
        lambda store: (
            shutil.rmtree(store / "scores"),
            (store / "scores").symlink_to("scores"),
        ),
        "scores: is no folder",
    ),
    "an artifact that is a file": (
        lambda store: (
            shutil.rmtree(path := first(store, "scores/*")),
            path.write_text("mine"),
        ),
        "is no folder; a run that needs it refuses",
    ),
    "a file that a loader reads": (
        lambda store: (first(store, "policies/*/attempt-*") / "added_tokens.json").write_text("{}"),
        "/added_tokens.json was not published, and a run that loads the policy refuses",
    ),
    "a record of a run that links to itself": (
        lambda store: (store / "runs" / "a.json").symlink_to("a.json"),
        "a.json is no file, or a link to none",
    ),
    "a count that is no number": (
        lambda store: rewrite(
            first(store, "scores/*/units/00000.json"), counts={"rows": float("nan")}
        ),
        "Input should be a finite number",
    ),
    "more rows than there are": (
        lambda store: rewrite(
            first(store, "scores/*/recipe.json"), layout={"rows": 10**15, "rows_per_unit": 1}
        ),
        "recipe.json cannot be read (layout.rows",
    ),
    "store.json": (
        lambda store: (store / "store.json").write_text("[]"),
        "store.json is damaged: it holds a list",
    ),
}


@pytest.mark.parametrize("what", NOTES)
def test_what_is_not_there_is_noted(what: str, copied_run: Path, opd_stream: Command) -> None:
    case, reason = NOTES[what]
    case(copied_run / "store")
    code, said, error = opd_stream("cache", "verify", str(copied_run / "store"))
    assert (code, error.count("Traceback")) == (0, 0), error
    assert any(line.startswith("note: ") and reason in line for line in said.splitlines()), said
    assert "is what was written, as far as it can be checked" in said


@pytest.mark.parametrize("what", DAMAGES)
def test_what_is_not_what_was_written_is_damage(
    what: str, copied_run: Path, opd_stream: Command
) -> None:
    case, reason = DAMAGES[what]
    case(copied_run / "store")
    for words in (("verify",), ("verify", "--repair")):
        code, said, _ = opd_stream("cache", *words, str(copied_run / "store"))
        assert code == 1
        assert any(line.startswith("damaged: ") and reason in line for line in said.splitlines())
    assert opd_stream("cache", "ls", str(copied_run / "store"))[0] == 0
    code, said, error = opd_stream("cache", "gc", str(copied_run / "store"))
    assert code in (0, 2), error


def test_nothing_is_said_of_a_store_as_it_was_written(
    copied_run: Path, opd_stream: Command
) -> None:
    code, said, _ = opd_stream("cache", "verify", str(copied_run / "store"))
    assert (code, said) == (0, f"everything in {copied_run / 'store'} is what was written\n")


def test_repair_goes_on_after_what_it_cannot_take_out(
    copied_run: Path, opd_stream: Command
) -> None:
    store = copied_run / "store"
    replaced(first(store, "policies/*/manifest.json")).mkdir()
    replaced(first(store, "rollouts/*/units/00000.json")).mkdir()
    scores = first(store, "scores/*")
    replaced(first(scores, "units/00000-*.arrow")).symlink_to("/etc/hostname")
    rewrite(scores / "units" / "00001.json", file="../../../../etc/hostname")
    code, said, _ = opd_stream("cache", "verify", "--repair", str(store))
    left = [line for line in said.splitlines() if line.startswith("left: ")]
    assert code == 1
    assert [line.count("is no file") for line in left] == [1, 1]
    assert not list(scores.glob("units/00000*"))  # the link went, not what it leads to
    assert Path("/etc/hostname").exists()
    assert {each.name.partition("/")[0] for each in damages(Store(store))} == {
        "policies",
        "rollouts",
    }


def test_scores_of_other_rollouts_are_neither_exported_nor_corrected(copied_run: Path) -> None:
    store = Store(copied_run / "store")
    scores = store.by_fingerprint("scores", sampled_again(store.root).partition("/")[2])
    store.by_fingerprint("rollouts", scores.recipe.inputs["rollouts"]).finish()
    with pytest.raises(DamagedUnit, match="it scores other bytes than its rollouts unit"):
        export_scores(store, scores, copied_run / "out", form="parquet")
    with pytest.raises(DamagedUnit, match="it scores other bytes than its rollouts unit"):
        make_residual(store, scores, StyleSettings())
    assert not (copied_run / "out").exists()


def test_a_policy_beside_files_that_a_loader_may_read_is_not_loaded(copied_run: Path) -> None:
    store = Store(copied_run / "store")
    policy = store.policy_by_fingerprint(last_policy(store.root).name)
    session: Any = SimpleNamespace(store=store, checked=set())
    model = checkpoint_of(policy)
    check_loaded(session, model)
    (model.folder / "adapter_config.json").write_text("{}")
    session.checked.clear()
    with pytest.raises(UserError, match=r"adapter_config\.json was not published with policies/"):
        check_loaded(session, model)


def test_gc_refuses_a_store_that_lost_what_says_what_is_kept(copied_run: Path) -> None:
    store = Store(copied_run / "store")
    shutil.move(store.root / "runs", copied_run / "runs")
    with pytest.raises(UserError, match="has no record of one, so that everything would go"):
        garbage(store, grace_seconds=0)
    shutil.move(copied_run / "runs", store.root / "runs")
    (store.root / "scores").rename(store.root / "away")
    (store.root / "scores").symlink_to("scores")
    with pytest.raises(UserError, match="scores is no folder; expected the one that runs wrote to"):
        garbage(store, grace_seconds=0)


def test_a_damaged_mark_of_the_store_is_written_again(copied_run: Path) -> None:
    store = Store(copied_run / "store")
    (store.root / "store.json").write_text("[]")
    store.check_writable()
    assert not list(damages(store))
