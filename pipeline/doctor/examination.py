"""All checks in order: what is cheap first, models last, each as far as what it needs is there."""

import os
from collections.abc import Callable
from typing import Any

from opd_stream.config import Config
from opd_stream.errors import UserError
from opd_stream.store.artifact import DamagedUnit
from opd_stream.store.files import is_remote
from opd_stream.store.policy import identify
from opd_stream.store.store import Store
from pipeline.doctor import cached, devices, models, packages, places, prompts, trial
from pipeline.doctor.findings import Check, Finding, Report, Unwatched, Watcher
from pipeline.setup import Setup, open_setup
from pipeline.walk import walk
from stages.checkpoints import Checkpoint, open_checkpoint

SETUP = Check(
    name="setup",
    why="a run refuses what cannot work before it begins, and says the rest as a warning",
)
Checks = Callable[..., list[Finding]]
HEAVY = (trial.SELF, trial.SAMPLER, cached.CACHED)


def examine(config: Config, *, quick: bool, watcher: Watcher | None = None) -> Report:
    """Look at everything a run of this config would need here.

    Args:
        config: the run.
        quick: load no model, connect to no cluster.
        watcher: is told of each check when it begins and of each finding when it is known.
    """
    report = Report(watcher=watcher or Unwatched())
    _add(report, packages.PACKAGES, packages.packages, config)
    report.watcher.begin(places.STORE)
    store, found = places.store(config)
    report.add(*found)
    report.watcher.begin(models.WEIGHTS)
    opened = _open_models(report, config, store)
    _add(report, models.WEIGHTS, models.weights, opened)
    tables: prompts.Tables = {}
    if "student" in opened:
        _add(report, models.TERMINATORS, models.terminators, config, opened)
        _add(report, models.TEMPLATES, models.templates, config, opened)
        report.watcher.begin(prompts.PROMPTS)
        tables, found = prompts.read(config, opened["student"])
        for each in found:
            _say(report, each)
        _add(report, prompts.PROMPTS, prompts.enough, config, tables)
        _add(report, prompts.ANSWERS, prompts.answers, config, tables)
        _add(report, prompts.CONTEXT, prompts.context, config, tables, opened)
    if len(opened) == 2:
        pair = opened["student"], opened["teacher"]
        _add(report, models.TOKENIZERS, models.tokenizers, config, *pair)
    sizes = _sizes(report, opened)
    machine = _devices(report, config, sizes, quick=quick)
    setup = _setup(report, config, store)
    if store is not None and "student" in sizes:
        done = 0 if setup is None else _rounds_done(report, setup)
        _add(report, places.DISK, places.disk, config, store, sizes["student"], done)
    reason = "--quick loads no model" if quick else _why_not(report, setup, machine, sizes)
    _models(report, setup, tables, opened, reason)
    return report


def _open_models(report: Report, config: Config, store: Store | None) -> models.Models:
    """The checkpoints that are there."""
    paths = {"student": config.student.path}
    if config.teacher is not None and (config.replay is None or config.teacher.path.is_dir()):
        paths["teacher"] = config.teacher.path
    opened: models.Models = {}
    for role, path in paths.items():
        try:
            if store is None:
                opened[role] = Checkpoint(folder=path.resolve(), identity=identify(path))
            else:
                opened[role] = open_checkpoint(store, path)
        except UserError as error:
            report.add(models.WEIGHTS.refused(error))
    return opened


def _sizes(report: Report, opened: models.Models) -> devices.Sizes:
    """Parameters of each role whose weights are whole."""
    if any(f.check == "weights" and f.level == "error" for f in report.findings):
        return {}
    return {role: models.parameters(model.folder) for role, model in opened.items()}


def _devices(
    report: Report, config: Config, sizes: devices.Sizes, *, quick: bool
) -> devices.Machine | None:
    """The machine that is asked; None where nothing can tell."""
    if any(f.check == "packages" and "needs torch," in f.found for f in report.findings):
        report.not_checked["devices"] = "torch is not installed"
        return None
    report.watcher.begin(devices.DEVICES)
    machine = devices.this_machine()
    address = os.environ.get("RAY_ADDRESS")
    if config.executor == "local" or not address:
        nodes = devices.local_nodes(config, machine)
        _add(report, devices.DEVICES, devices.pools, config, nodes, "this machine")
    elif quick:
        report.not_checked["pools"] = f"--quick does not ask the cluster at {address}"
    else:
        _add(report, devices.DEVICES, _cluster_pools, config, address)
    _add(report, devices.DEVICES, devices.trainer, config, machine)
    _add(report, devices.PRECISION, devices.precision, config, machine)
    if "student" in sizes:
        _add(report, devices.MEMORY, devices.memory, config, machine, sizes)
    return machine


