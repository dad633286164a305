"""Trajectories of many turns: ids and masks of messages, and what other programs wrote of them."""

import json
import random
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from opd_stream.batches import collate
from opd_stream.errors import UserError
from opd_stream.messages import turns_of
from opd_stream.rendering import ChatTemplate, Prompt, Renderer
from opd_stream.store import Store, open_scores
from opd_stream.store.codecs import CompactCodec, ExactCodec
from opd_stream.store.exchange import export_scores, import_scores
from opd_stream.store.verification import damages
from opd_stream.trajectories import Trajectory, TrajectoryReader, trajectory_of
from opd_stream.weighting import trained_mask
from pipeline.cli import app
from tests.tiny_tokenizers import byte_level, metaspace

ROOT = Path(__file__).parent.parent
STUDENT, REAL = ROOT / "configs" / "models" / "ledger-student", ROOT / "models" / "real" / "teacher"
CHATML = (
    "{% for m in messages %}<bos>{{ m.role }}\n{{ m.content or '' }}"
    "{% if m.tool_calls %}{% for call in m.tool_calls %}{{ call.function | tojson | upper }}"
    "{% endfor %}{% endif %}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)
MARKED = (
    CHATML.replace("{{ m.content or '' }}", "")
    .replace(
        "\n{% if m.tool_calls",
        "\n{% if m.role == 'assistant' %}{% generation %}{{ m.content or '' }}<eos>"
        "{% endgeneration %}"
        "{% else %}{{ m.content }}<eos>{% endif %}{% if false and m.tool_calls",
    )
    .replace("{% endif %}<eos>\n", "{% endif %}\n")
)
INSTRUCT = (  # as Llama 2 and Mistral: no header before an answer
    "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content or '' }}</s>"
    "{% else %}<s>[{{ m.role | upper }}] {{ m.content }} [END]{% endif %}{% endfor %}"
)


def student_tokenizer(template: str = CHATML) -> Any:
    found = AutoTokenizer.from_pretrained(STUDENT)
    found.chat_template = template
    return found


def instruct_tokenizer() -> Any:
    found = metaspace()
    found.chat_template = INSTRUCT
    return found


def trained_tokenizer() -> Any:
    found = byte_level(specials=("<bos>", "<eos>"))
    found.chat_template = CHATML
    return found


def real_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(REAL)


MAKERS: dict[str, Callable[[], Any]] = {
    "student": student_tokenizer,
    "marked": lambda: student_tokenizer(MARKED),
    "instruct": instruct_tokenizer,
    "trained": trained_tokenizer,
    "real": real_tokenizer,
}


def words(rng: random.Random, letters: str) -> str:
    """Text of some letters, with white space anywhere, at its edges too."""
    return "".join(rng.choice(letters + "  \n") for _ in range(rng.randint(0, 24)))


def chat(rng: random.Random) -> list[dict[str, Any]]:
    """A conversation: the assistant writes small letters, all others capitals and the rest."""
    others, own = "ABCXYZ0189ÄΩ漢😀.,", "abcxyzäω"
    turns = [{"role": "system", "content": words(rng, others)}] if rng.random() < 0.3 else []
    for _ in range(rng.randint(1, 5)):
        turns.append({"role": "user", "content": words(rng, others)})
        for _ in range(rng.choice([0, 0, 1, 2])):
            turns.append({"role": "assistant", "content": words(rng, own)})
            turns.append({"role": "tool", "content": words(rng, others)})
        turns.append({"role": "assistant", "content": words(rng, own)})
    return turns


def as_prompt(turns: Any, **fields: Any) -> Prompt:
    return Prompt(prompt_id="row 1", text="", answer=None, turns=turns_of(turns, "row"), **fields)


def of(tokenizer: Any, turns: Any, **template: Any) -> Trajectory:
    renderer = Renderer(ChatTemplate.model_validate(template), tokenizer)
    return trajectory_of(renderer, tokenizer, as_prompt(turns))


def check_chats(tokenizer: Any, count: int, seed: int) -> None:
    """Ids are the template's, and a token trains if and only if the assistant wrote it."""
    rng, renderer = random.Random(seed), Renderer(ChatTemplate(), tokenizer)
    ends = {tokenizer.eos_token_id}
    for _ in range(count):
        turns = chat(rng)
        found = trajectory_of(renderer, tokenizer, as_prompt(turns))
        whole = [*found.prompt_ids.tolist(), *found.completion_ids.tolist()]
        assert whole == tokenizer.apply_chat_template(turns, return_dict=False, tokenize=True)
        mask, ids = found.loss_mask, found.completion_ids
        trained = [token for token in ids[mask].tolist() if token not in ends]
        text = tokenizer.decode(trained)
        assert not any(each.isupper() or each.isdecimal() or each in "漢😀" for each in text)
        answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
        assert ids[mask].tolist().count(tokenizer.eos_token_id) == len(answers)
        starts = np.flatnonzero(mask & ~np.append(False, mask[:-1]))
        assert len(starts) == len(answers)
        for start, answer in zip(starts.tolist(), answers, strict=True):
            length = int(np.argmin(np.append(mask[start:], False)))
            said = tokenizer.decode(ids[start : start + length - 1].tolist())
            # White space at the edge may be one token with the template's own.
            assert answer.strip() == said.strip()


@pytest.mark.parametrize("name", ["student", "marked", "instruct", "trained"])
def test_ids_are_the_templates_and_only_the_assistants_train(name: str) -> None:
    check_chats(MAKERS[name](), 60, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["student", "instruct", "real"])
def test_ten_thousand_chats_over_three_tokenizers(name: str) -> None:
    check_chats(MAKERS[name](), 3_334, seed=2)


@pytest.mark.parametrize(
    ("turns", "template", "words"),
    [
        ([{"role": "user", "content": "A"}], {}, "messages have no assistant's turn"),
        ([{"role": "assistant", "content": "a"}], {}, "messages begin with the assistant's turn"),
        ([], {}, "is no list of messages"),
        ([{"role": "user"}, {"role": "assistant", "content": "a"}], {}, "turn 0 has no content"),
        (
            [{"role": "user", "content": "A<eos>"}, {"role": "assistant", "content": "a"}],
            {},
            "the user turn 'A<eos>' spells '<eos>'",
        ),
        (
            [{"role": "user", "content": "A"}, {"role": "assistant", "content": "a<eos>"}],
            {"control_tokens": "escape"},
            "the assistant turn 'a<eos>' spells '<eos>'",
        ),
    ],
)
def test_messages_that_are_no_trajectory_are_one_line(
    turns: Any, template: dict[str, Any], words: str
) -> None:
    reader = TrajectoryReader(ChatTemplate.model_validate(template), student_tokenizer())
    with pytest.raises(UserError, match=words) as error:
        reader.row("file line 3", {"messages": turns})
    assert "\n" not in str(error.value)
    assert "file line 3" in str(error.value)


THINKING = CHATML.replace(
    "{{ m.content or '' }}",
    "{{ m.content if loop.last else (m.content or '').split('</think>')[-1] }}",
)
TALK = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "<think>easy</think>4"},
    {"role": "user", "content": "3+3?"},
    {"role": "assistant", "content": "6"},
]


