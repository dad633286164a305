"""Policies: Hugging Face folders whose identity is what they compute, not where they lie.

The identity of a checkpoint is the digest of its weights, its architecture and the meaning of its
tokenizer. A trained policy is an artifact like any other: an attempt's folder is filled first, and
the manifest that names the winning attempt is published last.

    policies/77c0…/manifest.json           recipe, identity, outcome of the training
    policies/77c0…/attempt-5b…/            config.json, model.safetensors, tokenizer, optimizer/

What only the next round's training reads (`STATE`) may be dropped later: the manifest then says so
before a file goes, so that a policy without its state is not taken for a damaged one.
"""

import contextlib
import math
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from opd_stream.errors import UserError
from opd_stream.outcome import TrainOutcome
from opd_stream.section import is_list, is_object, later
from opd_stream.store.files import (
    canonical_json,
    check_there,
    checkpoint_json,
    indexed_files,
    inside,
    is_remote,
    is_there,
    publish,
    real,
    remove_file,
    remove_tree,
    sha256,
    sha256_file,
    sync_tree,
    upload,
    verified_bytes,
)
from opd_stream.store.recipe import Recipe, RecipeRecord, mend_recipe
from opd_stream.store.sealed import (
    DamagedRecord,
    Sealed,
    load_record,
    publish_new_record,
    publish_record,
)
from opd_stream.store.tokenizer_folder import (
    OLDER_TOKENIZERS,
    TOKENIZER,
    library_versions,
    read_settings,
    template_files,
    tokenizer_digest,
    tokenizer_files,
)

RENDERING = (
    *("chat_template", "bos_token", "eos_token", "add_bos_token", "add_eos_token"),
    *("add_prefix_space", "split_special_tokens"),
)
OPTIMIZER = "optimizer"  # folder of the optimizer's moments
EXACT = "exact"  # folder of the weights in float32, where they are published in fewer bits
ADAPTER = "adapter"  # folder of the LoRA adapter whose merged weights the policy has
BASE = "extrapolation"  # folder of the point that the next extrapolation starts from
STATE = (OPTIMIZER, EXACT, BASE)  # what only the next round's training reads
METRICS = "metrics.jsonl"
LOADED = (".safetensors", ".json", ".jinja", ".model", ".py", "vocab.txt", "merges.txt")
UNREAD = "unread"  # digest of weights that were not read
VOLATILE_CONFIG = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")


Reads = Callable[[Path], str]  # digest of a file's bytes, or of what a folder's tokenizer means


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a checkpoint is.

    Example:
        >>> Identity(weights_sha256="9a41…", tokenizer_sha256="0c77…", architecture_sha256="f2…",
        ...          rendering_sha256="5d…")
    """

    weights_sha256: str
    tokenizer_sha256: str
    architecture_sha256: str
    rendering_sha256: str  # chat templates and special tokens: how a prompt becomes ids

    @property
    def fingerprint(self) -> str:
        """One digest of the model itself: how prompts are rendered is no part of it."""
        model = {k: v for k, v in asdict(self).items() if k != "rendering_sha256"}
        return sha256(canonical_json(model))


def identify(
    folder: Path, *, cache: Path | None = None, weights_sha256: str | None = None
) -> Identity:
    """Digest a checkpoint folder; `cache` remembers digests of files that did not change.

    With `weights_sha256` the weights lie elsewhere: that stands for them, and the folder need not
    have any.

    Raises:
        UserError: the folder is no checkpoint (says what is missing).
    """
    return _identity(
        folder, lambda path, reads: _digest_file(path, cache, reads), weights_sha256=weights_sha256
    )


def known_identity(folder: Path, *, cache: Path, most_bytes: int) -> Identity:
    """As `identify`, but nothing is written, and no more than `most_bytes` of weights are read.

    Where that is not enough the digest of the weights is `UNREAD`, with which no recipe agrees.

    Raises:
        UserError: the folder is no checkpoint (says what is missing).
    """
    weights = _weight_files(folder)
    new = [path for path in weights if not _read_digest(_remembered(path, cache, sha256_file))]
    too_much = sum(path.stat().st_size for path in new) > most_bytes

    def digest(path: Path, reads: Reads) -> str:
        if path in new and too_much:
            return UNREAD
        return _read_digest(_remembered(path, cache, reads)) or reads(path)

    identity = _identity(folder, digest)
    return replace(identity, weights_sha256=UNREAD) if too_much else identity


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors of a folder.

    Raises:
        UserError: one is no file.
    """
    found = sorted(folder.glob("*.safetensors"))
    for path in found:
        if not path.is_file():
            what = "a link to a file that is not there" if path.is_symlink() else "no file"
            raise UserError(f"{path} is {what}; copy the checkpoint again, with its files")
    return found


