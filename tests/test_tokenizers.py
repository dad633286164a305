"""Tokenizers by meaning: what is written otherwise is the same, what means otherwise is named."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from opd_stream.errors import UserError
from opd_stream.store.policy import identify
from opd_stream.store.store import Store
from opd_stream.store.tokenizer_folder import misread_line, open_tokenizer, tokenizer_digest
from opd_stream.store.tokenizer_identity import (
    TokenizerComparison,
    compare_tokenizers,
    read_meaning,
    tokenizer_meaning,
)
from stages.checkpoints import Checkpoint, check_pair, open_checkpoint
from tests.tiny_tokenizers import byte_level, metaspace, unigram

MODELS = Path(__file__).parent.parent / "configs" / "models"
STUDENT, TEACHER = MODELS / "ledger-student", MODELS / "ledger-teacher"
Json = dict[str, Any]
Change = Callable[[Json], object]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tokenizers of each family."""
    root = tmp_path_factory.mktemp("tokenizers")
    for name, tokenizer in (
        ("byte_level", byte_level()),
        ("metaspace", metaspace()),
        ("unigram", unigram()),
    ):
        tokenizer.save_pretrained(root / name)
    shutil.copytree(STUDENT, root / "student", ignore=shutil.ignore_patterns("*.safetensors"))
    return {path.name: path for path in root.iterdir()}


FAMILIES = ("byte_level", "metaspace", "unigram", "student")


def specification(folder: Path) -> Json:
    return json.loads((folder / "tokenizer.json").read_text())


def shuffled(value: Any, order: random.Random) -> Any:
    """The same JSON with the keys of every object in another order."""
    if isinstance(value, list):
        return [shuffled(each, order) for each in value]
    if not isinstance(value, dict):
        return value
    names = order.sample(sorted(value), len(value))
    return {name: shuffled(value[name], order) for name in names}


def older(spec: Json) -> Json:
    """As earlier versions wrote it: merges as text, no word of options that are off."""
    model = {
        name: part for name, part in spec["model"].items() if part is not None and part is not False
    }
    if "merges" in model:
        model["merges"] = [" ".join(pair) for pair in model["merges"]]
    return {name: part for name, part in spec.items() if part} | {"model": model}


def bounded(spec: Json) -> Json:
    """With the blocks that a call with truncation and padding leaves in the file."""
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.enable_truncation(64)
    tokenizer.enable_padding(pad_id=0, pad_token="<pad>")
    return json.loads(tokenizer.to_str())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("write", [older, bounded, lambda spec: shuffled(spec, random.Random(0))])
def test_what_is_written_otherwise_is_the_same(
    family: str, write: Callable[[Json], Json], folders: dict[str, Path], tmp_path: Path
) -> None:
    text = json.dumps(write(specification(folders[family])))
    (tmp_path / "tokenizer.json").write_text(text)
    assert text != (folders[family] / "tokenizer.json").read_text()
    written, before = (
        read_meaning(each / "tokenizer.json") for each in (tmp_path, folders[family])
    )
    assert written.digest == before.digest


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tokenizer_that_transformers_saved_again_is_the_same(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders[family])
    tokenizer(["a b", "c"], padding=tokenizer.pad_token is not None, truncation=True, max_length=64)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_digest(tmp_path) == tokenizer_digest(folders[family])