def test_a_template_that_writes_earlier_turns_anew_is_one_line() -> None:
    with pytest.raises(UserError, match=r"chat template writes '<think>easy.*set template.file"):
        of(student_tokenizer(THINKING), TALK)


@pytest.mark.parametrize(
    "template",
    [{"prefill": "So"}, {"control_tokens": "skip"}, {"final_answer": "continue"}],
)
def test_settings_of_one_answer_are_refused(template: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"template\..* is set with cache import of messages"):
        TrajectoryReader(ChatTemplate.model_validate(template), student_tokenizer())


def test_tools_and_calls_are_written_by_the_template() -> None:
    tools = [{"type": "function", "function": {"name": "SUM", "parameters": {}}}]
    call = {"type": "function", "function": {"name": "SUM", "arguments": '{"A": 1}'}}
    turns = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "two"},
    ]
    tokenizer = student_tokenizer("{{ tools | tojson if tools else '' }}" + CHATML)
    row = TrajectoryReader(ChatTemplate(), tokenizer).row("x", {"messages": turns, "tools": tools})
    assert "SUM" in tokenizer.decode(row["prompt_ids"])
    mask = np.array(row["loss_mask"])
    said = tokenizer.decode(np.array(row["completion_ids"])[mask].tolist())
    assert said == '{"NAME": "SUM", "ARGUMENTS": {"A": 1}}<eos>two<eos>'


