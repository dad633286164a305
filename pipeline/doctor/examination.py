"""All checks in order: what is cheap first, models last, each as far as what it needs is there."""

from opd_stream.config import Config
from opd_stream.errors import UserError
from opd_stream.store.artifact import DamagedUnit
from pipeline.doctor import inputs, machine, served, trial
from pipeline.doctor.findings import Finding, NotChecked, Report, Screen
from pipeline.doctor.subject import Subject
from pipeline.setup import check_routes

CHECKS = (
    machine.packages,
    machine.store,
    inputs.weights,
    inputs.terminators,
    inputs.templates,
    inputs.prompts,
    inputs.answers,
    inputs.environment,
    inputs.context,
    inputs.tokenizers,
    machine.devices,
    machine.precision,
    machine.memory,
    inputs.setup,
    machine.disk,
    served.served,
    trial.sampler,
    trial.teacher_as_student,
    trial.distance,
    trial.coverage,
    trial.cached_scores,
)
FIRST = ("packages", "store", "weights", "memory", "setup")  # without errors, or no model is loaded


def examine(config: Config, *, quick: bool, screen: Screen | None = None) -> Report:
    """Look at everything a run of this config would need; `quick` loads no model.

    Of several teachers it looks at each as if it were the only one, and then at all together.
    """
    if not config.teachers:
        return _examine(config, quick=quick, screen=screen)
    names = [*config.teachers]
    reports = [_examine(config.with_teacher(name), quick=quick) for name in names]
    told = [{finding.found for finding in report.findings} for report in reports]
    whole = Report()
    for name, report in zip(names, reports, strict=True):
        whole.not_checked.update(report.not_checked)
        for finding in report.findings:
            if not all(finding.found in each for each in told):
                said = f"teachers.{name}: {finding.found}"
                finding = finding.model_copy(update={"found": said})
            elif report is not reports[0]:
                continue
            whole.findings.append(finding)
    try:
        _check_routes(Subject(config, quick))
    except UserError as error:
        whole.findings.append(inputs.setup.refused(error))
    if screen is not None:
        for finding in whole.findings:
            screen.found(finding)
    return whole


def _check_routes(subject: Subject) -> None:
    """Refuse what several teachers cannot be together, and prompts that go to none."""
    config, _ = subject.config, subject.setup
    students = subject.table("prompts")
    each = [Subject(config.with_teacher(name), subject.quick) for name in config.teachers]
    check_routes(config, students, [one.teacher_table() for one in each])


def _examine(config: Config, *, quick: bool, screen: Screen | None = None) -> Report:
    """The same with one teacher."""
    subject, report = Subject(config, quick), Report()

    def add(finding: Finding) -> None:
        if all(other.found != finding.found for other in report.findings):
            report.findings.append(finding)
            if screen is not None:
                screen.found(finding)

    for check in CHECKS:
        if screen is not None:
            screen.begin(check.name)
        try:
            if check.loads_models:
                _check_may_load(subject, report)
            for finding in check.look(subject):
                add(finding)
        except NotChecked as reason:
            report.not_checked[check.name] = str(reason)
        except (UserError, DamagedUnit) as error:
            add(check.refused(error))
        except (RuntimeError, MemoryError) as error:
            if not check.loads_models:
                raise
            said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            add(check.error(said, "correct the cause: a run takes the same way"))
    return report


def _check_may_load(subject: Subject, report: Report) -> None:
    """Raises NotChecked where models should not, or cannot, be loaded."""
    if subject.quick:
        raise NotChecked("--quick loads no model")
    for name in FIRST:
        if report.count("error", name):
            raise NotChecked(f"{name} has errors")
        if name in report.not_checked:
            raise NotChecked(f"{name} was not checked")
    if "fake" in [model.engine for model in subject.engines.values()]:
        raise NotChecked("engine fake computes no model")
    device = machine.this_machine()
    for role, parameters in subject.sizes.items():
        if not device.holds_float32(parameters):
            raise NotChecked(f"the {role} does not fit here in float32, in which it is compared")
