"""Runs from Python: `import opd_stream as opd`, then `opd.run(CONFIG)` and `opd.open_run(FOLDER)`.

The command line and this module stand on the same functions, so what one begins the other goes on
with. Tables are pandas frames, of which `pyarrow.Table.from_pandas` makes Arrow.
"""

import json
import re
from collections.abc import Mapping
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd_stream.config import Config
from opd_stream.config_file import load_config, make_config, override_config
from opd_stream.errors import UserError, shortened
from opd_stream.outcome import read_metrics
from opd_stream.section import path_flaw
from pipeline.export import trained_policy
from pipeline.records import RunSummary
from pipeline.run_folder import RunFolder
from stages.step import Progress, Silent

if TYPE_CHECKING:
    from pandas import DataFrame

REPORT = "report.html"
FIGURE = "teacher_nll"  # that every cache holds, given rollouts too

_ESCAPED = re.compile("[\x7f-\xa0\u2028\u2029\ufeff\ud800-\udfff\ufffe\uffff]")  # for YAML


def run(
    config: Path | str | Mapping[str, Any] | Config,
    settings: Mapping[str, Any] | None = None,
    *,
    run_dir: Path | str | None = None,
    progress: Progress | None = None,
) -> "Run":
    """Start or resume a run, to its end.

    Args:
        config: a YAML file, the fields of one, or a `Config`.
        settings: dotted field -> value, over those of the config.
        run_dir: folder of the run; None: runs/NAME of the config's file.
        progress: told what happens; None: nothing is.

    Returns:
        The finished run.

    Raises:
        UserError: anything the user can mend, told in one line.

    Example:
        >>> opd.run("configs/quickstart.yaml", {"rounds": 2}).evaluations
    """
    from pipeline.run import run as run_rounds

    if run_dir is None and not isinstance(config, str | Path):
        raise UserError("the config is no file, which would name the run; give its folder, run_dir")
    chosen = _config(config, settings or {})
    place = Path("runs") / Path(str(config)).stem if run_dir is None else _place(run_dir)
    run_rounds(chosen, RunFolder(place), progress or Silent())
    return Run(place)


def open_run(folder: Path | str) -> "Run":
    """A run that was begun, finished or not.

    Raises:
        UserError: the folder is no run, or one of another version.
    """
    return Run(_place(folder))


def _config(config: Path | str | Mapping[str, Any] | Config, settings: Mapping[str, Any]) -> Config:
    overrides = [f"{name}={_yaml(value)}" for name, value in settings.items()]
    if isinstance(config, Config):
        return override_config(config, overrides)
    if isinstance(config, Mapping):
        return make_config(config, overrides)
    return load_config(Path(config), overrides)