def _cluster_pools(config: Config, address: str) -> list[Finding]:
    try:
        nodes = devices.cluster_nodes(config)
    except ConnectionError as error:
        raise UserError(
            f"no Ray cluster answers at RAY_ADDRESS {address} ({' '.join(str(error).split())}); "
            "start it, or unset RAY_ADDRESS to run on this machine"
        ) from error
    return devices.pools(config, nodes, f"the cluster at {address}")


def _setup(report: Report, config: Config, store: Store | None) -> Setup | None:
    """What every command of a run opens first; what it refuses may be known already."""
    if store is None:
        return None
    report.watcher.begin(SETUP)
    try:
        setup = open_setup(config, make=False)
    except UserError as error:
        _say(report, SETUP.refused(error))
        return None
    report.add(*(SETUP.warning(*_halves(line)) for line in setup.warnings))
    return setup


def _halves(line: str) -> tuple[str, str]:
    found, _, todo = line.rpartition("; ")
    return found, todo


def _rounds_done(report: Report, setup: Setup) -> int:
    """Rounds whose policy is in the store; a replay's scores have to be there."""
    try:
        if is_remote(setup.store.root):  # each further round would fetch the policy before it
            return int(next(walk(setup)).policy.is_complete())
        return sum(here.policy.is_complete() for here in walk(setup))
    except UserError as error:
        _say(report, SETUP.refused(error))
        return 0


def _models(
    report: Report,
    setup: Setup | None,
    tables: prompts.Tables,
    opened: models.Models,
    reason: str | None,
) -> None:
    """The checks that load models, unless there is a reason not to."""
    if reason is not None or setup is None:
        report.not_checked |= {check.name: str(reason) for check in HEAVY}
        return
    table, teacher = tables.get("prompts"), opened.get("teacher")
    if setup.config.replay is not None or table is None:
        reason = "there are no prompts" if table is None else "a replay samples and scores nothing"
        report.not_checked |= {check.name: reason for check in (trial.SELF, trial.SAMPLER)}
    else:
        _add(report, trial.SAMPLER, trial.sampler, setup, table)
        if setup.crossing is None:
            _add(report, trial.SELF, trial.teacher_as_student, setup, table, teacher)
    if setup.crossing is not None:
        crossed = "the teacher reads the texts in another tokenizer"
        report.not_checked |= {check.name: crossed for check in (trial.SELF, cached.CACHED)}
        return
    if teacher is None:
        report.not_checked[cached.CACHED.name] = "the config names no teacher"
    else:
        _add(report, cached.CACHED, cached.cached_scores, setup, teacher)


def _why_not(
    report: Report, setup: Setup | None, machine: devices.Machine | None, sizes: devices.Sizes
) -> str | None:
    """Why no model is loaded, if so."""
    if setup is None or machine is None or not sizes:
        return "what comes before has errors"
    if any(f.check == "memory" and f.level == "error" for f in report.findings):
        return "the models do not fit here"
    large = [role for role, count in sizes.items() if not devices.fits_in_float32(machine, count)]
    if large:
        return f"the {large[0]} does not fit here in float32, in which it is compared"
    engines = [setup.config.student.engine]
    engines += [] if setup.config.teacher is None else [setup.config.teacher.engine]
    return "engine fake computes no model" if "fake" in engines else None


def _add(report: Report, check: Check, function: Checks, *arguments: Any) -> None:
    """The findings of a check; what it refuses is one, and so is what breaks while a model runs."""
    report.watcher.begin(check)
    try:
        report.add(*function(*arguments))
    except (UserError, DamagedUnit) as error:
        _say(report, check.refused(error))
    except (RuntimeError, MemoryError) as error:
        if check not in HEAVY:
            raise
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        _say(report, check.error(text, "mend the cause: a run takes the same way"))


def _say(report: Report, finding: Finding) -> None:
    """Add a finding that is not known already."""
    if all(other.found != finding.found for other in report.findings):
        report.add(finding)
