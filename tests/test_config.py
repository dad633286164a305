"""Configs: every shipped file loads, every mistake is one line."""

from pathlib import Path

import jsonschema
import pytest
import yaml

from opd_stream.config_file import json_schema, load_config
from opd_stream.errors import UserError
from pipeline import setup

CONFIGS = Path(__file__).parent.parent / "configs"

SMALL = {
    "rounds": 1,
    "student": {"path": "student"},
    "teacher": {"path": "teacher"},
    "prompts": {"kind": "ledger", "count": 8, "seed": 0},
    "rollouts": {"prompts_per_round": 4, "window": {"kind": "fixed", "tokens": 8}},
    "train": {"objective": {"kind": "lsm"}, "learning_rate": 1e-3},
}


def write(folder: Path, fields: dict[str, object]) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_loads(path: Path) -> None:
    assert load_config(path, []).rounds >= 1


def test_a_path_in_a_file_is_relative_to_the_file_and_on_the_command_line_is_not(
    tmp_path: Path,
) -> None:
    config = load_config(write(tmp_path, SMALL), ["teacher.path=elsewhere", "store=cache"])
    assert config.student.path == tmp_path / "student"
    assert config.teacher is not None
    assert config.teacher.path == Path("elsewhere")
    assert config.store == "cache"


def test_all_problems_are_told_at_once_with_suggestions(tmp_path: Path) -> None:
    fields = {**SMALL, "rouds": 3, "student": {"path": "s", "engin": "fake"}, "seed": "many"}
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, fields), [])
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("3 problems in ")
    assert "unknown key 'rouds'; did you mean 'rounds'?" in lines
    assert "unknown key 'student.engin'; did you mean 'engine'?" in lines
    assert any(line.startswith("'seed' is 'many'; ") for line in lines)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("rollouts.window.tokens=0", "'rollouts.window.tokens' is 0"),
        ("rollouts.samples=3", "did you mean 'samples_per_prompt'?"),
        ("gradient_checkpointing=true", "docs/config.md has that field in Train"),
        ("run_dir=runs/a", "the run's folder is an option of the command: --run-dir DIR"),
        ("train.objective.kind=mse", "'train.objective.0'"),
        ("train.top_k=33", "train.top_k is 33 but scores.top_k is"),
        ("train.objective.kind=mc", "rollouts.extra_draws is 0 with objective mc"),
        ("train.objective=[]", "train.objective is an empty list"),
        ("rollouts", "has no '='"),
        ("rounds.deep=1", "rounds is a value, not a section"),
        ("teacher=null", "'teacher' is missing"),
        ("scores.top_k=5000", "'scores.top_k' is 5000"),
        ("train.learning_rate=.inf", "'train.learning_rate' is inf; expected a finite"),
        ("seed=-1", "'seed' is -1"),
        ("seed=99999999999999999999", "'seed' is 99999999999999999999"),
    ],
)
def test_a_wrong_override_is_one_line(tmp_path: Path, override: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, SMALL), [override])
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("temperature", [0, 0.7, 1.2])
@pytest.mark.parametrize("objective", ["sampled_pg", "hybrid", "mc"])
def test_importance_of_tokens_that_were_drawn_at_another_temperature_is_refused(
    tmp_path: Path, objective: str, temperature: float
) -> None:
    overrides = [f"rollouts.temperature={temperature}", f"train.objective={{kind: {objective}}}"]
    overrides.append("rollouts.extra_draws=3")
    load_config(write(tmp_path, SMALL), [overrides[0]])
    with pytest.raises(UserError, match=r"set rollouts\.temperature=1 or another objective"):
        load_config(write(tmp_path, SMALL), overrides)


def test_a_missing_file_and_a_file_that_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_config(tmp_path / "none.yaml", [])
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UserError, match="holds a list; expected a mapping"):
        load_config(tmp_path / "list.yaml", [])
    (tmp_path / "torn.yaml").write_text("a: [1")
    with pytest.raises(UserError, match="is not valid YAML"):
        load_config(tmp_path / "torn.yaml", [])


def test_a_base_gives_its_fields_and_another_kind_replaces_a_section(tmp_path: Path) -> None:
    write(tmp_path, {**SMALL, "train": {"objective": {"kind": "bucket"}, "learning_rate": 0.1}})
    above = {"base": "run.yaml", "train": {"objective": {"kind": "lsm"}}}
    (tmp_path / "above.yaml").write_text(yaml.safe_dump(above))
    config = load_config(tmp_path / "above.yaml", [])
    assert config.train.objective[0].kind == "lsm"
    assert config.train.learning_rate == 0.1


