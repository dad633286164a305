"""Messages and chat templates: what is written, what is refused, and that no day changes it."""

import json
import re
import resource
from concurrent.futures import ThreadPoolExecutor
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from transformers import AutoTokenizer

from opd_stream import rendering
from opd_stream.config_file import load_config
from opd_stream.errors import UserError
from opd_stream.messages import tools_of, turns_of, with_objects
from opd_stream.prompts import lost_rows, tokenised_prompts
from opd_stream.rendering import ChatTemplate, Prompt, RawTemplate, Renderer
from opd_stream.sources import FilePrompts, read_prompts, source_settings
from opd_stream.store.files import canonical_json, sha256, sha256_file
from stages.prompts import RULES

STUDENT = Path(__file__).parent.parent / "configs" / "models" / "ledger-student"
CHATML = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}<bos>{{ m.role }}\n{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    "{% endif %}"
)
SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "It is"}


def tokenizer(template: Any = CHATML) -> Any:
    found = AutoTokenizer.from_pretrained(STUDENT)
    found.chat_template = template
    return found


def prompt(*turns: dict[str, Any], text: str = "2+2?", **fields: Any) -> Prompt:
    return Prompt(prompt_id="row-0", text=text, answer=None, turns=turns or None, **fields)


def written(said: Prompt, template: Any = CHATML, **settings: Any) -> str:
    chat = ChatTemplate.model_validate(settings)
    reader = tokenizer(template)
    return reader.decode(Renderer(chat, reader).ids(said))


# What is written


