"""Prints a rollout, or a list of them, in a terminal."""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from math import exp

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from opd_stream.tokens import Figure, quoted, visible
from pipeline.console import one_line, print_lines
from pipeline.inspect.command import WorstRollout
from pipeline.inspect.view import RolloutView
from pipeline.tables import ResultTable

CANDIDATES = 4
WIDE = 110  # columns of a terminal from which every column of the table fits
PART = "◌"  # stands for a token that is only part of a character

# Black on light, so that one palette serves dark and light terminals; cold where negative.
_WARM = ("#fff3bf", "#ffe066", "#ffc078", "#ff8f5c", "#f05040")
_COLD = ("#e3f0fc", "#c5dff8", "#a0caf2", "#78b0ea", "#5596e0")


def print_rollout(view: RolloutView, *, console: Console) -> None:
    """The prompt, the coloured completion, the scale and the worst tokens."""
    name, unit = view.figure.name, view.figure.unit
    lines: list[Text | str] = [
        *(Text.assemble((f"{name:9}", "dim"), value) for name, value in facts(view)),
        *("", Text("prompt", "bold"), Text(view.prompt), ""),
        Text.assemble(("completion", "bold"), f", by {f'{name} ({unit})' if unit else name}"),
        *(_completion(view), "", _legend(view.figure)),
        *(Text(note, "dim") for note in notes(view)),
    ]
    print_lines(console, lines)
    console.print(_worst_tokens(view, is_wide=console.width >= WIDE))


def print_worst(
    found: list[WorstRollout], left_out: Iterable[str] = (), *, console: Console
) -> None:
    """The list of rollouts, the command that opens each, and lines on those without scores."""
    table = ResultTable(box=box.SIMPLE_HEAD, pad_edge=False)
    table.drops = ("at", "tokens", "sample", "finish", "largest", "verdict", "teacher")
    name = found[0].view.figure.name if found else ""
    teachers = [entry.view.located.cache.teacher or "" for entry in found]
    for column in ("", "prompt", "sample", "tokens", f"mean {name}", "largest", "at", "finish"):
        is_text = column in ("prompt", "finish")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=True)
    if any(teachers):
        table.add_column("teacher", no_wrap=True)
    table.add_column("verdict")
    for number, entry in enumerate(found, start=1):
        view = entry.view
        place = view.worst(1)[0]
        table.add_row(
            str(number),
            view.row.prompt_id,
            str(view.row.sample_index),
            str(view.own_tokens),
            f"{view.mean:.4f}",
            f"{view.values[place]:.3f}",
            str(place),
            view.finish.partition(":")[0],
            *([teachers[number - 1]] if any(teachers) else []),
            "" if view.verdict is None else str(view.verdict),
        )
    console.print(table)
    lines = (f"{number}: {entry.command}" for number, entry in enumerate(found, 1))
    print_lines(console, (*lines, *left_out))


def facts(view: RolloutView) -> Iterator[tuple[str, str]]:
    """What is known of the whole rollout: (name, text)."""
    row, cache = view.row, view.located.cache
    yield "rollout", f"{one_line(visible(row.prompt_id))}, sample {row.sample_index}"
    yield "from", view.source
    if cache.teacher is not None:
        yield "scores", f"by {cache.teacher}"
    if (prompt := view.teacher_prompt) is not None:
        yield "teacher", f"read {quoted(prompt)}"
    yield "finish", view.finish
    verdict = view.verdict
    if verdict is not None:
        answer = quoted(verdict.answer if len(verdict.answer) < 80 else f"…{verdict.answer[-79:]}")
        yield "verdict", f"{verdict} (judge {verdict.judge}, answer {answer})"
    said = "no token trains in this round"
    if trained := int(view.trains.sum()):
        place = view.worst(1)[0]
        said = (
            f"{view.figure.name} {view.mean:.4f} over {trained} tokens that train; "
            f"largest {view.values[place]:.3f} at {place}"
        )
    yield "mean", said


