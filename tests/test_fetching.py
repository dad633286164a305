"""Checkpoints by hub id and from GGUF files, without a network."""

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from opd_stream.config_file import load_config
from opd_stream.engines.loading import load_model
from opd_stream.errors import UserError
from opd_stream.fetching import fetch, is_hub_id, local_folder
from pipeline.setup import fetch_checkpoints

MODELS = Path(__file__).parent.parent / "configs" / "models"
COMMIT = "0123456789012345678901234567890123456789"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that has example/student, and a hub that cannot be reached."""
    model = tmp_path / "hub" / "models--example--student"
    shutil.copytree(MODELS / "ledger-student", model / "snapshots" / COMMIT)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return model / "snapshots" / COMMIT


def written(folder: Path, student: str) -> Path:
    text = (MODELS.parent / "quickstart.yaml").read_text()
    assert "models/ledger-student" in text
    text = text.replace("models/ledger-student", student)
    text = text.replace("models/ledger-teacher", str(MODELS / "ledger-teacher"))
    (folder / "run.yaml").write_text(text)
    return folder / "run.yaml"


def test_a_hub_model_is_found_where_it_was_fetched(tmp_path: Path, hub: Path) -> None:
    config = load_config(written(tmp_path, "example/student"), [])
    assert str(config.student.path) == "example/student"  # no path beside the file
    fetch_checkpoints(config)
    assert config.student.folder == hub
    pinned = load_config(tmp_path / "run.yaml", [f"student.revision={COMMIT}"])
    assert pinned.student.folder == hub


def test_a_folder_beside_the_config_comes_first(tmp_path: Path, hub: Path) -> None:
    shutil.copytree(MODELS / "ledger-student", tmp_path / "example" / "student")
    config = load_config(written(tmp_path, "example/student"), [])
    assert config.student.folder == tmp_path / "example" / "student"


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("revision", [None, "v2"])
def test_a_model_that_is_not_here_says_how_to_fetch_it(revision: str | None) -> None:
    name = Path("example/other")
    command = "hf download example/other" + (f" --revision {revision}" if revision else "")
    for place in (local_folder, fetch):
        with pytest.raises(UserError, match=command) as refused:
            place(name, revision)
        assert "\n" not in str(refused.value)


def test_half_a_fetched_model_is_none(hub: Path) -> None:
    (hub / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    (hub / "model.safetensors").unlink()
    with pytest.raises(UserError, match="hf download example/student"):
        local_folder(Path("example/student"))


@pytest.mark.parametrize("find", [fetch, local_folder])
def test_a_folder_has_no_revision(find: Any) -> None:
    with pytest.raises(UserError, match="is no model of the hub; revisions are of hub models"):
        find(MODELS / "ledger-student", "main")


def test_a_day_that_is_none_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("seed: 2024-02-30")
    with pytest.raises(UserError, match="is not valid YAML: day is out of range"):
        load_config(tmp_path / "run.yaml", [])
    with pytest.raises(UserError, match=r"is not valid YAML \(day is out of range .*quote it"):
        load_config(MODELS.parent / "quickstart.yaml", ["prompts.template.date=2024-02-30"])


def test_a_broken_pattern_of_modules_is_one_line() -> None:
    with pytest.raises(UserError, match=r"is '\(', which is no pattern .*expected module names"):
        load_config(MODELS.parent / "quickstart.yaml", ["train.lora={targets: '('}"])


def test_what_looks_like_a_hub_model() -> None:
    assert is_hub_id("org/name-1.5B")
    for path in ("name", "a/b/c", "./a/b", "../a", "/a/b", "~/b", "configs/models"):
        assert not is_hub_id(path), path


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    """As llama.cpp writes it: rotary halves side by side, no embeddings twice."""
    import gguf

    config, tokenizer = model.config, AutoTokenizer.from_pretrained(MODELS / "ledger-student")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    tokens = tokenizer.convert_ids_to_tokens(range(config.vocab_size))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_merges([])
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "post_attention_layernorm": "ffn_norm",
        "input_layernorm": "attn_norm",
        "model.layers": "blk",
    }
    for name, tensor in model.state_dict().items():
        array: Any = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            halves = array.reshape(heads, 2, config.head_dim // 2, -1)
            array = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("OPD_STREAM_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    sizes = {"vocab_size": 606, "hidden_size": 16, "intermediate_size": 32, "head_dim": 8}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=64)).eval()
    (tmp_path / "model").mkdir()
    file = tmp_path / "model" / "tiny.gguf"
    write_gguf(file, model)
    with pytest.raises(UserError, match="opd-stream fetch CONFIG"):
        local_folder(file)
    folder = fetch(file)
    assert (fetch(file.parent), local_folder(file)) == (folder, folder)
    ids = torch.arange(10)[None]
    again = load_model(folder, dtype=torch.float32)
    assert torch.allclose(again(ids).logits, model(ids).logits, atol=1e-5)
    assert again.config.get_text_config().eos_token_id == 1
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"tiny\.gguf cannot be read as a language model"):
        fetch(file)
    assert [path.name for path in (tmp_path / "cache" / "gguf").iterdir()] == [folder.name]
    monkeypatch.setenv("OPD_STREAM_CACHE", str(file))
    with pytest.raises(UserError, match=r"cannot be written .*set OPD_STREAM_CACHE to a folder"):
        fetch(file)