def test_turns_are_written_as_the_template_of_transformers_writes_them() -> None:
    turns = (SYSTEM, USER, ANSWER, {"role": "user", "content": "And 3+3?"})
    reader = tokenizer()
    expected = reader.apply_chat_template(
        list(turns), add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert Renderer(ChatTemplate(), reader).ids(prompt(*turns)).tolist() == expected
    assert written(prompt(*turns)).endswith("<bos>user\nAnd 3+3?<eos>\n<bos>assistant\n")


@pytest.mark.parametrize(
    ("said", "settings", "end"),
    [
        (prompt(), {}, "<bos>user\n2+2?<eos>\n<bos>assistant\n"),
        (prompt(USER), {"text": "Q: {prompt}"}, "<bos>user\nQ: 2+2?<eos>\n<bos>assistant\n"),
        (prompt(USER), {"system": "Hm."}, "<bos>system\nHm.<eos>\n<bos>user\n2+2?<eos>\n<bos>assis"
         "tant\n"),
        (prompt(SYSTEM, USER), {"system": "Hm."}, "<bos>system\nHm.<eos>\n<bos>user\n2+2?<eos>\n"
         "<bos>assistant\n"),
        (prompt(), {"arguments": {"enable_thinking": False}}, "<bos>assistant\n<think></think>"),
        (prompt(), {"prefill": "<think>\n"}, "<bos>assistant\n<think>\n"),
        (prompt(), {"add_generation_prompt": False}, "<bos>user\n2+2?<eos>\n"),
        (prompt(USER, ANSWER), {"final_answer": "continue"}, "<bos>assistant\nIt is"),
        (prompt(USER, ANSWER), {"final_answer": "continue", "prefill": " 4"}, "\nIt is 4"),
        (prompt(USER, ANSWER), {"final_answer": "drop"}, "2+2?<eos>\n<bos>assistant\n"),
    ],
)  # fmt: skip
def test_settings_of_a_template_say_what_is_written(
    said: Prompt, settings: dict[str, Any], end: str
) -> None:
    text = written(said, **settings)
    assert text.endswith(end)
    if "system" in settings:
        assert text == end


def test_tools_and_calls_reach_the_template() -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    turns = (USER, {"role": "assistant", "content": None, "tool_calls": [call]},
             {"role": "tool", "content": "4"})  # fmt: skip
    text = written(prompt(*turns, tools=(tool,)))
    assert json.dumps([tool]) in text
    assert json.dumps([call]) in text
    with pytest.raises(UserError, match=r"leaves out the tool 'add' of prompt 'row-0'"):
        written(prompt(tools=(tool,)), CHATML.replace("if tools", "if false"))


@pytest.mark.parametrize(
    "writes", ["call.function.arguments | tojson", "'' + call.function.arguments"]
)
def test_arguments_of_calls_that_are_json_text_are_not_quoted_once_more(writes: str) -> None:
    template = (
        "{% for m in messages %}{{ m.content or '' }}{% for call in m.tool_calls or [] %}"
        f"<call>{{{{ {writes} }}}}</call>{{% endfor %}}{{% endfor %}}"
    )
    function = {"name": "add", "arguments": '{"a": 2}'}
    turns = (USER, {"role": "assistant", "content": None,
                    "tool_calls": [{"type": "function", "function": function}]},
             {"role": "tool", "content": "4"})  # fmt: skip
    assert '<call>{"a": 2}</call>' in written(prompt(*turns), template)


def test_a_file_or_a_name_chooses_another_template(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("[{{ messages[0].content }}]")
    assert written(prompt(), file=path) == "[2+2?]"
    several = {"default": CHATML, "short": "({{ messages[0].content }})"}
    assert written(prompt(), several, name="short") == "(2+2?)"
    assert written(prompt(), several).endswith("assistant\n")
    with pytest.raises(UserError, match=r"the tokenizer has default, short; set template\.name"):
        written(prompt(), several, name="long")
    with pytest.raises(UserError, match=r"has one, without a name; leave template\.name out"):
        written(prompt(), name="long")
    with pytest.raises(UserError, match=r"none\.jinja cannot be read"):
        written(prompt(), file=tmp_path / "none.jinja")


def test_a_template_file_is_in_the_recipe_by_content_and_relative_to_its_config(
    tmp_path: Path,
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    (tmp_path / "c.yaml").write_text(
        "{rounds: 1, student: {path: s}, teacher: {path: t}, train: {objective: {kind: mc}, "
        "learning_rate: 1}, rollouts: {prompts_per_round: 1, extra_draws: 1, window: {kind: fixed,"
        " tokens: 1}}, prompts: {kind: jsonl, path: rows.jsonl, template: {kind: chat, "
        "file: mine.jinja, date: 2026-01-02, arguments: {enable_thinking: false}}}}"
    )
    source = load_config(tmp_path / "c.yaml", []).prompts
    settings = source_settings(source)["template"]
    assert settings.pop("file") == sha256_file(tmp_path / "mine.jinja")
    assert settings == {
        "kind": "chat",
        "text": "{prompt}",
        "system": None,
        "date": "2026-01-02",
        "arguments": {"enable_thinking": False},
    }


# The date


CLOCK = "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}"


def test_a_template_that_reads_the_clock_needs_a_date_and_writes_that() -> None:
    with pytest.raises(UserError, match=r"writes today's date, .*; fix it: set template\.date, "):
        written(prompt(), CLOCK)
    assert written(prompt(), CLOCK, date=date(2024, 7, 26)) == "26 Jul 2024 2+2?"
    given = {"arguments": {"date_string": "1 May"}}
    either = "{{ date_string if date_string is defined else strftime_now('%Y') }} 2+2?"
    assert written(prompt(), either, **given) == "1 May 2+2?"


# What is refused


GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("said", "template", "settings", "line"),
    [
        (prompt(), GEMMA, {"system": "Be brief."}, "does not take prompt 'row-0': System role not "
         "supported; leave out template.system, or set template.file"),
        (prompt(SYSTEM, USER), GEMMA, {}, "not supported; set template.file"),
        (prompt(), "{{ messages[5].content.x }}", {}, "does not take prompt 'row-0'"),
        (prompt(), "{% if %}", {}, "does not take prompt 'row-0'"),
        (prompt(), "{{ messages[0].role }}", {}, "leaves out the user turn '2[+]2[?]'"),
        (prompt(SYSTEM, USER), "{{ messages[1].content }}", {}, "leaves out the system turn 'Be"),
        (prompt(), None, {}, "tokenizer has no chat template; set template.kind=raw"),
        (prompt(), {"a": CHATML, "b": CHATML}, {}, "template.name is not set; the tokenizer has a"),
        (prompt(USER, ANSWER), CHATML, {}, "ends with the assistant's turn; .*final_answer=drop"),
        (prompt(ANSWER), CHATML, {"final_answer": "drop"}, "has no turn but the assistant's"),
    ],
)  # fmt: skip
def test_what_a_template_does_not_take_is_one_line(
    said: Prompt, template: Any, settings: dict[str, Any], line: str
) -> None:
    with pytest.raises(UserError, match=line) as refused:
        written(said, template, **settings)
    assert "\n" not in str(refused.value)


def test_messages_under_a_raw_template_are_refused() -> None:
    with pytest.raises(UserError, match=r"is a list of messages and .*set template=\{kind: chat\}"):
        Renderer(RawTemplate(), tokenizer()).ids(prompt(USER))


@pytest.mark.parametrize("name", ["messages", "strftime_now", "add_generation_prompt"])
def test_an_argument_that_a_setting_decides_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match=f"template.arguments names {name}, which"):
        ChatTemplate(arguments={name: True})


# Control tokens


def rows_file(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_control_tokens_in_text_are_refused_escaped_skipped_or_allowed(tmp_path: Path) -> None:
    rows = [{"prompt": "plain < eos>"}, {"prompt": "end <eos> it"}, {"messages": [USER]}]
    path = rows_file(tmp_path, *rows)

    def table(policy: str) -> Any:
        template = {"kind": "chat", "control_tokens": policy}
        fields = {"kind": "jsonl", "path": path, "template": template}
        return tokenised_prompts(FilePrompts.model_validate(fields), tokenizer())

    with pytest.raises(UserError, match="1 of 3 prompts spell control tokens, the first 'row-1' "):
        table("refuse")
    ends = tokenizer().eos_token_id
    for policy, kept, tokens in (("escape", 3, 1), ("allow", 3, 2), ("skip", 2, 1)):
        found = table(policy).table
        assert found.num_rows == kept
        assert found["prompt_ids"][min(1, kept - 1)].as_py().count(ends) == tokens
    assert list(lost_rows("prompts", 2, table("skip").lost)) == [
        "prompts: 1 of 3 rows are left out: control tokens in their text "
        "(template.control_tokens=skip)"
    ]
    ids = table("escape").table["prompt_ids"][1].as_py()
    assert "end < eos> it" in tokenizer().decode(ids)


def test_control_tokens_in_the_assistants_turns_are_its_own() -> None:
    said = prompt(USER, {"role": "assistant", "content": "4<eos>"}, USER)
    assert Renderer(ChatTemplate(), tokenizer()).control_tokens(said) == []


# Rows with messages


SHARE_GPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "2+2?"},
    {"from": "gpt", "value": "It is"},
]


