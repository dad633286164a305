"""What a run tells its loggers beside the steps: its config, each round, each evaluation."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opd_stream.config import Config
from pipeline.records import RoundReport

STAGES = ("generate", "score", "train")


class RunLog:
    """The loggers of a run, opened for each telling; a run without any costs nothing."""

    def __init__(self, config: Config, folder: Path, run_id: str) -> None:
        self._config, self._folder, self._run_id = config, folder, run_id

    def config(self) -> None:
        """The settings and the run's id; the first to connect, so before any work.

        Raises:
            UserError: a logger cannot be opened.
        """
        if not self._config.train.loggers:
            return
        from stages.loggers import log_settings

        settings = {"run_id": self._run_id, **self._config.model_dump(mode="json")}
        with self._opened() as loggers:
            for logger in loggers:
                log_settings(logger, settings)

    def figures(self, figures: dict[str, float], step: int) -> None:
        """Numbers at an optimizer step."""
        if not self._config.train.loggers:
            return
        with self._opened() as loggers:
            for logger in loggers:
                logger.log_metrics(figures, step)

    def round(self, report: RoundReport) -> None:
        """The figures and the decisions of a round, at its last step."""
        if not self._config.train.loggers:
            return
        from stages.loggers import log_texts

        step = report.first_step + report.steps
        decided = {f"decisions/round_{report.round}": "; ".join(decisions_of(report))}
        with self._opened() as loggers:
            for logger in loggers:
                logger.log_metrics(round_figures(report), step)
            log_texts(loggers, decided, step)

    @contextmanager
    def _opened(self) -> Iterator[list[Any]]:
        """The loggers, to be told and closed; what they raise is one line."""
        from stages.loggers import open_loggers, telling

        chosen = self._config.train.loggers
        with telling(chosen):
            loggers = [*open_loggers(chosen, self._folder, self._run_id)]
            yield loggers
            for logger in loggers:
                logger.finalize("success")


def round_figures(report: RoundReport) -> dict[str, float]:
    """The figures of a round by names for loggers, round/…."""
    last = report.epochs[-1]
    found: dict[str, float | None] = {
        "window_tokens": report.window_tokens,
        "rows": report.rows,
        "epochs": len(report.epochs),
        "tokens_generated": report.tokens.generated,
        "tokens_teacher_scored": report.tokens.teacher_scored,
        "tokens_trained": report.tokens.trained,
        "cut_share": report.length_share,
        "repeat_ratio": report.repeat_ratio,
        "cache_bytes": report.cache_bytes,
        "policy_drift": report.policy_drift,
        "effective_sample_fraction": report.effective_sample_fraction,
        "loss": last.loss,
        "reverse_kl": last.reverse_kl,
        "overlap": last.overlap,
        **{f"seconds_{stage}": getattr(report.seconds, stage) for stage in STAGES},
        **{f"flops_{stage}": getattr(report.flops, stage) for stage in STAGES},
    }
    return {f"round/{name}": float(value) for name, value in found.items() if value is not None}


def decisions_of(report: RoundReport) -> Iterable[str]:
    """What was decided in a round, a sentence each."""
    yield from (f"epoch {epoch.epoch}: {epoch.action}, {epoch.reason}" for epoch in report.epochs)
    if report.window_decision is not None:
        yield f"next window: {report.window_decision.reason}"