def notes(view: RolloutView) -> Iterator[str]:
    """What the signs in the completion mean, as far as they occur."""
    yield f"{view.figure.name}: {view.figure.meaning}"
    for mark in view.marks:
        yield f"┃ in front of token {mark.place}: {mark.text}"
    if view.row.finish_reason == "stop":
        yield "■ the student's terminator"
    if not view.trains.all():
        yield "⟦ ⟧ tokens that do not train in this round (loss mask, first occurrence, window)"
    if "" in view.pieces:
        yield f"{PART} token that is part of a character, which a later token ends"
    if view.located.cache.scores.recipe.settings["codec"]["kind"] == "sampled":
        yield "candidates are ids drawn from the teacher, with their share of the draws"
    for other in view.located.others:
        yield f"the round has another rollout of this name: --cache {other}"


def levels(figure: Figure) -> list[tuple[int, str]]:
    """Levels of a figure's scale from the lowest, each with the values it stands for."""
    edges = [f"{edge:g}" for edge in figure.edges]
    warm = [f"{low} to {high}" for low, high in pairwise(edges)]
    warm.append(f"from {edges[-1]}")
    found = [(0, f"below {edges[0]}")]
    if figure.name == "reverse_kl":
        cold = [f"-{high} to -{low}" for low, high in pairwise(edges)]
        cold.append(f"up to -{edges[-1]}")
        found[0] = (0, f"-{edges[0]} to {edges[0]}")
        found = [(-level, text) for level, text in enumerate(cold, start=1)][::-1] + found
    return found + list(enumerate(warm, start=1))


def shown(piece: str) -> str:
    """A token as it stands in the completion: visible, a newline with its sign."""
    return visible(piece).replace("\n", "⏎\n") if piece else PART


def probability(value: float | None) -> str:
    """A probability with as many digits as tell something."""
    if not value:
        return "" if value is None else "0"
    return f"{value:.4f}" if value >= 0.0001 else f"{value:.1e}"


def _completion(view: RolloutView) -> Text:
    text, in_mask = Text(), False
    marks = [mark.place for mark in view.marks]
    for place, piece in enumerate(view.pieces):
        masked = not view.trains[place]
        if masked != in_mask:
            text.append("⟦" if masked else "⟧", "bold magenta")
            in_mask = masked
        text.append("┃" * marks.count(place), "bold magenta")
        style = _style(view.figure.level(float(view.values[place])))
        text.append(shown(piece), f"{style} strike" if masked else style)
    text.append("⟧" if in_mask else "", "bold magenta")
    text.append({"stop": " ■"}.get(view.row.finish_reason, "┃"), "bold magenta")
    return text


def _legend(figure: Figure) -> Text:
    text = Text.assemble(("scale ", "dim"))
    for level, meaning in levels(figure):
        text.append(f" {meaning} ", _style(level))
        text.append(" ")
    return text.append(figure.unit, "dim")


def _worst_tokens(view: RolloutView, *, is_wide: bool) -> Table:
    named = dict.fromkeys([view.figure.name, *(["reverse_kl", "entropy"] if is_wide else [])])
    extra = [name for name in named if name in view.figures and name != "rank"]
    ranked = ["rank", *(["retained"] if is_wide else [])] if "rank" in view.figures else []
    table = Table(
        title=f"tokens with the largest {view.figure.name}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )
    table.add_column("at", justify="right")
    table.add_column("token", min_width=8)
    for column in ["p student", "p teacher", *extra, *ranked]:
        table.add_column(column.replace(" ", "\n"), justify="right", no_wrap=True)
    table.add_column("teacher's candidates", ratio=1)
    row = view.row
    for place in view.worst_tokens():
        rank = [view.ranks[place], probability(view.retained_mass(place))]
        table.add_row(
            str(place),
            Text(quoted(view.pieces[place])),
            probability(view.student_probability(place)),
            probability(exp(row.teacher_logprobs[place])),
            *(f"{view.figures[name][place]:.3f}" for name in extra),
            *rank[: len(ranked)],
            _candidates(view, place),
        )
    return table


def _candidates(view: RolloutView, place: int) -> Text:
    text = Text()
    for candidate in view.candidates(place, CANDIDATES):
        style = "underline" if candidate.is_drawn else ""
        text.append(quoted(candidate.text), style)
        text.append(f" {probability(candidate.probability)}  ")
    return text


def _style(level: int) -> str:
    if not level:
        return ""
    return f"black on {(_WARM if level > 0 else _COLD)[abs(level) - 1]}"