def test_messages_are_found_by_shape_or_by_name(tmp_path: Path) -> None:
    turns = [SYSTEM, USER, ANSWER]
    parts = [{"type": "text", "text": "2"}, {"type": "text", "text": "+2?"}]
    rows: list[dict[str, Any]] = [
        {"prompt": turns},
        {"messages": turns},
        {"conversations": SHARE_GPT},
        {"prompt": [SYSTEM, {"role": "user", "content": parts}, ANSWER]},
    ]
    found = read_prompts(FilePrompts(kind="jsonl", path=rows_file(tmp_path, *rows)))
    assert [list(each.turns or ()) for each in found] == [turns] * 4
    assert found[0].text == json.dumps(turns)
    named = FilePrompts(kind="jsonl", path=rows_file(tmp_path, {"x": {"y": turns}, "prompt": "a"}))
    (one,) = read_prompts(named.model_copy(update={"messages_field": "x.y"}))
    assert list(one.turns or ()) == turns


def test_messages_of_a_table_have_no_empty_fields(tmp_path: Path) -> None:
    turns = [USER, {**ANSWER, "name": "Anna"}]
    tools = [{"type": "function", "function": {"name": "add"}}]
    rows = [{"prompt": turns, "tools": json.dumps(tools), "reward_model": {"ground_truth": "4"}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "verl.parquet")
    source = FilePrompts(
        kind="files", path=tmp_path / "verl.parquet", answer_field="reward_model.ground_truth"
    )
    (found,) = read_prompts(source)
    assert list(found.turns or ()) == turns
    assert list(found.tools or ()) == tools
    assert found.answer == "4"


def test_messages_may_hold_what_json_has_not(tmp_path: Path) -> None:
    turn = {**USER, "timestamp": datetime(2024, 1, 31, 12)}
    pq.write_table(pa.Table.from_pylist([{"prompt": [turn]}]), tmp_path / "a.parquet")
    (found,) = read_prompts(FilePrompts(kind="files", path=tmp_path / "a.parquet"))
    assert list(found.turns or ()) == [turn]
    assert json.loads(found.text) == [{**USER, "timestamp": "2024-01-31 12:00:00"}]


@pytest.mark.parametrize(
    ("turns", "line"),
    [
        ([], "place is no list of messages"),
        ([{"role": "user", "content": None, "tool_calls": []}], "turn 0 has no content"),
        ([{"role": "user", "content": None, "tool_calls": [{}]}], "turn 0 has no content"),
        ([USER, "text"], "place is no list of messages"),
        ([{"role": "user"}], "place: turn 0 has no content"),
        ([USER, {"role": "user", "content": 3}], "place: turn 1 holds a int"),
        ([{"role": 1, "content": "a"}], "place: turn 0 has the role 1"),
        ([USER, {"role": "tool", "content": "\ud800"}], r"turn 1 holds \\ud800 alone, half"),
        ([{"role": "user", "content": [{"type": "image"}]}], "holds parts of type image"),
    ],
)
def test_malformed_messages_name_the_turn(turns: Any, line: str) -> None:
    with pytest.raises(UserError, match=line):
        turns_of(turns, "place")


def test_bad_messages_in_a_file_name_the_line(tmp_path: Path) -> None:
    for row, line in (
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, r"jsonl:1: .*turn 0 holds \\ud83d"),
        ({"messages": [USER], "tools": "none"}, r"rows\.jsonl:1 holds no list of tool schemas"),
    ):
        with pytest.raises(UserError, match=line):
            read_prompts(FilePrompts(kind="jsonl", path=rows_file(tmp_path, row)))