# Rows of other programs

MASKED: dict[str, Any] = {
    "prompt_ids": [2, 3],
    "completion_ids": [4, 5, 6, 7],
    "loss_mask": [1, 0, 0, 1],
    "behavior_logprobs": [-0.5, -0.25],
    "teacher_logprobs": [-0.5, -2.0],
    "teacher_top_ids": [[4, 9], [7]],
    "teacher_top_logprobs": [[-0.5, -1.5], [-2.0]],
    "teacher_forced_logprobs": [[-3.0], [-4.0]],
}
TAIL = {"teacher_tail_logprobs": [-1.75, -0.15]}


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def imported(folder: Path, *rows: dict[str, Any], **options: Any) -> Any:
    """The rows of a file as a reader sees them."""
    source = written(folder / "rows.jsonl", *rows)
    store = Store(folder / "store")
    codec = options.pop("codec", ExactCodec(dtype="float32"))
    return open_scores(folder / "store" / import_scores(source, store, codec, **options).name)


@pytest.mark.parametrize("mask", [[1, 0, 0, 1], [True, False, False, True]])
def test_scores_of_the_tokens_that_train_are_enough(tmp_path: Path, mask: list[Any]) -> None:
    rows = imported(tmp_path, MASKED | {"loss_mask": mask}, stop_ids=[8])
    row = rows[0]
    assert row.loss_mask is not None
    assert row.loss_mask.tolist() == [True, False, False, True]
    assert row.behavior_logprobs.tolist() == [-0.5, 0, 0, -0.25]
    assert row.teacher_logprobs.tolist() == [-0.5, 0, 0, -2.0]
    assert row.teacher_forced_logprobs[:, 0].tolist() == [-3, -np.inf, -np.inf, -4]
    batch = collate([row], window_tokens=9)
    assert batch.completion_ids_N.tolist() == [4, 7]
    assert batch.positions_N.tolist() == [0, 3]
    assert batch.teacher_logprobs_N.tolist() == [-0.5, -2.0]


def test_the_first_marker_of_the_student_is_masked_whoever_wrote_one_before(tmp_path: Path) -> None:
    ids = {"completion_ids": [4, 7, 6, 7]}
    row = imported(tmp_path, MASKED | ids | {"loss_mask": [1, 0, 0, 1]})[0]
    assert trained_mask(row, 9, [7]).tolist() == [True, False, False, False]
    assert trained_mask(row, 9).tolist() == [True, False, False, True]


def test_entries_of_all_tokens_stay_as_they_are(tmp_path: Path) -> None:
    whole = MASKED | {
        "behavior_logprobs": [-0.5, 0.0, -1.0, -0.25],
        "teacher_logprobs": [-0.5, -1.0, 0.0, -2.0],
        "teacher_top_ids": [[4, 9], [5], [], [7]],
        "teacher_top_logprobs": [[-0.5, -1.5], [-1.0], [], [-2.0]],
        "teacher_forced_logprobs": [[-3.0], [-2.0], [0.0], [-4.0]],
    }
    row = imported(tmp_path, whole)[0]
    assert row.teacher_logprobs.tolist() == [-0.5, -1.0, 0.0, -2.0]
    assert row.teacher_top_ids[:, 0].tolist() == [4, 5, 6, 7]  # of no candidates: the token itself
    assert row.behavior_logprobs.tolist() == [-0.5, 0, -1.0, -0.25]


