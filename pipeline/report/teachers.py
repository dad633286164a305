"""Figure of one run over its rounds: each of several teachers, how far it is and what it scored."""

from math import nan

from pipeline.records import TeacherFigures
from pipeline.report.drawing import (
    Exhibit,
    Series,
    count,
    count_axis,
    exhibit,
    look,
    number,
    panels,
    table_of,
)
from pipeline.report.read import Run

TITLE = "Teachers over rounds"


def teachers_exhibit(run: Run, name: str) -> Exhibit:
    """Reverse KL to each teacher on the rollouts that it scored, and its share of their tokens."""
    of_round = {report.round: report.teachers for report in run.rounds if report.teachers}
    if not of_round:
        return Exhibit(name=name, title=TITLE, caption="No round has trained on their scores yet.")
    nothing = TeacherFigures()
    total = {index: sum(t.tokens for t in found.values()) for index, found in of_round.items()}
    rows = [
        (index, teacher, each, each.tokens / max(total[index], 1))
        for index, found in of_round.items()
        for teacher, each in found.items()
    ]
    figure, axes = panels(2, height=1.6)
    legend: list[Series] = []
    for place, teacher in enumerate(dict.fromkeys(row[1] for row in rows)):
        drawn = look(place)
        figures = [found.get(teacher, nothing) for found in of_round.values()]
        kl = [nan if each.reverse_kl is None else each.reverse_kl for each in figures]
        pairs = zip(figures, total.values(), strict=True)
        shares = [each.tokens / max(tokens, 1) for each, tokens in pairs]
        for axis, values in zip(axes, (kl, shares), strict=True):
            axis.plot([*of_round], values, **drawn.style)
        legend.append(Series(label=teacher, look=drawn))
    axes[0].set_ylabel("reverse KL\n(nats a token)")
    axes[1].set_ylabel("share of\nscored tokens")
    axes[1].set_ylim(-0.02, 1.04)
    count_axis(axes[1], "round")
    weights = {cache.teacher: cache.weight for report in run.rounds for cache in report.caches}
    table = table_of(
        "Teachers",
        rows,
        {
            "round": lambda each: str(each[0]),
            "teacher": lambda each: each[1],
            "weight": lambda each: number(weights.get(each[1]), 2),
            "rows that train": lambda each: count(each[2].rows),
            "tokens": lambda each: count(each[2].tokens),
            "share": lambda each: number(each[3], 3),
            "scored by this run": lambda each: count(each[2].teacher_scored),
            "reverse KL, nats": lambda each: number(each[2].reverse_kl),
        },
    )
    caption = (
        "Above, the reverse KL to each teacher by the tokens that the student drew, on rollouts "
        "that the teacher scored; below, its share of the scored tokens. Neither counts weights."
    )
    return exhibit(figure, name, TITLE, caption, run=run.name, legend=legend, tables=[table])