ODD = [{"from": None, "value": "a"}, *({**ANSWER, "tool_calls": calls} for calls in (5, ["f"]))]


@pytest.mark.parametrize("turn", ODD)
def test_turns_of_odd_shapes_are_refused(turn: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"the role None|tool_calls that are no list"):
        turns_of([turn], "rows.jsonl line 1")


# `RULES` -> digest of what they make of the rows below
RULED = {1: "91036a6720e1438ae268469a403cab246631960c7efb09a05ae4e84d106d6e08"}


def test_prompts_change_only_with_the_number_of_the_rules(tmp_path: Path) -> None:
    """If this fails, artifacts made before would be taken for others: raise `RULES`."""
    rows: list[dict[str, Any]] = [
        {"prompt": "Wie viel ist 2 + 2?", "answer": 4},
        {"prompt": " <bos> 1.50 €\r\n", "answer": ["3/2", "1.5"]},
        {"messages": [SYSTEM, USER, ANSWER], "answer": None},
        {"messages": [{"from": "human", "value": "2+2?"}], "answer": {"a": True}["a"]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Look up "}]},
                {"role": "assistant", "content": None, "tool_calls": [
                    {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
                ]},
                {"role": "tool", "content": "one", "name": "f"},
            ],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
            "answer": 0.1,
        },
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found: list[Any] = []
    reader, more = tokenizer(), {"final_answer": "continue", "system": "S", "text": "Q: {prompt}"}
    for number, settings in enumerate(
        [{}, {"kind": "raw", "bos": "always"}, {"control_tokens": "escape", **more}]
    ):
        template = {"kind": "chat", "control_tokens": "skip", "final_answer": "drop", **settings}
        if template["kind"] == "raw":
            template = settings
        source = FilePrompts(
            kind="files",
            path=tmp_path / "rows.jsonl",
            template=template,  # type: ignore[arg-type]
            answer_field="answer",
            limit=2 if number == 1 else None,
        )
        found.append(tokenised_prompts(source, reader).table.to_pylist())
    assert sha256(canonical_json(found)) == RULED[RULES]


def test_an_endless_template_is_ended_and_one_that_reaches_out_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rendering, "TEMPLATE_SECONDS", 0.2)  # of processor time
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    for endless in (loop, "{{ 9 ** (9 ** 9) }}"):
        with pytest.raises(UserError, match=r"the chat template ran for 0\.2 s .* expected an end"):
            Renderer(ChatTemplate(), tokenizer(endless)).ids(prompt(USER))
    for reaching in ("{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}"):
        with pytest.raises(UserError, match=r"does not take prompt .* template\.file"):
            Renderer(ChatTemplate(), tokenizer(reaching)).ids(prompt(USER))


