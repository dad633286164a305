"""Rollouts as pages that need no network: one rollout, or those of a round with an index.

A rollout's page runs no script; that of the index filters and sorts.
"""

import hashlib
import math
from base64 import b64encode
from collections.abc import Sequence
from importlib.resources import files
from math import exp
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from opd_stream.errors import UserError
from opd_stream.store.files import make_folder, publish
from opd_stream.tokens import FIGURES, quoted, visible
from pipeline.inspect.terminal import CANDIDATES, PART, facts, levels, notes, probability, shown
from pipeline.inspect.view import RolloutView, mean_of

INDEX = "index.html"
GENERATOR = "opd-stream inspect"


class Navigation(NamedTuple):
    """The pages around one of a round; None: there is none."""

    previous: str | None
    next: str | None
    pages: int


def write_page(view: RolloutView, path: Path) -> str:
    """Write the page of a rollout; returns the line to print."""
    data = page(view).encode()
    publish(path, data)
    return f"{path}: {len(data):,} bytes; open it in a browser"


def write_pages(views: Sequence[RolloutView], left_out: Sequence[str], folder: Path) -> str:
    """Write a page a rollout and their index, which comes last; returns the line to print.

    Raises:
        UserError: the folder holds another index, or cannot be made.
    """
    index = folder / INDEX
    if index.is_file() and f'content="{GENERATOR}"' not in index.read_text(errors="replace"):
        raise UserError(
            f"{index} is no index of rollouts; expected a folder for the pages of a round; name "
            "another --html"
        )
    make_folder(folder)
    names = [f"{number:04d}.html" for number in range(1, len(views) + 1)]
    around = [None, *names, None]
    for place, (view, name) in enumerate(zip(views, names, strict=True)):
        nav = Navigation(around[place], around[place + 2], len(names))
        publish(folder / name, page(view, nav).encode())
    publish(index, index_page(views, names, left_out).encode())
    return f"{index}: {len(names)} rollouts; open it in a browser"


def index_page(
    views: Sequence[RolloutView], names: Sequence[str], left_out: Sequence[str] = ()
) -> str:
    """The list of rollouts, each with the page of its name."""
    figures = list(dict.fromkeys(name for view in views for name in view.figures))
    first = views[0].figure.name if views else next(iter(FIGURES))
    figures.sort(key=lambda name: name != first)
    rows = [
        {
            "file": name,
            "prompt": visible(view.row.prompt_id),
            "sample": view.row.sample_index,
            "tokens": view.own_tokens,
            "finish": view.finish.partition(":")[0],
            "verdict": "none" if view.verdict is None else str(view.verdict),
            "means": {each: _mean(view, each) for each in figures},
        }
        for view, name in zip(views, names, strict=True)
    ]
    script = _text("index.js")
    digest = hashlib.sha256(script.encode()).digest()
    reader = views[0].reader if views else None
    return _render(
        INDEX,
        title=f"Rollouts of round {reader.plan.round_index}" if reader else "Rollouts",
        meaning=f"{first}: {FIGURES[first].meaning}. Each is a mean over the tokens that train.",
        figures=figures,
        verdicts=sorted({str(row["verdict"]) for row in rows}),
        rows=rows,
        left_out=left_out,
        script=Markup(script),
        allowed=f"'sha256-{b64encode(digest).decode()}'",
        generator=GENERATOR,
    )


def _mean(view: RolloutView, name: str) -> float | None:
    mean = mean_of(view.figures[name], view.trains) if name in view.figures else math.nan
    return round(mean, 6) if math.isfinite(mean) else None


def page(view: RolloutView, nav: Navigation | None = None) -> str:
    """The page of a rollout; `nav`: of several."""
    return _render(
        "page.html",
        nav=nav,
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


def _text(name: str) -> str:
    return files("pipeline.inspect").joinpath(name).read_text(encoding="utf-8")


def _render(name: str, **values: Any) -> str:
    """A template of this folder; the template engine escapes every value."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_text(name)).render(style=Markup(_text("style.css")), **values)


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