@pytest.mark.parametrize("codec", [ExactCodec(dtype="float32"), CompactCodec()])
def test_masks_come_back_from_an_export(tmp_path: Path, codec: Any) -> None:
    plain = {name: value for name, value in MASKED.items() if name != "loss_mask"}
    plain |= {"completion_ids": [4, 7], "prompt_id": "plain"}
    rows = imported(tmp_path, MASKED, plain, codec=codec)
    store = Store(tmp_path / "store")
    (scores,) = [store.artifact(recipe) for recipe in store.recipes("scores")]
    assert export_scores(store, scores, tmp_path / "out", form="parquet") == 2
    table = pq.read_table(tmp_path / "out" / "00000.parquet")
    assert table["loss_mask"].to_pylist() == [[True, False, False, True], [True, True]]
    again = import_scores(tmp_path / "out", Store(tmp_path / "other"), ExactCodec(dtype="float32"))
    found = open_scores(tmp_path / "other" / again.name)
    for old, new in [(rows[number], found[number]) for number in range(2)]:
        np.testing.assert_array_equal(old.loss_mask, new.loss_mask)
        np.testing.assert_array_equal(old.teacher_logprobs, new.teacher_logprobs)
    assert not list(damages(store, deep=True))


def test_rows_with_messages_become_ids(tmp_path: Path) -> None:
    tokenizer = student_tokenizer()
    found = of(tokenizer, TALK)
    trained = found.completion_ids[found.loss_mask].tolist()
    row = {
        "messages": TALK,
        "behavior_logprobs": [-1.0] * len(trained),
        "teacher_logprobs": [-0.5] * len(trained),
        "teacher_top_ids": [[token] for token in trained],
        "teacher_top_logprobs": [[-0.5]] * len(trained),
    }
    with pytest.raises(UserError, match=r"line 1 has messages in place of ids.*--tokenizer"):
        imported(tmp_path, row)
    reader = TrajectoryReader(ChatTemplate(), tokenizer)
    both = row | {"prompt_id": "both", "loss_mask": [True]}
    with pytest.raises(UserError, match="line 1 has messages and loss_mask"):
        imported(tmp_path, both, as_ids=reader.row)
    read = imported(tmp_path, row, as_ids=reader.row)[0]
    np.testing.assert_array_equal(read.completion_ids, found.completion_ids)
    np.testing.assert_array_equal(read.loss_mask, found.loss_mask)
    assert read.finish_reason == "stop"
    text = tokenizer.decode(collate([read], window_tokens=999).completion_ids_N.tolist())
    assert text == "<think>easy</think>4<eos>6<eos>"


def test_the_command_reads_messages_with_a_checkpoints_tokenizer(tmp_path: Path) -> None:
    student_tokenizer().save_pretrained(tmp_path / "model")
    row: dict[str, Any] = {"messages": TALK, "refused": "not asked"}
    row |= {"teacher_logprobs": [], "teacher_top_ids": [], "teacher_top_logprobs": []}
    row["behavior_logprobs"] = [-1.0] * int(of(student_tokenizer(), TALK).loss_mask.sum())
    source = written(tmp_path / "rows.jsonl", row)
    command = ["cache", "import", str(tmp_path / "store"), str(source), "--tokenizer"]
    with pytest.raises(UserError, match=r"--tokenizer .* is no folder"):
        app([*command, str(tmp_path / "none")], standalone_mode=False)
    wrong = [*command, str(tmp_path / "model"), "--template", "{kind: raw}"]
    with pytest.raises(UserError, match="is no chat template"):
        app(wrong, standalone_mode=False)
    app([*command, str(tmp_path / "model")], standalone_mode=False)
    (recipe,) = Store(tmp_path / "store").recipes("rollouts")
    assert "ids" in recipe.settings