@pytest.mark.parametrize(
    ("template", "line"),
    [
        ("{{ 'a'.center(3000000000) }}", "needs more than 1,073,741,824 bytes of memory"),
        ("{{ '%3000000000d' % 1 }}", "needs more than 1,073,741,824 bytes of memory"),
        ("{{ messages|tojson(indent=3000000000) }}", "needs more than 1,073,741,824 bytes of mem"),
        ("{% for _ in range(999) %}{{ 'a' * 99999 }}{% endfor %}", "writes 99,899,001 characters"),
        ("{{ [1, 2]|random }}", "draws at random"),
        ("{{ lipsum() }}", "draws at random"),
        ("{{ messages[0].items }}", "writes '<built-in method items of dict object at 0x"),
        ("{{ messages|map(attribute='role') }}", "writes '<generator object sync_do_map at 0x"),
        ("{{ '\\ud800' }}", "writes '\\ud800', half a surrogate pair"),
        ("{{ raise_exception() }}", "does not take prompt 'row-0'"),
    ],
)
def test_a_template_that_is_large_or_another_text_each_time_is_refused(
    template: str, line: str
) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(UserError, match=re.escape(line)) as refused:
        Renderer(ChatTemplate(), tokenizer(template)).ids(prompt(USER))
    assert "\n" not in str(refused.value)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_memory_is_bounded_in_a_thread_too_and_an_address_in_a_prompt_is_text() -> None:
    said = prompt({"role": "user", "content": "What is <object object at 0x7f784de5e900>?"})
    with ThreadPoolExecutor(1) as threads:
        large = Renderer(ChatTemplate(), tokenizer("{{ 'a'.center(3000000000) }}"))
        with pytest.raises(UserError, match="bytes of memory"):
            threads.submit(large.ids, said).result()
        sound = Renderer(ChatTemplate(), tokenizer())
        assert len(threads.submit(sound.ids, said).result())


def test_text_that_is_nested_too_deep_is_text() -> None:
    with pytest.raises(UserError, match="row 1 holds no list of tool schemas"):
        tools_of("[" * 9999, "row 1")
    call = {"function": {"name": "f", "arguments": "[" * 9999}}
    assert with_objects([{"role": "assistant", "tool_calls": [call]}])[0]["tool_calls"] == [call]
