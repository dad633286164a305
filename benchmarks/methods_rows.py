"""The rows of the comparison: overrides on the config of a task, and how many seeds each gets."""

from dataclasses import dataclass, field

HELD_OUT = 900_001  # problems of seed s are those of HELD_OUT + s; no tuning has seen them
TUNING = 4242


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One of the two tasks.

    Example:
        >>> TASKS["routine"].full_tokens
        864
    """

    full_tokens: int
    rounds: int
    curve_rounds: tuple[int, ...]  # after which the policy is evaluated, beside the last
    final_problems: int
    curve_problems: int = 48
    curve_samples: int = 2
    final_samples: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table.

    Example:
        >>> ROWS["routine"][0].name
        'full'
    """

    name: str
    group: str  # of the table
    overrides: tuple[str, ...] = field(default=())  # SEED stands for that of the run
    seeds: int = 3

    @property
    def has_curve(self) -> bool:
        """Whether policies before the last are evaluated."""
        return self.group in ("windows", "extrapolation") or self.name == "SFT"


TASKS = {
    "ledger": Task(full_tokens=208, rounds=8, curve_rounds=(1, 2, 3, 4, 6), final_problems=96),
    "routine": Task(full_tokens=864, rounds=8, curve_rounds=(1, 2, 3, 4, 6), final_problems=64),
}


NO_BOUND = ("staleness.policy_drift=100", "staleness.effective_sample_fraction=1e-6")


def _window(text: str) -> str:
    return "rollouts.window={" + text + "}"


def _windows(task: str) -> list[Row]:
    """Windows over the same rounds and rows as full rollouts."""
    full = TASKS[task].full_tokens
    fixed = {"ledger": (16, 32, 64, 96, 128), "routine": (32, 64, 128, 256, 512)}[task]
    candidates = {"ledger": "[32, 64, 96, 128]", "routine": "[32, 64, 128, 256, 512]"}[task]
    rows = [Row(name="full", group="windows", seeds=5)]
    rows += [
        Row(
            name=f"ESR {tokens}",
            group="windows",
            overrides=(_window(f"kind: fixed, tokens: {tokens}"),),
        )
        for tokens in fixed
    ]
    rows += [
        Row(
            name=f"TOPD {ratio:.2f}",
            group="windows",
            overrides=(_window(f"kind: ratio, ratio: {ratio}, max_window_tokens: {full}"),),
        )
        for ratio in (0.1, 0.25, 0.5)
    ]
    rows.append(
        Row(
            name="TOPD 0.50 x2",
            group="windows",
            overrides=(
                *rows[-1].overrides,
                f"rounds={TASKS[task].rounds // 2}",
                "staleness.max_epochs=2",
                *NO_BOUND,
            ),
        )
    )
    steps = TASKS[task].rounds * 4
    h0, step = full // 8, full // 8 // (TASKS[task].rounds // 4)
    rows.append(
        Row(
            name="POPD",
            group="windows",
            overrides=(
                _window(
                    f"kind: linear, h0: {h0}, delta: {(full - h0) // (2 * steps)}, every: 1, "
                    f"max_window_tokens: {full}"
                ),
            ),
        )
    )
    own = (*rows[-1].overrides, "rollouts.student_top_k=16", "scores.top_k=1")
    rows.append(Row(name="POPD, own top 16", group="windows", overrides=own))
    rows.append(
        Row(
            name="prefix schedule",
            group="windows",
            overrides=(
                _window(
                    f"kind: linear, h0: {h0}, delta: {step}, every: 4, max_window_tokens: {full}"
                ),
            ),
        )
    )
    windows = [min(full, h0 + step * number) for number in range(TASKS[task].rounds)]
    rows.append(
        Row(
            name="prefix schedule, random order",
            group="windows",
            overrides=(
                _window(f"kind: 'controls:RandomOrder', windows: {windows}, steps: 4, seed: SEED"),
            ),
        )
    )
    rows.append(
        Row(
            name="ADWIN",
            group="windows",
            overrides=(
                _window(
                    f"kind: adaptive, candidates: {candidates}, max_window_tokens: {full}, "
                    "start: 64, probe_rows: 3, layers: 1, every_rounds: 3"
                ),
            ),
        )
    )
    ladder = {"ledger": "[32, 64, 96, 128, 160, 192]", "routine": candidates}[task]
    rows.append(
        Row(
            name="ADWIN, dense audit",
            group="windows",
            overrides=(
                _window(
                    f"kind: adaptive, candidates: {ladder}, max_window_tokens: {full}, "
                    "objective: trained, probe_rows: 6, probe_share: 0.1, layers: 1, "
                    "every_rounds: 2, hysteresis: true"
                ),
            ),
        )
    )
    return rows


def _objectives() -> list[Row]:
    """Objectives on full rollouts; the bucket is `full`."""
    kinds = {
        "sampled_pg": "{kind: sampled_pg}",
        "lsm": "{kind: lsm}",
        "hybrid": "{kind: hybrid}",
        "forward bucket": "{kind: bucket, direction: forward}",
        "sampled_pg, bound 2": "{kind: sampled_pg, bound: 2}",
        "entropy mix": "{kind: entropy_mix}",
    }
    return [
        Row(name=name, group="objectives", overrides=(f"train.objective={objective}",))
        for name, objective in kinds.items()
    ]


