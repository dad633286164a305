"""A policy as a folder for other programs, and on a stand-in of the hub."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_stream.config.sections import DatasetPrompts
from opd_stream.config_file import make_config
from pipeline.export import export_policy, recipe
from pipeline.run_folder import RunFolder
from tests.conftest import MODELS, Command, SmallRuns, rewrite
from tests.hub_server import TOKEN, Hub, running_hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine, and the right token."""
    with running_hub() as found:
        constants = huggingface_hub.constants
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, found.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", found.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


def policy_folder(run: Path, round_index: int) -> Path:
    report = RunFolder(run / "run").report(round_index)
    assert report is not None
    return Path(report.policy.folder)


def card_head(folder: Path) -> dict[str, object]:
    text = (folder / "README.md").read_text()
    return yaml.safe_load(text.split("---")[1])


def test_an_exported_policy_is_the_policy_and_nothing_else(
    finished_run: Path, tmp_path: Path, opd_stream: Command
) -> None:
    out = tmp_path / "new" / "policy"
    code, said, _ = opd_stream("export", str(finished_run / "run"), str(out))
    assert (code, said) == (0, f"policy 2 of {finished_run / 'run'} in {out}\n")
    names = {path.relative_to(out).as_posix() for path in out.rglob("*")}
    assert names == {
        *("README.md", "config.json", "generation_config.json"),
        *("model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    }
    left, right = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (policy_folder(finished_run, 1), out)
    )
    assert all(torch.equal(right.state_dict()[n], t) for n, t in left.state_dict().items())
    assert AutoTokenizer.from_pretrained(out).vocab_size > 0
    assert not list(out.parent.glob(".policy*"))


def test_an_earlier_policy_is_named_by_its_version(finished_run: Path, tmp_path: Path) -> None:
    run = RunFolder(finished_run / "run")
    assert export_policy(run, tmp_path / "one", version=1, adapter=False) == 1
    ours = (tmp_path / "one" / "model.safetensors").read_bytes()
    assert ours == (policy_folder(finished_run, 0) / "model.safetensors").read_bytes()
    assert "after 1 of 2 rounds" in (tmp_path / "one" / "README.md").read_text()


def test_the_card_has_recipe_teacher_data_figures_and_no_places(
    finished_run: Path, tmp_path: Path
) -> None:
    run = RunFolder(finished_run / "run")
    export_policy(run, tmp_path / "out", version=None, adapter=False)
    head, card = card_head(tmp_path / "out"), (tmp_path / "out" / "README.md").read_text()
    assert (head["base_model"], head["library_name"]) == ("ledger-student", "transformers")
    assert "on-policy-distillation" in str(head["tags"])
    blocks = [yaml.safe_load(each) for each in re.findall(r"```yaml\n(.*?)```", card, re.S)]
    assert blocks[0] == {"kind": "ledger", "count": 32, "seed": 11}
    assert blocks[1]["teacher"] == {"path": "opd-stream/ledger-teacher"}
    made_again = make_config(blocks[1])  # the embedded models need no folder
    assert made_again.student.folder.samefile(MODELS / "ledger-student")
    assert blocks[1]["train"]["objective"] == [{"kind": "bucket"}]
    assert "store" not in blocks[1]
    summary = run.summary()
    assert summary is not None
    record = summary.evaluations[-1].benchmarks["ledger"]
    low, high = record.intervals["pass@1"]
    assert f"{record.passes['pass@1']:.3f} [{low:.3f}, {high:.3f}]" in card
    assert f"{summary.tokens.teacher_scored:,} completion tokens scored" in card
    assert "torch " in card
    for place in (str(MODELS), str(finished_run), str(Path.home()), str(tmp_path)):
        texts = [p.read_text() for p in (tmp_path / "out").iterdir() if p.suffix != ".safetensors"]
        assert not any(place in text for text in texts)


def test_a_recipe_names_files_without_their_folders() -> None:
    source = DatasetPrompts(kind="datasets", path="json", data_files=Path("/home/me/x.jsonl"))
    assert recipe(source) == {"kind": "datasets", "path": "json", "data_files": "x.jsonl"}


def test_an_adapter_is_exported_alone_and_gives_the_merged_policy(
    small_runs: SmallRuns, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    folder = small_runs("rounds=1", "train.lora={rank: 4, alpha: 8}")
    run = RunFolder(folder / "run")
    export_policy(run, tmp_path / "adapter", version=None, adapter=True)
    export_policy(run, tmp_path / "merged", version=None, adapter=False)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_bytes())
    assert config["base_model_name_or_path"] == "ledger-student"
    assert card_head(tmp_path / "adapter")["library_name"] == "peft"
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    assert not (tmp_path / "merged" / "adapter").exists()
    assert "merged into these weights" in (tmp_path / "merged" / "README.md").read_text()
    base = AutoModelForCausalLM.from_pretrained(MODELS / "ledger-student", dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(adapted.state_dict()[name], tensor, rtol=0, atol=1e-6)


def test_what_cannot_be_exported_is_one_line(
    finished_run: Path, tmp_path: Path, opd_stream: Command
) -> None:
    run, out = str(finished_run / "run"), tmp_path / "out"
    for words, line in (
        ((run, str(out), "--policy-version", "0"), "no trained policy of version 0"),
        ((run, str(out), "--policy-version", "3"), "expected one of 1 to 2"),
        ((run, str(out), "--adapter"), "has no adapter"),
        ((run, str(out), "--public"), "--public says who may read"),
        ((str(tmp_path), str(out)), "has no config.json"),
        ((run, str(out), "--push-to-hub", "../x"), "is no id of the hub"),
    ):
        code, _, said = opd_stream("export", *words)
        assert (code, said.count("\n")) == (2, 1), said
        assert line in said
    assert not out.exists()
    out.mkdir()
    (out / "mine").touch()
    code, _, said = opd_stream("export", run, str(out))
    assert code == 2
    assert "expected a new or empty folder" in said
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_damaged_policy_is_not_exported(
    copied_run: Path, tmp_path: Path, opd_stream: Command
) -> None:
    for path in (copied_run / "store").rglob("model.safetensors"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(bytes(data))
    code, _, said = opd_stream("export", str(copied_run / "run"), str(tmp_path / "out"))
    assert (code, said.count("\n")) == (2, 1)
    assert "model.safetensors is not the published file" in said
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_of_an_unfinished_run_a_policy_has_to_be_named(
    copied_run: Path, tmp_path: Path, opd_stream: Command
) -> None:
    rewrite(copied_run / "run" / "summary.json", finished=False)
    words = ("export", str(copied_run / "run"), str(tmp_path / "out"))
    code, _, said = opd_stream(*words)
    assert code == 2
    assert "is not finished (2 of 2 rounds); finish it, or name a policy" in said
    assert opd_stream(*words, "--policy-version", "1")[0] == 0


def test_a_pushed_policy_is_private_and_replaces_the_weights_before(
    finished_run: Path, tmp_path: Path, opd_stream: Command, hub: Hub
) -> None:
    words = ("export", str(finished_run / "run"))
    code, said, _ = opd_stream(*words, str(tmp_path / "a"), "--push-to-hub", "org/policy")
    assert code == 0
    assert f"pushed to {hub.address}/org/policy" in said
    held = hub.repositories["model", "org/policy"]
    assert held.private
    assert held.files == {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    held.files |= {"model-00001-of-00002.safetensors": b"old", "picture.png": b"kept"}
    assert opd_stream(*words, str(tmp_path / "b"), "--push-to-hub", "org/policy")[0] == 0
    assert {p.name for p in (tmp_path / "b").iterdir()} | {"picture.png"} == set(held.files)
    public = ("--push-to-hub", "org/open", "--public")
    assert opd_stream(*words, str(tmp_path / "c"), *public)[0] == 0
    assert not hub.repositories["model", "org/open"].private
    code, _, said = opd_stream(*words, str(tmp_path / "d"), *public[:2])
    assert code == 2
    assert "org/open is public" in said


def test_a_hub_that_refuses_is_one_line(
    finished_run: Path,
    tmp_path: Path,
    opd_stream: Command,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refusal(name: str) -> str:
        words = ("export", str(finished_run / "run"), str(tmp_path / name))
        code, _, said = opd_stream(*words, "--push-to-hub", "org/policy")
        assert (code, said.count("\n")) == (2, 1), said
        return said

    hub.status = 403
    assert "the hub refuses it, status 403; set HF_TOKEN" in (said := refusal("a"))
    assert f"the folder {tmp_path / 'a'} is whole" in said
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "status 401" in refusal("b")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "there is no token of the hub; set HF_TOKEN" in refusal("c")
    assert not (tmp_path / "c").exists()
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "check the network and HF_ENDPOINT" in refusal("d")