def known_tokenizer(folder: Path, *, cache: Path) -> str:
    """`tokenizer_sha256` of a folder's identity; nothing is written, and a known one is not read.

    Raises:
        UserError: it is no tokenizer that the libraries read.
    """
    return _read_digest(_remembered(folder, cache, tokenizer_digest)) or tokenizer_digest(folder)


def _identity(
    folder: Path, digest: Callable[[Path, Reads], str], *, weights_sha256: str | None = None
) -> Identity:
    weights = _weight_files(folder)
    has_tokenizer = any((folder / name).exists() for name in (TOKENIZER, *OLDER_TOKENIZERS))
    missing = [
        what
        for what, there in (
            ("config.json", (folder / "config.json").exists()),
            ("*.safetensors", bool(weights) or weights_sha256 is not None),
            (TOKENIZER, has_tokenizer),
        )
        if not there
    ]
    if missing:
        if (folder / "adapter_config.json").is_file():
            raise UserError(
                f"{folder} is an adapter; expected whole weights; merge it into its base with "
                "peft's merge_and_unload(), and save both model and tokenizer in a folder"
            )
        found = "no " + ", no ".join(missing)
        if not folder.is_dir():
            found = "a file" if folder.exists() else "nothing: it does not exist"
        raise UserError(
            f"{folder} is no checkpoint: found {found}; expected a Hugging Face folder with "
            "config.json, safetensors and a tokenizer; check the path"
        )
    indexed_files(folder)  # leads nowhere else
    rendering = _rendering(folder)
    read = checkpoint_json(folder / "config.json")
    config = _finite({k: v for k, v in read.items() if k not in VOLATILE_CONFIG})
    return Identity(
        weights_sha256=weights_sha256
        or _digest_files(weights, lambda path: digest(path, sha256_file)),
        tokenizer_sha256=digest(folder, tokenizer_digest),
        architecture_sha256=sha256(canonical_json(config)),
        rendering_sha256=rendering,
    )


