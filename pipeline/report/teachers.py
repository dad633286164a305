"""Figure of one run over its rounds: each of several teachers, how far it is and what it scored."""

import altair as alt

from pipeline.records import TeacherFigures
from pipeline.report.charts import SERIES, Exhibit, axis_x, axis_y, data, exhibit, lines
from pipeline.report.read import Run
from pipeline.report.tables import count, number, table_of

TITLE = "Teachers over rounds"


def teachers_exhibit(run: Run, name: str) -> Exhibit:
    """Reverse KL to each teacher on the rollouts that it scored, and its share of their tokens."""
    of_round = {report.round: report.teachers for report in run.rounds if report.teachers}
    if not of_round:
        return Exhibit(name=name, title=TITLE, caption="No round has trained on their scores yet.")
    nothing = TeacherFigures()
    total = {index: sum(t.tokens for t in found.values()) for index, found in of_round.items()}
    teachers = list(dict.fromkeys(name for found in of_round.values() for name in found))
    drawn = [
        {
            SERIES: teacher,
            "round": index,
            "reverse_kl": (each := found.get(teacher, nothing)).reverse_kl,
            "share": each.tokens / max(total[index], 1),
        }
        for index, found in of_round.items()
        for teacher in teachers
    ]
    base = alt.Chart(data(drawn))
    panels = [
        (
            title,
            lines(
                base.transform_filter(f"isValid(datum.{measure})"),
                teachers,
                axis_x("round", "round"),
                axis_y(measure, span=span),
                tip=[f"{SERIES}:N", "round:Q", f"{measure}:Q"],
            ),
        )
        for measure, title, span in (
            ("reverse_kl", "reverse KL (nats a token)", None),
            ("share", "share of the scored tokens", (0, 1)),
        )
    ]
    weights = {cache.teacher: cache.weight for report in run.rounds for cache in report.caches}
    table = table_of(
        "Teachers",
        [
            (index, teacher, each, each.tokens / max(total[index], 1))
            for index, found in of_round.items()
            for teacher, each in found.items()
        ],
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
        "The reverse KL to each teacher by the tokens that the student drew, on rollouts that the "
        "teacher scored; and its share of the scored tokens. Neither counts weights."
    )
    return exhibit(name, TITLE, caption, panels, tables=[table])