def _choices(task: str) -> list[Row]:
    """Some tokens of full rollouts alone: by a figure of each, or by their place."""
    full = TASKS[task].full_tokens
    names = {"kl": "KL", "student_entropy": "student entropy", "teacher_entropy": "teacher entropy"}
    rows = [
        Row(
            name=f"0.2 of tokens by {name}",
            group="choice of tokens",
            overrides=("train.select={by: " + by + ", share: 0.2}",),
        )
        for by, name in names.items()
    ]
    return rows + [
        Row(
            name=f"tokens {full * part // 4} to {full * (part + 1) // 4}",
            group="choice of tokens",
            overrides=(
                f"train.segment={{first: {full * part // 4}, end: {full * (part + 1) // 4}}}",
            ),
        )
        for part in range(4)
    ]


def _reuse(task: str) -> list[Row]:
    """The same number of passes over rollouts, sampled anew after 1, 4 or 10 of them."""
    passes = {"ledger": 20, "routine": 8}[task]
    epochs = {"ledger": (1, 4, 10), "routine": (4, 8)}[task]  # routine x1: `full`, `sampled_pg`
    objectives = {"sampled_pg": "{kind: sampled_pg}", "bucket": "{kind: bucket}"}
    gates = {
        "": (),
        " Block16": ("train.gate={blocks: 16}",),
        " Block64": ("train.gate={blocks: 64}",),
        " spans": ("train.gate={blocks: spans}",),
        " Block16 tau 10": ("train.gate={blocks: 16, tau: 10}",),
    }
    rows: list[Row] = []
    for name, objective in objectives.items():
        for count in epochs:
            gated = name == "sampled_pg" and count == 4
            rows += [
                Row(
                    name=f"{name} x{count}{gate}",
                    group="reuse",
                    overrides=(
                        f"train.objective={objective}",
                        f"rounds={passes // count}",
                        f"staleness.max_epochs={count}",
                        *NO_BOUND,
                        *settings,
                    ),
                    seeds=5 if gated and task == "ledger" else 3,
                )
                for gate, settings in (gates.items() if gated else [("", ())])
            ]
    if task == "routine":  # beside regeneration by drift in 16 rounds
        overrides = ("rounds=2", "staleness.max_epochs=8", *NO_BOUND)
        rows.append(Row(name="bucket x8, 16 passes", group="reuse", overrides=overrides))
    return rows


def _regeneration(task: str) -> list[Row]:
    """Units made again when they have drifted, instead of all of them every round."""
    window = _window(f"kind: fixed, tokens: {TASKS[task].full_tokens}")
    bounds = {
        "ledger": ((0.01, 1.0), (0.03, 1.0), (0.06, 0.5)),
        "routine": ((0.03, 1.0), (0.06, 0.5), (0.15, 0.5)),
    }[task]
    more = {"ledger": 20, "routine": 16}[task]
    rows: list[Row] = []
    for bound, keep_share in bounds:
        for name in ("bucket", "sampled_pg") if keep_share == 1 else ("bucket",):
            overrides = (
                window,
                "train.objective={kind: " + name + "}",
                f"staleness.policy_drift={bound}",
                f"staleness.keep_share={keep_share}",
                "staleness.max_policies=20",
                "staleness.sample_share=0.2",
            )
            title = f"{name} by drift {bound:g}"
            if keep_share < 1:
                title += f", kept to {keep_share * bound:g}"
            if bound < 0.1:
                rows.append(Row(name=title, group="regeneration", overrides=overrides))
            if name == "bucket" and (task == "ledger" or bound > 0.1):
                rows.append(
                    Row(
                        name=f"{title}, {more} rounds",
                        group="regeneration",
                        overrides=(*overrides, f"rounds={more}"),
                    )
                )
    return rows


def _others(task: str) -> list[Row]:
    rounds = TASKS[task].rounds
    offline = (
        "rounds=1",
        f"rollouts.prompts_per_round={64 * rounds}",
        "prompts_per_unit=64",
        *NO_BOUND,
    )
    return [
        Row(name="EffOPD", group="extrapolation", overrides=("train.extrapolation={}",), seeds=5),
        Row(name="one-shot", group="offline", overrides=offline),
        Row(
            name="one-shot forward",
            group="offline",
            overrides=(*offline, "train.objective={kind: bucket, direction: forward}"),
        ),
        Row(name="SFT", group="control"),
        *(
            Row(
                name=name,
                group="control",
                overrides=(
                    "train.objective={kind: 'controls:" + kind + "'}",
                    *NO_BOUND,
                    "staleness.diverged=1e6",
                ),
            )
            for name, kind in {
                "shuffled teacher": "Shuffled",
                "constant advantage": "Constant",
            }.items()
        ),
    ]


ROWS = {
    task: [
        *_windows(task),
        *_objectives(),
        *_choices(task),
        *_reuse(task),
        *_regeneration(task),
        *_others(task),
    ]
    for task in TASKS
}