def _finite(value: Any) -> Any:
    """Settings with text in place of infinities, which some configs hold and JSON has not."""
    if is_object(value):
        return {name: _finite(part) for name, part in value.items()}
    if is_list(value):
        return [_finite(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _rendering(folder: Path) -> str:
    settings = read_settings(folder)
    found: dict[str, Any] = {name: settings.get(name) or None for name in RENDERING}
    for file in template_files(folder):
        try:
            found[file.relative_to(folder).as_posix()] = file.read_text(encoding="utf-8")
        except ValueError as error:
            raise UserError(f"{file} is not UTF-8 text; copy the checkpoint again") from error
    return sha256(canonical_json(found))


class DamagedPolicy(UserError):
    """A published file of a policy that is missing or not the published one."""

    def __init__(self, policy: "PolicyArtifact", reason: str) -> None:
        super().__init__(
            f"{policy.name} is damaged in the store ({reason}); run `train` of its round again, or "
            "the whole run: it is trained again"
        )
        self.policy, self.reason = policy, reason


class FileDigest(Sealed):
    """Of a file that did not change since, as far as its size and time say: for listings."""

    NAMED_BY: ClassVar[int] = 2
    file: str
    sha256: str


class PolicyManifest(RecipeRecord):
    """`manifest.json` of a policy: the attempt that counts, its identity and its training."""

    folder: str  # of the attempt
    identity: str  # fingerprint of the four digests
    weights_sha256: str
    tokenizer_sha256: str
    architecture_sha256: str
    rendering_sha256: str
    files: dict[str, str]  # name in the folder -> SHA-256
    dropped: dict[str, str] = later(default={})  # the same of training state that went on purpose
    outcome: TrainOutcome

    @property
    def checkpoint_identity(self) -> Identity:
        """What the published checkpoint is."""
        return Identity(
            weights_sha256=self.weights_sha256,
            tokenizer_sha256=self.tokenizer_sha256,
            architecture_sha256=self.architecture_sha256,
            rendering_sha256=self.rendering_sha256,
        )


# Files of a policy: none; its metrics; all but weights; what an engine loads; that and what only
# training reads.
Part = Literal["name", "metrics", "texts", "model", "training"]


class PolicyArtifact:
    """The policy that a train stage makes.

    Libraries read and write checkpoints as local folders. Where the store is an object store,
    `local` holds the attempt until it is uploaded, and verified copies of published files.
    """

    def __init__(self, root: Path, recipe: Recipe, *, local: Path) -> None:
        self.recipe = recipe
        self.fingerprint = recipe.fingerprint
        self.name = f"{recipe.kind}/{self.fingerprint[:16]}"
        self.artifact_folder = root / self.name
        self._local_folder = local / self.name

    def is_complete(self) -> bool:
        """Whether the manifest is there."""
        return is_there(self.artifact_folder / "manifest.json")

    def manifest(self) -> PolicyManifest:
        """Recipe, identity, files and the outcome of the training."""
        return load_record(PolicyManifest, self.artifact_folder / "manifest.json")

    def folder(self, part: Part = "model") -> Path:
        """The Hugging Face folder of the published attempt, on this machine.

        Args:
            part: which of its files have to be there; the others of a remote store may not be.

        Raises:
            DamagedPolicy: a file in an object store is not the published one.
        """
        manifest = self.manifest()
        folder = inside(self._local_folder, manifest.folder)
        if is_remote(self.artifact_folder):
            source = self.artifact_folder / manifest.folder
            for name, expected in manifest.files.items():
                if _is_of(part, name) and not inside(folder, name).exists():
                    self._fetch(source, folder, name, expected)
        return folder

    def _fetch(self, source: Path, folder: Path, name: str, expected: str) -> None:
        try:
            data = verified_bytes(inside(source, name), expected)
        except UserError:
            raise
        except ValueError as error:
            raise DamagedPolicy(self, f"{name}: {error}") from error
        publish(inside(folder, name), data)

    def metrics(self) -> bytes | None:
        """The lines of metrics.jsonl of its training; None: they are not what was published."""
        manifest = self.manifest()
        try:
            data = inside(self.folder("metrics"), METRICS).read_bytes()
        except (FileNotFoundError, DamagedPolicy):
            return None
        return data if sha256(data) == manifest.files.get(METRICS) else None

    def new_attempt(self) -> Path:
        """An empty local folder to fill before `publish`."""
        check_there(self.artifact_folder.parent.parent)
        record = RecipeRecord.of(self.recipe)
        publish_new_record(self.artifact_folder / "recipe.json", record)
        folder = self._local_folder / f"attempt-{uuid.uuid4().hex[:12]}"
        folder.mkdir(parents=True)
        return folder

    def publish(self, attempt: Path, outcome: TrainOutcome) -> None:
        """Make an attempt the policy; an earlier attempt of the same recipe stays, ours goes."""
        identity = identify(attempt)
        sync_tree(attempt)
        files = sorted(path for path in attempt.rglob("*") if path.is_file())
        manifest = PolicyManifest.of(
            self.recipe,
            folder=attempt.name,
            identity=identity.fingerprint,
            **asdict(identity),
            files={path.relative_to(attempt).as_posix(): sha256_file(path) for path in files},
            outcome=outcome,
        )
        if is_remote(self.artifact_folder):
            upload(attempt, self.artifact_folder / attempt.name)
        if not publish_new_record(self.artifact_folder / "manifest.json", manifest):
            self._take_state(attempt, manifest.files)
            shutil.rmtree(attempt)
            if is_remote(self.artifact_folder):
                remove_tree(self.artifact_folder / attempt.name)

    def has_state(self) -> bool:
        """Whether training can go on from the policy: its state was not dropped."""
        return not self.manifest().dropped

    def holds_state(self) -> bool:
        """Whether files of its state are there, be it that a kill left them."""
        manifest = self.manifest()
        if any(map(_is_state, manifest.files)):
            return True
        folder = inside(self.artifact_folder, manifest.folder)
        return any((folder / part).exists() for part in STATE)

    def drop_state(self) -> None:
        """Remove what only the next round's training reads; may be called again after a kill."""
        manifest = self.manifest()
        state = {name: digest for name, digest in manifest.files.items() if _is_state(name)}
        if state:
            rest = {name: d for name, d in manifest.files.items() if name not in state}
            changed = {"files": rest, "dropped": {**manifest.dropped, **state}}
            self._replace_manifest(manifest.model_copy(update=changed))
        for part in STATE:
            shutil.rmtree(inside(self._local_folder, manifest.folder) / part, ignore_errors=True)
            if is_remote(self.artifact_folder):
                remove_tree(inside(self.artifact_folder, manifest.folder) / part)

    def _take_state(self, attempt: Path, files: dict[str, str]) -> None:
        """Give the published attempt back the state that it lost, from another one."""
        manifest = self.manifest()
        if not manifest.dropped:
            return
        state = {name: digest for name, digest in files.items() if _is_state(name)}
        folder = inside(self._local_folder, manifest.folder)
        for part in {name.partition("/")[0] for name in state}:
            shutil.rmtree(folder / part, ignore_errors=True)
            (attempt / part).rename(folder / part)
            if is_remote(self.artifact_folder):
                upload(folder / part, self.artifact_folder / manifest.folder / part)
        changed = {"files": {**manifest.files, **state}, "dropped": {}}
        self._replace_manifest(manifest.model_copy(update=changed))

    def _replace_manifest(self, manifest: PolicyManifest) -> None:
        is_checked = manifest.digest is not None
        publish_record(self.artifact_folder / "manifest.json", manifest, is_checked=is_checked)

    def mend(self) -> None:
        """Write the recipe again where it is damaged, with a line."""
        mend_recipe(self.artifact_folder, RecipeRecord.of(self.recipe))

    def stored_damages(self) -> Iterator[str]:
        """What is wrong with files in the store; every byte is read."""
        manifest = self.manifest()
        folder = inside(self.artifact_folder, manifest.folder)
        for name, expected in manifest.files.items():
            path = inside(folder, name)
            try:
                if is_remote(path):
                    verified_bytes(path, expected)
                elif sha256_file(path) != expected:
                    yield f"{name} is not the published file"
            except FileNotFoundError:
                yield f"{name} is missing"
            except UserError:
                raise
            except (ValueError, OSError) as error:
                yield f"{name}: {error}"

    def check_alone(self) -> None:
        """Refuse files beside the published ones, which a loader might read in place of them.

        Raises:
            UserError: names one.
        """
        manifest = self.manifest()
        folder = inside(self._local_folder, manifest.folder)
        for name in unpublished_files(folder, manifest):
            raise UserError(
                f"{folder / name} was not published with {self.name}, and may change what is "
                "loaded; expected the published files alone; move it away"
            )

    def damage(self, *, cache: Path | None, part: Part = "training") -> str | None:
        """What is wrong with the published files of a part, or None; `cache` as in `identify`.

        Of a remote store what lies here is a copy: a damaged one is fetched again.
        """
        try:
            manifest = self.manifest()
        except DamagedRecord as damaged:
            return f"its manifest.json {damaged.reason}"
        folder = self.folder("name")
        files = {name: sha for name, sha in manifest.files.items() if _is_of(part, name)}
        if is_remote(self.artifact_folder):
            for name, expected in files.items():
                copy = inside(folder, name)
                if copy.is_file() and _digest_file(copy, cache) != expected:
                    copy.unlink()
            try:
                self.folder(part)
            except DamagedPolicy as damaged:
                return damaged.reason
        for name, expected in files.items():
            path = inside(folder, name)
            if not path.is_file():
                return f"{name} is missing"
            if _digest_file(path, cache) != expected:
                return f"{name} is not the published file"
        return None

    def invalidate(self) -> None:
        """Take the policy out of the store, so that the next train stage makes it again."""
        folders = list(self._local_folder.glob("attempt-*"))
        remove_file(self.artifact_folder / "manifest.json")
        if is_remote(self.artifact_folder):
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)


def unpublished_files(folder: Path, manifest: PolicyManifest) -> list[str]:
    """Names of files that a loader of the folder may read and the manifest does not have."""
    known = {*manifest.files, *manifest.dropped}
    names = {path.name for path in folder.glob("*") if path.name.endswith(LOADED)}
    return sorted(names - known)


def _is_of(part: Part, name: str) -> bool:
    """Whether a file, by its name in the folder, is of a part."""
    if part in ("name", "training"):
        return part == "training"
    if part == "metrics":
        return name == METRICS
    return "/" not in name and (part == "model" or not name.endswith(".safetensors"))


def _is_state(name: str) -> bool:
    """Whether a file, by its name in the folder, is of the state of training."""
    folder, slash, _ = name.partition("/")
    return bool(slash) and folder in STATE


def _digest_files(paths: list[Path], digest: Callable[[Path], str]) -> str:
    """One digest of several files, each by name and content."""
    return sha256(canonical_json([[path.name, digest(path)] for path in paths]))


def _digest_file(path: Path, cache: Path | None, reads: Reads = sha256_file) -> str:
    if cache is None:
        return reads(path)
    remembered = _remembered(path, cache, reads)
    known = _read_digest(remembered)
    if known is None:
        known = reads(path)
        with contextlib.suppress(UserError):  # a store that is only read remembers nothing
            publish_record(remembered, FileDigest(file=path.name, sha256=known))
    return known


def _read_digest(remembered: Path) -> str | None:
    """A remembered digest; None: there is none that says what was remembered."""
    try:
        record = load_record(FileDigest, remembered)
    except (FileNotFoundError, UserError):
        return None
    return None if record.digest is None else record.sha256


def _remembered(path: Path, cache: Path, reads: Reads) -> Path:
    """Where a digest is kept, for as long as no file that it is of changes."""
    files = tokenizer_files(path) if path.is_dir() else [path]
    stats = [(str(real(file)), file.stat()) for file in files]
    key: list[Any] = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    key += library_versions() if path.is_dir() else ()
    return cache / f"{sha256(canonical_json([reads.__name__, *key]))[:32]}.json"