def _yaml(value: Any) -> str:
    """A value in one line of YAML: JSON, whose escaped pairs of surrogates YAML does not have."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _place(folder: Path | str) -> Path:
    """The folder of a run that a call names."""
    if (flaw := path_flaw(str(folder))) is not None:
        raise UserError(f"the folder of the run is {shortened(folder)}; {flaw}; name a folder")
    return Path(folder)


class Run:
    """What a run has made so far; every table is read when it is asked for.

    Example:
        >>> run = opd.open_run("runs/quickstart")
        >>> run.rounds[["policy_drift", "tokens.teacher_scored"]]
        >>> model = run.policy()
    """

    def __init__(self, folder: Path) -> None:
        self._folder = RunFolder(folder)
        self.config  # noqa: B018 (a folder that is no run is refused here)

    @property
    def folder(self) -> Path:
        """Where its notes lie; the artifacts are in `config.store`."""
        return self._folder.path

    @cached_property
    def config(self) -> Config:
        """The resolved config."""
        return self._folder.config()

    @property
    def summary(self) -> RunSummary | None:
        """The run so far; None before its first policy was looked at."""
        return self._folder.summary()

    @property
    def is_finished(self) -> bool:
        """Whether all rounds are done and evaluated."""
        summary = self.summary
        return summary is not None and summary.finished

    @property
    def metrics(self) -> "DataFrame":
        """A row for each optimizer step, as metrics.jsonl has them."""
        return _frame([step.as_json() for _, step in read_metrics(self._folder.metrics)])

    @property
    def rounds(self) -> "DataFrame":
        """A row for each finished round; fields of its report, inner ones as `outer.inner`."""
        from pandas import json_normalize

        reports = [report.as_json() for report in self._folder.reports()]
        for report in reports:
            report.pop("evaluation", None)  # in `evaluations`
        found = json_normalize(reports)
        return found.set_index("round") if len(found) else found

    @property
    def evaluations(self) -> "DataFrame":
        """A row for each figure of each evaluated policy: its value with an interval of 95 %."""
        summary, rows = self.summary, list[dict[str, Any]]()
        for policy in () if summary is None else summary.evaluations:
            for name, benchmark in policy.benchmarks.items():
                for figure, value in benchmark.passes.items():
                    interval = benchmark.intervals.get(figure)
                    rows.append(_figure(policy.round, name, figure, value, interval))
            for name, distance in policy.distances.items():
                for text, found in distance.texts.items():
                    for figure, interval in found.intervals.items():
                        value = getattr(found, figure)
                        row = _figure(policy.round, name, f"{text}/{figure}", value, interval)
                        rows.append(row)
        return _frame(rows, columns=["policy_version", "on", "figure", "value", "low", "high"])

    def rollouts(self, round_index: int) -> "DataFrame":
        """A row for each rollout that a round trains on.

        Columns: prompt_id, sample_index, prompt and completion (text), finish_reason, tokens,
        trained_tokens, behavior_logprobs and teacher_logprobs (arrays, one value a token, in nats),
        policy_version (of its writer), teacher, and is_right (None without a judge).

        Raises:
            UserError: the round is not scored, or a shard is damaged.
        """
        from pipeline.inspect.command import open_reader

        reader, found = open_reader(self._folder, self.config, round_index, FIGURE), []
        for cache in reader.caches:
            rows = cache.rows()
            for row in (rows[position] for position in range(len(rows))):
                verdict = reader.verdict(cache, row)
                found.append(
                    {
                        "prompt_id": row.prompt_id,
                        "sample_index": row.sample_index,
                        "prompt": reader.text.whole(row.prompt_ids.tolist()),
                        "completion": reader.text.whole(row.completion_ids.tolist(), special=False),
                        "finish_reason": row.finish_reason,
                        "tokens": len(row.completion_ids),
                        "trained_tokens": int(reader.trains(row).sum()),
                        "behavior_logprobs": row.behavior_logprobs,
                        "teacher_logprobs": row.teacher_logprobs,
                        "policy_version": cache.policy_version,
                        "teacher": cache.teacher,
                        "is_right": None if verdict is None else verdict.is_right,
                    }
                )
        return _frame(found)

    def policy_folder(self, version: int | None = None) -> Path:
        """A Hugging Face folder with a policy.

        Args:
            version: 0 is the initial student, R + 1 the policy after round R; None: the last of a
                finished run.

        Raises:
            UserError: there is no such policy.
        """
        if version == 0:
            return self.config.student.folder
        return trained_policy(self._folder, version)[1].folder("model")

    def policy(self, version: int | None = None, **options: Any) -> Any:
        """A policy as a loaded transformers model.

        Args:
            version: as in `policy_folder`.
            options: for `AutoModelForCausalLM.from_pretrained`, such as dtype or device_map.

        Raises:
            UserError: there is no such policy.
        """
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.policy_folder(version), **options)

    def tokenizer(self) -> Any:
        """The tokenizer of its policies."""
        from opd_stream.store.tokenizer_folder import open_tokenizer

        return open_tokenizer(self.config.student.folder)

    def report(self, out: Path | str | None = None) -> Path:
        """Write the HTML report; returns its path, report.html of the run's folder by default.

        Raises:
            UserError: the file cannot be written.
        """
        from pipeline.report.page import write_report

        place = self.folder / REPORT if out is None else Path(out)
        write_report([self.folder], place)
        return place

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}): {self._state()}"

    def _repr_html_(self) -> str:
        figures = self.evaluations
        table = figures.to_html(index=False, float_format="%.3f") if len(figures) else ""
        return f"<p><b>{escape(str(self.folder))}</b>: {escape(self._state())}</p>{table}"

    def _state(self) -> str:
        summary = self.summary
        if summary is None:
            return "begun, no round is done"
        scored = f"{summary.tokens.teacher_scored:,} tokens scored by the teacher"
        done = "finished" if summary.finished else "not finished"
        return f"{summary.rounds} of {summary.rounds_planned} rounds, {done}, {scored}"


def _figure(
    version: int, name: str, figure: str, value: float, interval: tuple[float, float] | None
) -> dict[str, Any]:
    low, high = interval or (None, None)
    return {
        "policy_version": version,
        "on": name,
        "figure": figure,
        "value": value,
        "low": low,
        "high": high,
    }


def _frame(rows: list[dict[str, Any]], columns: list[str] | None = None) -> "DataFrame":
    from pandas import DataFrame

    return DataFrame(rows, columns=columns)