def test_an_overlay_of_a_dataset_keeps_hub_names_and_anchors_files(tmp_path: Path) -> None:
    source = {"kind": "datasets", "path": "json", "data_files": "rows.jsonl"}
    write(tmp_path, {**SMALL, "prompts": source})
    above = {"base": "run.yaml", "prompts": {"path": "openai/gsm8k"}}
    (tmp_path / "above.yaml").write_text(yaml.safe_dump(above))
    prompts = load_config(tmp_path / "above.yaml", []).prompts
    assert prompts.kind == "datasets"
    assert prompts.path == "openai/gsm8k"
    assert prompts.data_files == tmp_path / "rows.jsonl"
    (tmp_path / "openai" / "gsm8k").mkdir(parents=True)  # a folder of that name is meant
    assert load_config(tmp_path / "above.yaml", []).prompts.path == str(tmp_path / "openai/gsm8k")


def test_a_base_inside_a_section_is_no_file(tmp_path: Path) -> None:
    jump = {"extrapolation": {"base": "previous"}}
    found = load_config(write(tmp_path, {**SMALL, "train": {**SMALL["train"], **jump}}), [])
    assert found.train.extrapolation is not None
    assert found.train.extrapolation.base == "previous"


def test_conflicts_between_fields_are_told_at_once(tmp_path: Path) -> None:
    overrides = [
        "rollouts.temperature=0",
        "train.objective=[{kind: hybrid}, {kind: mc}]",
        "staleness.gated_from=0.5",
        "replay={}",
    ]
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, SMALL), overrides)
    first, *lines = str(caught.value).splitlines()
    assert first.startswith("4 problems in ")
    for found in (
        "rollouts.temperature is 0 with objective hybrid",
        "replay.run and replay.scores are both set, or neither",
        "staleness.gated_from 0.5 is above staleness.policy_drift 0.1",
        "staleness.gated_from is 0.5 but nothing weighs tokens",
    ):
        assert any(line.startswith(found) for line in lines), found


def test_conflicts_are_told_beside_fields_that_are_wrong_or_missing(tmp_path: Path) -> None:
    fields = {name: value for name, value in SMALL.items() if name != "rounds"}
    overrides = [
        "student.path=''",
        "prompts.count=0",
        "rollouts.temperature=0",
        "train={objective: {kind: hybrid}, learning_rate: .inf, gate: {}}",
        "staleness.policy_drift=0",  # gated_from is held against no bound that is wrong
        "staleness.gated_from=0.5",
        "replay={}",
        "seed",
    ]
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, fields), overrides)
    first, *lines = str(caught.value).splitlines()
    assert first.startswith("8 problems in ")
    assert [line.split()[0].strip("',;") for line in sorted(lines)] == [
        *("prompts.count", "rounds", "staleness.policy_drift", "student.path"),
        *("train.learning_rate", "--set", "replay.run", "rollouts.temperature"),
    ]


def test_a_misspelt_key_of_the_student_gets_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"key 'student\.taugt_by'; did you mean 'taught_by'"):
        load_config(write(tmp_path, SMALL), ["student.taugt_by=there"])


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ("train.objective={kind: sampled_pg}", "train.guards.soft_clamp=3"),
            "train.guards.soft_clamp is set with objective sampled_pg, whose losses may be",
        ),
        (
            (
                "train.objective={kind: drawn_forward}",
                "scores.codec={kind: sampled, draws: 8}",
                "train.top_k=4",
            ),
            "train.top_k is 4 with scores.codec sampled, whose ids have no ranks",
        ),
    ],
)
def test_two_settings_that_exclude_each_other(
    tmp_path: Path, overrides: tuple[str, ...], line: str
) -> None:
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, SMALL), list(overrides))
    assert line in str(caught.value)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.name)
def test_the_schema_accepts_every_config_of_the_project(path: Path) -> None:
    jsonschema.validate(yaml.safe_load(path.read_text()), json_schema())


def test_the_schema_finds_a_misspelt_field() -> None:
    with pytest.raises(jsonschema.ValidationError, match="rouds"):
        jsonschema.validate({"base": "quickstart.yaml", "rouds": 3}, json_schema())


def test_logger_wandb_without_credentials_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(setup, "find_spec", lambda _: True)  # as if every library were there
    config = load_config(write(tmp_path, SMALL), ["train.loggers=[wandb]"])
    with pytest.raises(UserError, match=r"train\.loggers names wandb, .* call `wandb login`"):
        setup.check_extras(config)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x")
    setup.check_extras(config)
