"""Teachers that are served elsewhere: known by name and by what they say of a fixed text.

The first contact writes what the server says of the probe; every later one has to agree, within the
noise that was measured then. So the identity of a served teacher is the same in every run of a
store, although no two answers of a server are, and another model under the same name is refused.

    teachers/9a41….json      model, revision, tokenizer, architecture; the probe's values, the noise
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np

from opd_stream.engines.server_client import ServerOptions
from opd_stream.engines.server_engine import Probe, ServerEngine
from opd_stream.errors import UserError
from opd_stream.store.files import canonical_json, json_files, sha256
from opd_stream.store.policy import UNREAD, Identity, identify
from opd_stream.store.sealed import DamagedRecord, Sealed, load_record, publish_new_record
from opd_stream.store.store import Store

FOLDER = "teachers"
DECIMALS = 6  # of a log-probability in the record


class ServedTeacher(Sealed):
    """`teachers/ID.json`: a teacher that a server runs."""

    NAMED_BY: ClassVar[int] = 2
    format_version: Literal[1] = 1
    model: str
    revision: str
    tokenizer_sha256: str
    architecture_sha256: str
    probe: tuple[tuple[float, ...], ...]  # [tokens, 1 + candidates] log-probabilities, nats
    noise: float  # largest mean |difference| of two answers to the probe, nats

    @property
    def weights_sha256(self) -> str:
        """What stands for the digest of the weights in the identity."""
        named = {"served": self.model, "revision": self.revision, "probe": self.probe}
        return sha256(canonical_json(named))

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the teacher, as recipes name it."""
        return Identity(
            weights_sha256=self.weights_sha256,
            tokenizer_sha256=self.tokenizer_sha256,
            architecture_sha256=self.architecture_sha256,
            rendering_sha256="",  # no part of it
        ).fingerprint

    @property
    def expected(self) -> Probe:
        """What the engine compares answers with."""
        return Probe(np.array(self.probe), self.noise)

    @classmethod
    def of(cls, options: ServerOptions, folder: Identity, probe: Probe) -> Self:
        """The record of a server's first answers."""
        return cls(
            model=options.model,
            revision=options.revision,
            tokenizer_sha256=folder.tokenizer_sha256,
            architecture_sha256=folder.architecture_sha256,
            probe=tuple(tuple(round(float(x), DECIMALS) for x in row) for row in probe.values),
            noise=probe.noise,
        )


def served_identity(
    store: Store,
    folder: Path,
    options: ServerOptions,
    *,
    first_contact: Callable[[ServerEngine], None] | None = None,
) -> Identity:
    """The identity of a served teacher.

    Args:
        store: has the teacher's record, or gets it.
        folder: of its config and tokenizer.
        options: the server.
        first_contact: called with the engine before the record is written, where there is none;
            None: the server is not asked, and the digest of the weights is `UNREAD`.

    Raises:
        UserError: the folder lacks a file, or the server cannot be asked.
    """
    found = served_teacher(store, folder, options)
    if found is None and first_contact is not None:
        engine = ServerEngine(folder, options)
        first_contact(engine)
        record = ServedTeacher.of(options, _of_files(store, folder), engine.probe())
        publish_new_record(_path(store, folder, options), record)
        found = served_teacher(store, folder, options)  # another run may have been faster
    digest = UNREAD if found is None else found.weights_sha256
    return identify(folder, cache=_cache(store), weights_sha256=digest)


def served_teacher(store: Store, folder: Path, options: ServerOptions) -> ServedTeacher | None:
    """The record of a teacher; None: its server was not asked yet."""
    path = _path(store, folder, options)
    return load_record(ServedTeacher, path) if path.exists() else None


def served_fingerprints(store: Store) -> Iterator[str]:
    """Fingerprints of the served teachers whose records can be read."""
    for path in json_files(store.root / FOLDER):
        with contextlib.suppress(DamagedRecord, UserError, OSError):
            yield load_record(ServedTeacher, path).fingerprint


def open_served(store: Store, folder: Path, options: ServerOptions) -> ServerEngine:
    """The engine of a teacher that the store knows; it compares the server with the record."""
    found = served_teacher(store, folder, options)
    return ServerEngine(folder, options, expected=None if found is None else found.expected)


def _path(store: Store, folder: Path, options: ServerOptions) -> Path:
    files = _of_files(store, folder)
    named = {
        "model": options.model,
        "revision": options.revision,
        "tokenizer": files.tokenizer_sha256,
        "architecture": files.architecture_sha256,
    }
    return store.root / FOLDER / f"{sha256(canonical_json(named))[:16]}.json"


def _of_files(store: Store, folder: Path) -> Identity:
    """The identity of a folder without weights."""
    return identify(folder, cache=_cache(store), weights_sha256=UNREAD)


def _cache(store: Store) -> Path | None:
    return store.digests if store.remembers else None
