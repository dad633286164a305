"""Whether the store can be reached and written, and has room."""

import shutil
from pathlib import Path

from opd_stream.config import Config
from opd_stream.errors import UserError
from opd_stream.store.codecs import Codec
from opd_stream.store.files import is_remote
from opd_stream.store.store import Store
from pipeline.contexts import largest_window
from pipeline.doctor.findings import Check, Finding

STORE = Check(
    name="store",
    why="everything a run makes goes there; rollouts and scores that cannot be written are lost",
)
DISK = Check(
    name="disk",
    why="a full disk stops the run in the middle, and the machines wait while it is freed",
)
POLICY_BYTES = 12  # a parameter: float32 weights and two moments of AdamW
ADAPTER_BYTES = 4  # a parameter, where only adapters have moments
CHECKPOINTS = 2  # of a round in training, beside its policy


def store(config: Config) -> tuple[Store | None, list[Finding]]:
    """Open the store and write a probe; None where that is refused."""
    try:
        found = Store(config.store)
        found.check_writable()
    except UserError as error:
        return None, [STORE.refused(error)]
    return found, [STORE.ok(f"{config.store} can be written")]


def disk(config: Config, opened: Store, parameters: int, rounds_done: int) -> list[Finding]:
    """Free space where artifacts go, and where checkpoints of a round in training go."""
    policies, caches = needed_bytes(config, parameters, config.rounds - rounds_done)
    most = policies if is_remote(opened.root) else policies + caches
    findings = [_room("the store", opened.local, policies, most)]
    if rounds_done < config.rounds:
        each = parameters * (POLICY_BYTES if config.train.lora is None else ADAPTER_BYTES)
        training = CHECKPOINTS * each
        findings.append(_room("checkpoints in the run's folder", Path(), training, training))
    return findings


def needed_bytes(config: Config, parameters: int, rounds: int) -> tuple[int, int]:
    """Bytes of the policies of some rounds, and at most of their rollouts and scores."""
    each = POLICY_BYTES if config.train.lora is None else ADAPTER_BYTES
    policies = rounds * parameters * each
    if config.replay is not None:
        return policies, 0
    rows = config.rollouts.prompts_per_round * config.rollouts.samples_per_prompt
    tokens = rounds * rows * largest_window(config)
    extra = config.rollouts.extra_draws * (4 + 4 + 4)  # id and both log-probabilities
    drawn = 4 + 4  # id and the student's log-probability
    return policies, tokens * (
        drawn + extra + score_bytes(config.scores.codec, config.scores.top_k)
    )


def score_bytes(codec: Codec, top_k: int) -> int:
    """Bytes of a token's scores before compression."""
    single = 4 + 4 + 4  # drawn token, tail, a terminator
    match codec.kind:
        case "exact":
            return single + top_k * (4 + (2 if codec.dtype == "float16" else 4))
        case "compact":
            return single + 3 * top_k  # packed id and a byte
        case "sampled":
            return single + codec.draws * (4 + 1)


def _room(what: str, folder: Path, least: int, most: int) -> Finding:
    """`least` is needed for certain, `most` if every rollout fills its window."""
    free = shutil.disk_usage(_existing(folder)).free
    need = _size(least) if least == most else f"{_size(least)} to {_size(most)}"
    found = f"{what} needs about {need}; {_size(free)} free at {_existing(folder)}"
    if free < least:
        return DISK.error(found, "free space, or set store to a larger disk")
    if free < most:
        return DISK.warning(
            found, "free space, lower scores.top_k, or take scores.codec={kind: compact}"
        )
    return DISK.ok(found)


def _existing(folder: Path) -> Path:
    folder = folder.resolve()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _size(count: int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000  # pyright: ignore[reportAssignmentType]
    return f"{count:.3g} TB"
