"""Held-out problems, how often each is answered, and what says that an answer is right."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from opd_stream.prompts import DatasetPrompts, EmbeddedPrompts, JsonlPrompts, Prompts
from opd_stream.record import is_object
from opd_stream.section import Section
from opd_stream.tasks.judges import AnyJudge

BenchmarkFormat = Literal["gsm8k", "math500", "amc23", "aime"]

# Fields as the data sets are published, and the usual judge.
_FORMATS: dict[str, tuple[str, str, str]] = {
    "gsm8k": ("question", "answer", "final_number"),
    "math500": ("problem", "answer", "math"),
    "amc23": ("question", "answer", "math"),
    "aime": ("problem", "answer", "math"),
}
_NAME = re.compile(r"[A-Za-z0-9_-]+")


class Benchmark(Section):
    """One named set of problems; what is left out is as in the evaluation."""

    format: BenchmarkFormat | None = Field(
        default=None,
        description="fills in prompt_field, answer_field and judge as the data set is published",
    )
    prompts: Prompts
    judge: AnyJudge
    samples_per_prompt: int | None = Field(default=None, ge=1, description="answers a problem")
    max_new_tokens: int | None = Field(default=None, ge=1, description="of an answer")
    temperature: float | None = Field(default=None, ge=0, description="0 is greedy")
    seed: int | None = Field(default=None, description="of the sampling")

    @model_validator(mode="before")
    @classmethod
    def _published(cls, raw: Any) -> Any:
        """What the format says stands below what the config says."""
        known = _FORMATS.get(str(raw.get("format"))) if is_object(raw) else None
        if known is None or not is_object(raw.get("prompts")):
            return raw
        prompt_field, answer_field, kind = known
        fields = {"prompt_field": prompt_field, "answer_field": answer_field}
        return {"judge": {"kind": kind}, **raw, "prompts": {**fields, **raw["prompts"]}}


class Evaluation(Section):
    """Sampling on held-out prompts, judged by program: one set of problems, or several by name."""

    prompts: Prompts | None = Field(default=None, description="of a single set of problems")
    judge: AnyJudge | None = Field(default=None, description="of a single set of problems")
    benchmarks: dict[str, Benchmark] | None = Field(
        default=None, description="or several sets, each under its name"
    )
    samples_per_prompt: int = Field(default=8, ge=1, description="for pass@k up to this k")
    pass_at: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        default=None, min_length=1, description="k of pass@k; null: 1, 2, 4, ... 64"
    )
    max_new_tokens: int = Field(ge=1, description="never shortened by the training window")
    temperature: float = Field(default=1.0, ge=0, description="0 is greedy")
    seed: int = Field(default=0, description="of the sampling")
    every_rounds: int | None = Field(
        default=None,
        ge=1,
        description="also between rounds; default: before the first and after the last",
    )

    def conflicts(self) -> Iterator[str]:
        """What fields say against each other, one line each."""
        has_one = self.prompts is not None or self.judge is not None
        if self.benchmarks is None:
            missing = [name for name in ("prompts", "judge") if getattr(self, name) is None]
            if missing:
                yield (
                    f"'evaluation.{missing[0]}' is missing; expected prompts and judge, or "
                    "benchmarks with names; add it"
                )
                return
        elif not self.benchmarks or has_one:
            found = "is empty" if not self.benchmarks else "stands beside prompts or judge"
            yield (
                f"evaluation.benchmarks {found}; expected named entries, each with prompts and "
                "judge of its own, or only evaluation.prompts and evaluation.judge; keep one form"
            )
        largest = max(self.pass_at or (1,))
        for name, part in self.parts().items():
            if not _NAME.fullmatch(name):
                yield (
                    f"evaluation.benchmarks has the name {name!r}; expected letters, digits, - "
                    "and _; rename it"
                )
            if largest > part.samples_per_prompt:
                yield (
                    f"evaluation.pass_at asks for pass@{largest} but {name} has "
                    f"{part.samples_per_prompt} samples a problem; raise samples_per_prompt or "
                    "lower pass_at"
                )

    def parts(self) -> dict[str, "Evaluation"]:
        """Name -> one set of problems with every setting it is measured by."""
        if self.benchmarks is None:
            assert self.prompts is not None  # validated
            return {_source_name(self.prompts): self}
        return {
            name: self.model_copy(
                update={
                    "benchmarks": None,
                    **{
                        field: value
                        for field, value in benchmark
                        if field != "format" and value is not None
                    },
                }
            )
            for name, benchmark in self.benchmarks.items()
        }


def _source_name(source: EmbeddedPrompts | JsonlPrompts | DatasetPrompts) -> str:
    """The name of a set of problems that was given none."""
    if isinstance(source, EmbeddedPrompts):
        return source.kind
    path = Path(source.path)
    if isinstance(source, DatasetPrompts):
        path = source.data_files or path
    return re.sub(r"[^A-Za-z0-9_-]+", "-", path.name.split(".")[0]) or "evaluation"
