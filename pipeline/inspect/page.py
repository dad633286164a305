"""A rollout as one page that needs no network and no script."""

from importlib.resources import files
from math import exp
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from opd_stream.store.files import publish
from opd_stream.tokens import FIGURES, quoted, visible
from pipeline.inspect.terminal import CANDIDATES, PART, facts, levels, notes, probability, shown
from pipeline.inspect.view import RolloutView


def write_page(view: RolloutView, path: Path) -> str:
    """Write the page of a rollout; returns the line to print."""
    data = page(view).encode()
    publish(path, data)
    return f"{path}: {len(data):,} bytes; open it in a browser"


def page(view: RolloutView) -> str:
    """The page; the template engine escapes every value."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        files("pipeline.inspect").joinpath("page.html").read_text(encoding="utf-8")
    )
    return template.render(
        title=f"{visible(view.row.prompt_id)}, sample {view.row.sample_index}",
        facts=[(name, text) for name, text in facts(view) if name != "rollout"],
        prompt=view.prompt,
        figure=view.figure,
        levels=[(_class(level), text) for level, text in levels(view.figure)],
        notes=list(notes(view)),
        meanings=[FIGURES[name] for name in view.figures if name != view.figure.name],
        tokens=[_token(view, place) for place in range(len(view.pieces))],
        worst=view.worst_tokens(),
        is_cut=view.row.finish_reason != "stop",
    )


def _token(view: RolloutView, place: int) -> dict[str, Any]:
    """Everything that the page says of a token."""
    row = view.row
    text = shown(view.pieces[place])
    body = text.rstrip("\n") if text != PART else PART
    figures = {
        name: f"{values[place]:.4g}" for name, values in view.figures.items() if name != "rank"
    }
    if "rank" in view.figures:
        figures["rank"] = view.ranks[place]
        figures["retained mass"] = probability(view.retained_mass(place))
    return {
        "place": place,
        "body": body,
        "breaks": text[len(body) :],
        "quoted": quoted(view.pieces[place]),
        "id": int(row.completion_ids[place]),
        "level": _class(view.figure.level(float(view.values[place]))),
        "value": f"{view.values[place]:.3f}",
        "trains": bool(view.trains[place]),
        "marks": [mark.text for mark in view.marks if mark.place == place],
        "student": probability(view.student_probability(place)),
        "teacher": probability(exp(row.teacher_logprobs[place])),
        "figures": figures,
        "candidates": [
            {
                "quoted": quoted(candidate.text),
                "probability": probability(candidate.probability),
                "percent": round(100 * candidate.probability, 1),
                "is_drawn": candidate.is_drawn,
            }
            for candidate in view.candidates(place, CANDIDATES)
        ],
    }


def _class(level: int) -> str:
    """The style of a level: w1 to w5, c1 to c5, or none."""
    return "" if not level else f"{'w' if level > 0 else 'c'}{abs(level)}"
