"""Damage to each kind of file that a run leaves, in each way, and what becomes of it.

    python -m tests.damage 150 20000     # so many cases, from that seed on: prints the figures

A case damages one file of a copied run, reads it as every command would, runs `cache verify` and
`run`, and takes out what is still damaged (`cache verify --repair`). It ends as one of

    harmless  the file says what it said, or nothing reads it and the run wrote it again
    healed    a line named it, and the run and its store are what they were
    refused   one line and exit code 2, and nothing else happened; where a folder or a link stood
              in place of the file, moving it away is what makes the run go on
    silent    none of these, which is a bug
"""

import contextlib
import io
import json
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from opd_stream.errors import UserError
from opd_stream.outcome import read_metrics
from pipeline.cli import main
from pipeline.run_folder import RunFolder
from tests.conftest import small_config

KINDS = {
    "recipe": ("store/[!p]*/*/recipe.json", "store/prompts/*/recipe.json"),
    "recipe of a policy": ("store/policies/*/recipe.json",),
    "commit record": ("store/*/*/units/*.json",),
    "shard": ("store/*/*/units/*.arrow",),
    "manifest of units": ("store/rollouts/*/manifest.json", "store/scores/*/manifest.json"),
    "manifest of prompts": ("store/prompts/*/manifest.json",),
    "manifest of a policy": ("store/policies/*/manifest.json",),
    "manifest of an evaluation": ("store/evaluations/*/manifest.json",),
    "weights of a policy": ("store/policies/*/attempt-*/model.safetensors",),
    "optimizer": ("store/policies/*/attempt-*/optimizer/*",),
    "text of a policy": ("store/policies/*/attempt-*/*.json*",),
    "mark of the store": ("store/store.json",),
    "run record": ("store/runs/*.json",),
    "pin": ("store/pins/*.json",),
    "remembered digest": ("store/digests/*.json",),
    "config.json": ("run/config.json",),
    "run.json": ("run/run.json",),
    "plan.json": ("run/rounds/*/plan.json",),
    "report.json": ("run/rounds/*/report.json",),
    "summary.json": ("run/summary.json",),
    "metrics": ("run/metrics.*",),
}
Ends = Literal["harmless", "healed", "refused", "silent"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One file, damaged in one way."""

    kind: str
    way: str
    seed: int
    keeps_times: bool  # size may differ, the time stamps do not

    def __str__(self) -> str:
        return f"{self.kind}, {self.way}, seed {self.seed}{', old times' * self.keeps_times}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of a case."""

    case: Case
    file: str
    ends: Ends
    finder: str  # command that named it first; empty: none
    said: str


def cases(kinds: list[str], number: int, seed: int = 0) -> Iterator[Case]:
    """So many cases, each kind and way about as often."""
    pairs = [(kind, way) for kind in kinds for way in (*WAYS, *PLACES)]
    for index in range(number):
        kind, way = pairs[index % len(pairs)]
        yield Case(kind=kind, way=way, seed=seed + index, keeps_times=bool(index % 3))


def _bit(data: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(data) * 8)
    changed = bytearray(data)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


def _digit(data: bytes, chance: random.Random) -> bytes:
    """Another digit in place of one; in bytes that are no text, of any byte."""
    digits = [place for place, byte in enumerate(data) if 48 <= byte <= 57]
    place = chance.choice(digits or range(len(data)))
    changed = bytearray(data)
    changed[place] = 48 + (changed[place] - 48 + chance.randrange(1, 10)) % 10
    return bytes(changed)


def _cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.choice([len(data) // 2, len(data) - 1])]


WAYS: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "bit": _bit,
    "digit": _digit,
    "cut off": _cut,
    "empty": lambda data, chance: b"",
    "deleted": lambda data, chance: None,
    "sibling": lambda data, chance: data,  # `damage` gives the content of another file of its kind
}


PLACES: dict[str, Callable[[Path], None]] = {  # what may stand where a file was
    "folder": Path.mkdir,
    "link": lambda path: path.symlink_to(path.name),  # to itself
}


def files_of(folder: Path, kind: str) -> list[Path]:
    """The files of a kind."""
    patterns = KINDS[kind]
    return sorted(p for pattern in patterns for p in folder.glob(pattern) if p.is_file())


def damage(folder: Path, case: Case) -> Path | None:
    """Damage a file; None where there is none, or nothing would change."""
    chance = random.Random(case.seed)
    files = files_of(folder, case.kind)
    if not files:
        return None
    path = chance.choice(files)
    before, stat = path.read_bytes(), path.stat()
    others = [p for p in files if p.suffix == path.suffix and p.read_bytes() != before]
    if case.way == "sibling" and not others:
        return None
    if case.way == "deleted" and case.kind == "pin":
        return None  # that is what `unpin` does
    if case.way in PLACES:
        path.unlink()
        PLACES[case.way](path)
        return path
    source = chance.choice(others).read_bytes() if case.way == "sibling" else before
    after = WAYS[case.way](source, chance)
    if after == before:
        return None
    path.unlink()  # it may be a link
    if after is not None:
        path.write_bytes(after)
        if case.keeps_times:
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return path


def copied(source: Path, target: Path) -> Path:
    """A copy that may be damaged and run: links where files are only ever replaced."""

    def link(old: str, new: str) -> None:
        if old.endswith((".safetensors", ".arrow")):
            os.link(old, new)
        else:
            shutil.copy2(old, new)

    shutil.copytree(source, target, copy_function=link)
    return target


def said_by(*words: str) -> tuple[int, str]:
    """Exit code and all that a command says; -1: a traceback."""
    out, before = io.StringIO(), sys.argv
    sys.argv = ["opd-stream", *words]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            main()
    except SystemExit as left:
        return int(left.code or 0), out.getvalue()
    except BaseException as error:
        return -1, f"{out.getvalue()}TRACEBACK {type(error).__name__}: {error}"
    finally:
        sys.argv = before
    return 0, out.getvalue()


def content(folder: Path) -> dict[str, Any]:
    """What a run and its store say, without times and names of attempts."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or "/digests/" in name or path.suffix == ".csv":
            continue
        if path.is_relative_to(folder / "store" / "policies") and not _counts(path):
            continue
        name = "/".join(
            "attempt" if part.startswith("attempt-") else part for part in name.split("/")
        )
        name = "store/runs/ID" if name.startswith("store/runs/") else name
        try:
            if path.suffix == ".json":
                found[name] = _plain(json.loads(path.read_bytes()))
            elif path.suffix == ".jsonl":
                found[name] = [_plain(json.loads(line)) for line in path.open()]
            else:
                found[name] = sha256(path.read_bytes()).hexdigest()
        except ValueError as error:
            found[name] = str(error)
    return found


def _counts(path: Path) -> bool:
    """Whether a file of a policy is a record, or of the attempt that its manifest names."""
    attempt = next((part for part in path.parts if part.startswith("attempt-")), None)
    if attempt is None:
        return True
    manifest = path.parents[path.parts[::-1].index(attempt)] / "manifest.json"
    try:
        return json.loads(manifest.read_bytes())["folder"] == attempt
    except (OSError, ValueError, LookupError):
        return False


TIMES = ("seconds", "cpu_seconds", "audit_cpu_seconds", "judge_seconds", "wall", "other", "made_at")
NAMES = (
    "folder",
    "record",
    "final_policy",
    "files",
    "digest",
    "made_by",
    "id",
    "store",
    "tokens",
    "reused",
    "flops",
)


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if not isinstance(value, dict):
        return value
    return {k: _plain(v) for k, v in value.items() if k not in (*TIMES, *NAMES)}


def _read(folder: Path) -> str:
    """What the readers of a run's folder refuse; empty: nothing."""
    run = RunFolder(folder / "run")
    readers = (run.config, run.made_by, run.plans, run.reports, run.summary)
    for read in (*readers, lambda: list(read_metrics(run.metrics))):
        try:
            read()
        except UserError as error:
            return str(error)
    return ""


def outcome(source: Path, place: Path, case: Case, healthy: dict[str, Any]) -> Result | None:
    """Damage a copy of a run and see; None where there is nothing to damage."""
    folder = copied(source, place)
    path = damage(folder, case)
    if path is None:
        return None
    name = path.relative_to(folder).as_posix()

    def result(ends: Ends, finder: str, said: str) -> Result:
        return Result(case=case, file=name, ends=ends, finder=finder, said=said)

    store, is_in_store = str(folder / "store"), name.startswith("store/")
    words = ("run", str(folder / "small.yaml"), "--run-dir", str(folder / "run"))
    code, said = said_by("cache", "verify", store) if is_in_store else (0, "")
    if code not in (0, 1):
        return result("silent", "", f"verify: {said}")
    is_refused = not is_in_store and bool(_read(folder))
    is_named = code == 1 or "note: " in said
    finder = "verify" if is_named else "a reader" if is_refused else ""
    code, ran = said_by(*words)
    finder = finder or ("run" if "damaged" in ran or "again" in ran else "")
    is_refused = code == 2 and "TRACEBACK" not in ran
    if is_refused and (case.way not in PLACES or case.kind == "pin"):
        return result("refused", finder or "run", ran)
    if code != 0 and not is_refused:
        return result("silent", finder, f"run: {ran}")
    code, said = said_by("cache", "verify", store) if is_in_store else (0, "")
    if code == 1 or is_refused:
        if case.way in PLACES and (path.is_symlink() or path.is_dir()):
            path.unlink() if path.is_symlink() else path.rmdir()  # as the line said
        ran += said_by("cache", "verify", store, "--repair")[1]
        code, again = said_by(*words)
        ran += again
        if code != 0:
            return result("refused" if code == 2 else "silent", finder, ran)
        code, said = said_by("cache", "verify", store)
    now = content(folder) if code == 0 else {}
    if code != 0 or now != healthy:
        other = [key for key in {*now, *healthy} if now.get(key) != healthy.get(key)]
        return result("silent", "", f"{ran} {said} differs: {other}")
    if is_refused:
        return result("refused", finder or "run", ran)
    return result("healed" if finder else "harmless", finder, ran)


def pinned(folder: Path) -> Path:
    """A finished run with a pin, whose reports name the folders as they are."""
    policy = next((folder / "store" / "policies").iterdir())
    said_by("cache", "pin", str(folder / "store"), f"policies/{policy.name}")
    said_by("run", str(folder / "small.yaml"), "--run-dir", str(folder / "run"))
    return folder


def try_all(copy: Path, wanted: Iterator[Case]) -> Iterator[Result]:
    """The results of cases on a run, which lies there as each case begins."""
    base = copy.with_name("base")
    copy.rename(base)
    healthy = content(base)
    for case in wanted:
        found = outcome(base, copy, case, healthy)
        shutil.rmtree(copy)
        if found is not None:
            yield found


def main_cases() -> None:
    """Try cases and print the figures."""
    import tempfile

    from pipeline.run import run
    from stages.step import Silent

    root = Path(tempfile.mkdtemp())
    folder = root / "run"
    run(small_config(folder), RunFolder(folder / "run"), Silent())
    figures: Counter[tuple[str, str]] = Counter()
    number, seed, *shown = sys.argv[1:]
    for found in try_all(pinned(folder), cases(list(KINDS), int(number), int(seed))):
        figures[found.case.kind, found.ends] += 1
        if found.ends in shown:
            said = " ".join(found.said.split())[-400:]
            print(found.ends, "|", found.case, "|", found.file, "|", said, flush=True)
    for (kind, ends), number in sorted(figures.items()):
        print(f"{kind:28} {ends:10} {number}")
    shutil.rmtree(root)


if __name__ == "__main__":
    main_cases()