def test_flags_that_change_no_token_are_left_out(tmp_path: Path) -> None:
    spec = specification(STUDENT)
    spec["pre_tokenizer"]["pretokenizers"][1]["trim_offsets"] = False
    spec["decoder"] = {**spec["decoder"], "use_regex": False, "add_prefix_space": False}
    spec["post_processor"] = {"type": "Sequence", "processors": [spec["post_processor"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert tokenizer_digest(tmp_path) == tokenizer_digest(STUDENT)


def compared(change: Change, folder: Path, tmp_path: Path) -> TokenizerComparison:
    """A student with a tokenizer, and a teacher with that tokenizer changed."""
    spec = specification(folder)
    change(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert tokenizer_digest(tmp_path) != tokenizer_digest(folder)
    return compare_tokenizers(*(read_meaning(f / "tokenizer.json") for f in (folder, tmp_path)))


def renamed(spec: Json) -> None:
    vocabulary = spec["model"]["vocab"]
    vocabulary["%%"] = vocabulary.pop("%")


def exchanged(spec: Json) -> None:
    vocabulary = spec["model"]["vocab"]
    vocabulary["!"], vocabulary['"'] = vocabulary['"'], vocabulary["!"]


def one_piece_more(spec: Json) -> None:
    spec["model"]["vocab"]["ĠĠ"] = 606


def merges_exchanged(spec: Json) -> None:
    merges = spec["model"]["merges"]
    merges[3], merges[4] = merges[4], merges[3]


def added(content: str, number: int) -> Json:
    off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, "special": True, **off}


REAL = [
    (renamed, 'id 7 is "%" for the student and "%%" for the teacher'),
    (exchanged, r'id 3 is "!" for the student and "\"" for the teacher (2 of 606 shared ids'),
    (one_piece_more, 'id 606, "ĠĠ", is a piece of the teacher\'s alone'),
    (merges_exchanged, "merge 3 is "),
    (lambda s: s["model"]["merges"].pop(), "the student has 347 merges, the teacher 346"),
    (lambda s: s["model"].update(dropout=0.1), "leaves out merges at a rate of 0, the teacher 0.1"),
    (lambda s: s.update(normalizer={"type": "Lowercase"}), 'the normalizers differ: "The" is '),
    (
        lambda s: s.update(pre_tokenizer=s["pre_tokenizer"]["pretokenizers"][1]),
        r"only the student's pre_tokenizer has the step Split \d Isolated",
    ),
    (
        lambda s: s["pre_tokenizer"]["pretokenizers"].append(
            {"type": "Digits", "individual_digits": True}
        ),
        "only the teacher's pre_tokenizer has the step Digits",
    ),
    (
        lambda s: s["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "WhitespaceSplit"}),
        'the pre-tokenizers differ: "',
    ),
    (lambda s: s["added_tokens"][0].update(content="<other>"), 'id 0 is "<pad>" for the student'),
]


@pytest.mark.parametrize(("change", "line"), REAL)
def test_a_real_difference_is_named(change: Change, line: str, tmp_path: Path) -> None:
    found = compared(change, STUDENT, tmp_path)
    assert found.difference is not None
    assert line in found.difference
    assert "\n" not in found.difference
    assert found.remarks == ()


def test_one_side_that_splits_digits_is_named_with_an_example(tmp_path: Path) -> None:
    spec = specification(STUDENT)
    spec["model"]["vocab"]["12"] = 606
    spec["model"]["merges"].append(["1", "2"])
    one = tokenizer_meaning(Tokenizer.from_str(json.dumps(spec)))
    spec["pre_tokenizer"] = spec["pre_tokenizer"]["pretokenizers"][1]
    other = tokenizer_meaning(Tokenizer.from_str(json.dumps(spec)))
    found = compare_tokenizers(one, other).difference
    assert found is not None
    assert found.startswith('the pre-tokenizers differ: "1234567890" is "1" "2" "3" ')
    assert ' for the student and "12" "3" ' in found


def test_scores_of_a_unigram_and_another_kind_are_differences(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    def dearer(spec: Json) -> None:
        spec["model"]["vocab"][5][1] -= 0.5

    assert "score 5 is " in str(compared(dearer, folders["unigram"], tmp_path).difference)
    kinds = [models.BPE({"a": 0}, []), models.WordLevel({"a": 0}, unk_token="a")]
    bpe, words = (tokenizer_meaning(Tokenizer(kind)) for kind in kinds)
    assert compare_tokenizers(bpe, words).difference == (
        "the student's tokenizer is BPE, the teacher's WordLevel"
    )


def test_added_tokens_of_one_side_are_no_difference(tmp_path: Path) -> None:
    more = compared(
        lambda spec: spec["added_tokens"].extend([added("<a>", 606), added("<b>", 607)]),
        STUDENT,
        tmp_path,
    )
    assert more == TokenizerComparison(teacher_only=(606, 607))
    meanings = [read_meaning(folder / "tokenizer.json") for folder in (tmp_path, STUDENT)]
    assert compare_tokenizers(*meanings) == TokenizerComparison(student_only=(606, 607))


def test_an_added_token_under_another_id_is_a_difference() -> None:
    spec = specification(STUDENT)
    one, other = (
        tokenizer_meaning(Tokenizer.from_str(json.dumps({**spec, "added_tokens": tokens})))
        for tokens in (
            [*spec["added_tokens"], added("<a>", 606)],
            [*spec["added_tokens"], added("<b>", 606), added("<a>", 607)],
        )
    )
    assert compare_tokenizers(one, other).difference == (
        'id 606 is "<a>" for the student and "<b>" for the teacher'
    )


def test_how_a_text_begins_is_a_remark(folders: dict[str, Path], tmp_path: Path) -> None:
    def begins(spec: Json) -> None:
        bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
        spec["post_processor"]["single"].insert(0, bos)
        named = {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}
        spec["post_processor"]["special_tokens"] = {"<bos>": named}

    found = compared(begins, STUDENT, tmp_path)
    assert found.difference is None
    assert found.remarks == (
        "the student's tokenizer puts nothing before a text, the teacher's \"<bos>\"",
    )
    flags = compared(lambda s: s["added_tokens"][1].update(lstrip=True), STUDENT, tmp_path)
    assert flags.remarks == ("<eos> has no flag for the student, lstrip for the teacher",)


def test_the_two_ways_to_write_a_space_mark_cut_alike(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """A normaliser as in Llama's file, or the pre-tokenizer that transformers saves for it."""

    def newer(spec: Json) -> None:
        mark = {"replacement": "▁", "prepend_scheme": "always", "split": False}
        spec |= {"normalizer": None, "pre_tokenizer": {"type": "Metaspace", **mark}}

    found = compared(newer, folders["metaspace"], tmp_path)
    assert found.difference is None
    assert found.remarks == (
        "the normalizers and pre-tokenizers are written differently, and cut texts alike",
    )


def checkpoint(folder: Path, store: Path) -> Checkpoint:
    return open_checkpoint(Store(str(store)), folder)


def test_a_pair_is_refused_with_both_remedies_where_they_fit(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(TEACHER, teacher)
    student = checkpoint(STUDENT, tmp_path / "store")
    for name, other in (("byte_level", ", or set scores.alignment={kind: bytes}"), ("words", "")):
        if name in folders:
            shutil.copy(folders[name] / "tokenizer.json", teacher)
        else:
            words = Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
            words.save(str(teacher / "tokenizer.json"))
        pair = student, checkpoint(teacher, tmp_path / "store")
        with pytest.raises(UserError, match=r"have different tokenizers: id \d+ is") as refused:
            check_pair(*pair)
        line = str(refused.value)
        assert line.endswith(f"use a teacher with the student's tokenizer{other}")
        check_pair(*pair, aligns=True)


def test_a_student_that_could_never_end_a_text_is_refused(tmp_path: Path) -> None:
    folder, spec = tmp_path / "student", specification(STUDENT)
    shutil.copytree(STUDENT, folder)
    spec["added_tokens"].append(added("<end>", 606))
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    teacher = checkpoint(TEACHER, tmp_path / "store")
    for ends, is_refused in (([606], True), ([1, 606], False)):
        for name in ("config.json", "generation_config.json"):
            settings = json.loads((STUDENT / name).read_text()) | {"eos_token_id": ends}
            if name == "config.json":
                settings["vocab_size"] = 640
            (folder / name).write_text(json.dumps(settings))
        student = checkpoint(folder, tmp_path / "store")
        if not is_refused:
            check_pair(student, teacher)
            continue
        with pytest.raises(UserError, match="ends texts with id 606, and the models share ids bel"):
            check_pair(student, teacher)


def test_a_folder_with_older_files_is_compared_as_transformers_reads_it(tmp_path: Path) -> None:
    spec, plain = specification(STUDENT), tmp_path / "plain"
    shutil.copytree(STUDENT, plain)
    spec["pre_tokenizer"] = spec["pre_tokenizer"]["pretokenizers"][1]  # as that class has it
    (plain / "tokenizer.json").write_text(json.dumps(spec))
    student = checkpoint(plain, tmp_path / "store")
    for merges in (347, 1):
        folder = tmp_path / str(merges)
        shutil.copytree(TEACHER, folder)
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text(json.dumps(spec["model"]["vocab"]))
        lines = ["#version: 0.2", *(" ".join(pair) for pair in spec["model"]["merges"][:merges])]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n")
        settings = json.dumps({"tokenizer_class": "GPT2Tokenizer"})
        (folder / "tokenizer_config.json").write_text(settings)
    whole, cut = (checkpoint(tmp_path / name, tmp_path / "store") for name in ("347", "1"))
    assert whole.identity.tokenizer_sha256 != student.identity.tokenizer_sha256
    check_pair(student, whole)
    with pytest.raises(UserError, match="the student has 347 merges, the teacher 1;"):
        check_pair(student, cut)


def test_a_tokenizer_that_its_class_misreads_is_read_as_the_file_has_it(tmp_path: Path) -> None:
    """As DeepSeek's distillates, which name the class of another family."""
    text, folders = "Anna has 12 coins", {}
    for name in ("LlamaTokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast"):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        shutil.copy(STUDENT / "tokenizer.json", folders[name])
        settings = json.dumps({"tokenizer_class": name, "eos_token": "<eos>"})
        (folders[name] / "tokenizer_config.json").write_text(settings)
    misread = AutoTokenizer.from_pretrained(folders["LlamaTokenizer"])
    read = {name: open_tokenizer(folder) for name, folder in folders.items()}
    ids = Tokenizer.from_file(str(STUDENT / "tokenizer.json")).encode(text).ids
    assert misread(text)["input_ids"] != ids
    assert all(tokenizer(text)["input_ids"] == ids for tokenizer in read.values())
    lines = {name: list(misread_line(folder)) for name, folder in folders.items()}
    assert lines["PreTrainedTokenizerFast"] == []
    (line,) = lines["LlamaTokenizer"]
    assert "as LlamaTokenizer, which cuts texts otherwise than its tokenizer.json" in line


def test_policies_of_a_run_have_the_tokenizer_of_their_base(finished_run: Path) -> None:
    store = Store(str(finished_run / "store"))
    manifests = [store.policy(recipe).manifest() for recipe in store.recipes("policies")]
    digests = {manifest.tokenizer_sha256 for manifest in manifests}
    assert digests == {tokenizer_digest(STUDENT)} == {tokenizer_digest(TEACHER)}


def test_the_digest_of_the_meaning_is_remembered_beside_that_of_the_bytes(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    assert store.identify(STUDENT) == identify(STUDENT) == store.identify(STUDENT)
    path = STUDENT / "tokenizer.json"
    remembered = [json.loads(p.read_text()) for p in store.digests.glob("*.json")]
    (own,) = [each["sha256"] for each in remembered if each["file"] == STUDENT.name]
    assert own == read_meaning(path).digest


def with_settings(source: Path, folder: Path, **settings: Any) -> Path:
    """A copy of a checkpoint with other fields in tokenizer_config.json."""
    shutil.copytree(source, folder)
    path = folder / "tokenizer_config.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**before, **settings}))
    return folder


TOKEN = {"content": "coins", "lstrip": False, "rstrip": False, "normalized": False}
FIELDS: list[dict[str, Any]] = [
    {"extra_special_tokens": {"image_token": "<image>"}},
    {"additional_special_tokens": ["Anna"]},
    {"added_tokens_decoder": {"606": {**TOKEN, "single_word": False, "special": False}}},
    {"added_tokens_decoder": {"606": {**TOKEN, "single_word": False, "special": True}}},
    {"tokenizer_class": "LlamaTokenizer"},
    {"tokenizer_class": "GemmaTokenizer"},
    {"tokenizer_class": "GPT2Tokenizer"},
    {"add_prefix_space": False},
    {"add_bos_token": True, "bos_token": "<eos>"},
    {"padding_side": "right", "model_max_length": 900, "clean_up_tokenization_spaces": True},
]
TEXTS = ("Anna has 12 coins", " Anna  has\n12 <image> coins", "coins", "", "x Anna<eos>coins ")


def test_folders_of_one_identity_give_the_same_ids(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    ids: dict[tuple[str, str], set[str]] = {}
    for family, source in folders.items():
        for number, fields in enumerate([{}, *FIELDS]):
            folder = tmp_path / f"{family}{number}"
            shutil.copytree(STUDENT, folder)
            shutil.copy(source / "tokenizer.json", folder)
            settings = {"eos_token": "<eos>", **fields}
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
            found = identify(folder)
            key = (found.tokenizer_sha256, found.rendering_sha256)
            read = open_tokenizer(folder)(list(TEXTS))["input_ids"]
            ids.setdefault(key, set()).add(json.dumps(read))
    assert all(len(each) == 1 for each in ids.values())
    assert len(ids) > len(folders) + 8  # most fields change one of the two digests


def test_an_edited_template_is_read_again(tmp_path: Path) -> None:
    folder = with_settings(STUDENT, tmp_path / "student")
    turns = [{"role": "user", "content": "Hi"}]
    for text in ("one", "two"):
        (folder / "chat_template.jinja").write_text(text)
        assert open_tokenizer(folder).apply_chat_template(turns, tokenize=False) == text


def test_a_token_that_only_the_settings_name_is_part_of_the_pair(tmp_path: Path) -> None:
    store, token = tmp_path / "store", {**TOKEN, "single_word": False, "special": False}
    one, other = (
        checkpoint(
            with_settings(
                STUDENT, tmp_path / name, added_tokens_decoder={"606": {**token, "content": name}}
            ),
            store,
        )
        for name in ("<image>", "<tool>")
    )
    with pytest.raises(UserError, match='id 606 is "<image>" for the student and "<tool>"'):
        check_pair(one, other)
    assert one.known_ids == 606  # the head has no more
    before = one.identity
    path = one.folder / "tokenizer_config.json"
    path.write_text(path.read_text().replace("<image>", "<photo>"))  # an edit in place is seen
    assert identify(one.folder).tokenizer_sha256 != before.tokenizer_sha256


BROKEN: list[tuple[str, str | bytes, str]] = [
    ("tokenizer.json", '{"version": "1.0", "added_to', "EOF while parsing"),
    ("tokenizer.json", "[]", "invalid type"),
    ("tokenizer.json", "null", "invalid type"),
    ("tokenizer.json", b"\x80\x00\xff\xfe" * 9, "utf-8"),
    ("tokenizer.json", '{"model": {"type": "BPE", "vocab": null, "merges": []}}', "null"),
    ("tokenizer.json", '{"model": {"vocab": {"a": -1}, "merges": []}}', "is no readable"),
    ("tokenizer.json", '{"model": {"vocab": {"a": 4000000000}, "merges": []}}', "id 4000000000"),
    ("tokenizer.json", '{"model": {"vocab": {"a": 1e30}, "merges": []}}', "is no readable"),
    ("tokenizer.json", '{"model": {"vocab": {"a": 0}, "merges": ["a b"]}}', "is no readable"),
    ("tokenizer.json", "[" * 50_000, "is no readable"),
    ("tokenizer_config.json", '{"bos_token": "<b', "cannot be read"),
    ("tokenizer_config.json", "[1]", "holds a list; expected a JSON object"),
    ("tokenizer_config.json", b"\xff\xfe\x00", "cannot be read"),
    ("tokenizer_config.json", "[" * 50_000, "cannot be read"),
    ("tokenizer_config.json", '{"eos_token": 5}', "eos_token is 5"),
    ("tokenizer_config.json", '{"added_tokens_decoder": []}', r"added_tokens_decoder is \[\]"),
    ("tokenizer_config.json", '{"chat_template": [1]}', r"chat_template is \[1\]"),
    ("tokenizer_config.json", '{"model_max_length": "x"}', "model_max_length is 'x'"),
    ("chat_template.jinja", b"\xff\xfe", "is not UTF-8 text"),
    ("config.json", "[]", "holds a list"),
]


@pytest.mark.parametrize(("file", "content", "line"), BROKEN)
def test_a_broken_file_of_a_checkpoint_is_one_line(
    file: str, content: str | bytes, line: str, tmp_path: Path
) -> None:
    folder = tmp_path / "student"
    shutil.copytree(STUDENT, folder)
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=line) as refused:
        identify(folder)
    assert "\n" not in str(refused.value)
    assert str(folder / file) in str(refused.value)
    assert "copy the checkpoint again" in str(refused.value)