def test_another_template_makes_another_artifact(tmp_path: Path) -> None:
    row = {"messages": TALK, "behavior_logprobs": []}
    row |= {"teacher_logprobs": [], "teacher_top_ids": [], "teacher_top_logprobs": []}
    row |= {"refused": "not asked"}
    names = set[str]()
    for template in (CHATML, CHATML.replace("<eos>\n", "<eos> ")):
        tokenizer = student_tokenizer(template)
        found = of(tokenizer, TALK)
        whole = row | {"behavior_logprobs": [0.0] * int(found.loss_mask.sum())}
        source = written(tmp_path / "rows.jsonl", whole)
        reader = TrajectoryReader(ChatTemplate(), tokenizer)
        store = Store(tmp_path / "store")
        names.add(import_scores(source, store, ExactCodec(), as_ids=reader.row).name)
    assert len(names) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss_mask": [1, 0, 1]}, "3 loss_mask for 4 completion tokens"),
        ({"loss_mask": [0, 0, 0, 0]}, "no token trains"),
        ({"loss_mask": [1, 0, 0, 2]}, r"loss_mask that are no such .*loss_mask\[3\]"),
        ({"loss_mask": "1001"}, "loss_mask that are no such"),
        ({"teacher_logprobs": [-0.5]}, "1 teacher_logprobs for 4 scored tokens"),
        ({"teacher_top_ids": [[4, 9]]}, "1 teacher_top_ids for 4 scored tokens"),
        (
            {"behavior_logprobs": [-0.5] * 3},
            r"3 behavior_logprobs for 4 completion tokens; expected one for each, or for each of",
        ),
        ({"messages": TALK}, "messages and completion_ids, loss_mask, prompt_ids"),
        ({"messages": "Hi."}, "messages and completion_ids"),
    ],
)
def test_a_bad_masked_row_is_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    reader = TrajectoryReader(ChatTemplate(), student_tokenizer())
    with pytest.raises(UserError, match=words) as error:
        imported(tmp_path, MASKED, MASKED | {"prompt_id": "b"} | change, as_ids=reader.row)
    assert "line 2" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "store").exists()


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 12),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.one_of(st.integers(-1, 9), st.text(max_size=2), st.none()), max_size=3),
    st.just({}),
    st.dictionaries(st.sampled_from(["role", "content", "from"]), st.text(max_size=2), max_size=3),
)
TALKED = {"messages": TALK, "tools": [{"name": "SUM"}], "behavior_logprobs": [-1.0] * 20}
TALKED |= {"teacher_logprobs": [0.0] * 20, "refused": "", "teacher_top_ids": [[3]] * 20}
TALKED |= {"teacher_top_logprobs": [[0.0]] * 20}


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    """A row with some values, items or columns changed, left out or doubled."""
    row: Any = json.loads(json.dumps(draw(st.sampled_from([MASKED, MASKED | TAIL, TALKED]))))
    for _ in range(draw(st.integers(1, 3))):
        here: Any = row
        key: Any = draw(st.sampled_from(sorted({*row, "loss_mask"})))
        while key in here if isinstance(here, dict) else True:
            inner = here[key]
            if not isinstance(inner, list | dict) or not inner or draw(st.booleans()):
                break
            here, key = (
                inner,
                draw(
                    st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner)))
                ),
            )
        change = draw(st.sampled_from(["replace", "remove", "double"]))
        if change == "remove" and (isinstance(here, list) or key in here):
            del here[key]
        elif change == "double" and isinstance(here, list):
            here.append(here[key])
        else:
            here[key] = draw(ODD)
    return row


@cache
def shared_reader() -> TrajectoryReader:
    return TrajectoryReader(ChatTemplate(), student_tokenizer())


def border(row: dict[str, Any], codec: Any) -> None:
    """A row is refused in one line, or read again."""
    folder = Path(tempfile.mkdtemp(prefix="border-"))
    try:
        source = written(folder / "rows.jsonl", row, MASKED | {"prompt_id": "another"} | TAIL)
        store = Store(folder / "store")
        made = refused = None
        try:
            made = import_scores(source, store, codec, as_ids=shared_reader().row)
        except UserError as error:
            refused = str(error)
        if refused is not None or made is None:
            assert "\n" not in str(refused)
            assert str(source) in str(refused)
            assert not (folder / "store").exists()
            return
        assert not list(damages(store, deep=True))
        for read in open_scores(f"{folder}/store/{made.name}"):
            assert read.loss_mask is not None
            assert read.loss_mask.any()
            assert len(read.loss_mask) == len(read.completion_ids)
    finally:
        shutil.rmtree(folder)


CODECS = st.sampled_from([ExactCodec(), CompactCodec()])


@given(row=mutated(), codec=CODECS)
@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_a_mutated_trajectory_is_refused_in_one_line_or_read(row: Any, codec: Any) -> None:
    border(row, codec)


@pytest.mark.slow
@given(row=mutated(), codec=CODECS)
@settings(max_examples=5_000, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_five_thousand_mutated_trajectories(row: Any, codec: Any) -> None:
    border(row, codec)
