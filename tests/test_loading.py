"""Checkpoints at the border: whole, exact, and published as they came."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config, LlamaConfig, Qwen3Config

from opd_stream.config.sections import Lora
from opd_stream.engines import decoding, head, loading
from opd_stream.engines.loading import check_engine, check_files, check_training, load_model
from opd_stream.errors import UserError
from opd_stream.store.files import indexed_files
from opd_stream.store.policy import identify, known_identity
from stages.checkpoints import weight_shapes
from stages.student_model import check_lora, load_student, save_student
from tests.conftest import MODELS

TINY: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}


def saved(folder: Path, config: Any) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return folder


def load(folder: Path, lora: Lora | None = None, **changes: Any) -> Any:
    settings = {"lora": lora, "initial": folder, "gradient_checkpointing": False, **changes}
    return load_student(folder, **settings)


def test_a_missing_tensor_is_no_random_one(tmp_path: Path) -> None:
    folder = saved(tmp_path, LlamaConfig(**TINY))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 tensors of the model \(model\.layers\.0\.mlp"):
        load_model(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 61}, r"2 tensors of other sizes .* \(lm_head\.weight is \[60, 16\]"),
        ({"hidden_size": 10**12}, "tensors of other sizes than its config says"),
        ({"model_type": "none-such"}, "cannot be loaded as a causal language model"),
        ({"quantization_config": {"quant_method": "gptq"}}, "cannot be loaded as a causal"),
    ],
)
def test_a_config_of_another_model_is_one_line(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = saved(tmp_path, LlamaConfig(**TINY))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=message) as refused:
        check_files(folder)
    assert "\n" not in str(refused.value)


def test_a_model_that_computes_no_numbers_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, LlamaConfig(**TINY, rms_norm_eps=float("nan")))
    model = load_model(folder, dtype=torch.float32)
    with pytest.raises(UserError, match="not finite on plain texts"):
        check_engine(model, folder)


@pytest.mark.parametrize(("kind", "said"), [("link", "a link to a file"), ("folder", "no file")])
def test_weights_that_are_no_file_are_one_line(tmp_path: Path, kind: str, said: str) -> None:
    """A snapshot of a hub cache that was copied without its blobs has links alone."""
    shutil.copytree(MODELS / "ledger-student", tmp_path / "model")
    weights(tmp_path / "model").unlink()
    if kind == "link":
        weights(tmp_path / "model").symlink_to("blobs/none")
    else:
        weights(tmp_path / "model").mkdir()
    for look in (identify, partial(known_identity, cache=tmp_path, most_bytes=1)):
        with pytest.raises(UserError, match=f"model.safetensors is {said}"):
            look(tmp_path / "model")


@pytest.mark.parametrize("name", ["../other/model.safetensors", "part/a.safetensors", "a.bin"])
def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(UserError, match="expected safetensors files of the folder itself"):
        indexed_files(tmp_path)
    index.write_text("[]")
    with pytest.raises(UserError, match="holds a list"):
        indexed_files(tmp_path)


def test_a_config_may_hold_infinity(tmp_path: Path) -> None:
    """As Mamba's time steps do, which have no upper limit."""
    shutil.copytree(MODELS / "ledger-student", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "time_step_limit": [0.0, float("inf")]}))
    found = identify(tmp_path / "model")
    assert found.architecture_sha256 != identify(MODELS / "ledger-student").architecture_sha256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_scales_in_an_unknown_way_is_refused(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import GraniteConfig

    folder = saved(tmp_path, GraniteConfig(**TINY, logits_scaling=0.25))
    model = load_model(folder, dtype=dtype)
    check_engine(model, folder)
    check_training(model, folder)
    monkeypatch.setattr(head, "DIVISORS", ())
    for check in (check_engine, check_training):
        with pytest.raises(UserError, match=r"decoder and head apart gives .* nats"):
            check(model, folder)


def test_a_decoder_that_reads_padding_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path, LlamaConfig(**TINY))
    model = load_model(folder, dtype=torch.float32)
    check_engine(model, folder)

    class Unmasked(decoding.LlamaDecoder):
        def prefill(self, ids_BC: torch.Tensor, mask_BC: torch.Tensor) -> torch.Tensor:
            return super().prefill(ids_BC, torch.ones_like(mask_BC))

    monkeypatch.setattr(loading, "open_decoder", Unmasked)
    with pytest.raises(UserError, match="decoding in a batch, token by token, gives"):
        check_engine(model, folder)


def test_the_dropout_of_the_model_is_off_unless_asked_for(tmp_path: Path) -> None:
    from transformers import GPT2Config

    folder = saved(tmp_path, GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2))
    ids = torch.arange(10)[None]

    def passes(**changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
        model = load(folder, **changes).model
        return model(ids).logits, model(ids).logits

    assert torch.equal(*passes())
    assert torch.equal(*passes(gradient_checkpointing=True))
    assert not torch.equal(*passes(drops=True))


def test_a_policy_has_the_config_files_of_its_base(tmp_path: Path) -> None:
    folder = saved(tmp_path / "base", LlamaConfig(**TINY, use_cache=True, dtype="bfloat16"))
    generation = {"eos_token_id": 1, "do_sample": False, "temperature": 0.9, "top_p": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    student = load(folder)
    save_student(student, folder, tmp_path / "policy")
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "policy" / name).read_bytes() == (folder / name).read_bytes()
    (folder / "generation_config.json").unlink()
    save_student(student, folder, tmp_path / "other")
    assert not (tmp_path / "other" / "generation_config.json").exists()


@pytest.mark.parametrize("wrapper", ["gemma3", "qwen3_5"])
def test_what_training_does_not_read_survives(tmp_path: Path, wrapper: str) -> None:
    """Gemma's class has the vision tower, and Qwen's is of the text alone."""
    base = tmp_path / "base"
    if wrapper == "gemma3":
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
        config = Gemma3Config(text_config=TINY, vision_config=vision, mm_tokens_per_image=4)
        saved(base, config)
    else:
        from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

        vision = {"hidden_size": 16, "intermediate_size": 16, "depth": 1, "num_heads": 2}
        vision |= {"out_hidden_size": 16, "patch_size": 4}
        text = {**TINY, "layer_types": ["full_attention"]}
        model = Qwen3_5ForConditionalGeneration(
            Qwen3_5Config(text_config=text, vision_config=vision)
        )
        model.save_pretrained(base)
    student = load(base)
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    assert trained
    assert not any("vision" in name or "visual" in name for name in trained)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.add_(int(name in trained))
    save_student(student, base, tmp_path / "policy")
    old = load_file(base / "model.safetensors")
    new: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "policy").glob("*.safetensors"):
        new |= load_file(path)
    assert new.keys() == old.keys()
    unread = {name for name in old if "vision" in name or "visual" in name or "projector" in name}
    assert unread
    assert all(torch.equal(old[name], new[name]) == (name in unread) for name in old)
    again = load(tmp_path / "policy")
    for name, parameter in again.named_parameters():
        if name in trained:
            assert torch.equal(parameter, student.get_parameter(name))


def test_tensors_survive_where_the_base_has_other_names(tmp_path: Path) -> None:
    """As GPT-2 of the hub, whose names lack the prefix that the library writes."""
    from transformers import GPT2Config

    sizes = {"vocab_size": 60, "n_embd": 16, "n_layer": 1, "n_head": 2}
    base = saved(tmp_path / "base", GPT2Config(**sizes, eos_token_id=1, bos_token_id=2))
    names = {name.removeprefix("transformer."): t for name, t in load_file(weights(base)).items()}
    tower = {"vision.a.weight": torch.arange(3.0), "h.0.attn.masked_bias": torch.ones(1)}
    save_file({**names, **tower}, weights(base), {"format": "pt"})
    student = load(base)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    save_student(student, base, tmp_path / "policy")
    found: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "policy").glob("*.safetensors"):
        found |= load_file(path)
    assert found.keys() == {*tower, *(f"transformer.{name}" for name in names)}
    assert all(torch.equal(found[name], tensor) for name, tensor in tower.items())
    again = load(tmp_path / "policy")
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, student.get_parameter(name))


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def test_adapters_on_a_matrix_that_head_and_embeddings_share_are_refused(tmp_path: Path) -> None:
    tied = saved(tmp_path / "tied", Qwen3Config(**TINY, tie_word_embeddings=True))
    own = saved(tmp_path / "own", Qwen3Config(**TINY, tie_word_embeddings=False))
    on_head, plain = (Lora(rank=2, targets=t) for t in (("q_proj", "lm_head"), "all-linear"))
    with pytest.raises(UserError, match="adapt the student's head or embeddings, which are one"):
        check_lora(tied, on_head)
    for folder in (tied, own):
        check_lora(folder, plain)
    check_lora(own, on_head)
    with pytest.raises(UserError, match="fit no module of the student"):
        check_lora(own, Lora(rank=2, targets=("none_such",)))


def test_an_adapted_head_is_published_exactly(tmp_path: Path) -> None:
    own = saved(tmp_path / "own", Qwen3Config(**TINY, tie_word_embeddings=False))
    student = load(own, Lora(rank=2, targets=("q_proj", "lm_head")))
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    ids = torch.arange(10)[None]
    adapted = student.model.eval()(ids).logits
    save_student(student, own, tmp_path / "policy")
    published = load_model(tmp_path / "policy", dtype=torch.float32)
    assert torch.allclose(published(ids).logits, adapted, atol=1e-5)


def test_what_a_quantisation_keeps_beside_a_weight_is_not_published(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", LlamaConfig(**TINY))
    student = load(base)
    tensors = load_file(base / "model.safetensors")
    beside = "model.layers.0.mlp.up_proj.weight"
    more = {f"{beside}.absmax": torch.ones(1), f"{beside}.quant_state.bits": torch.ones(1)}
    other = {"vision.layers.0.weight": torch.ones(1)}
    save_file({**tensors, **more, **other}, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    save_student(student, base, tmp_path / "policy")
    assert weight_shapes(tmp_path / "policy").keys() == {**tensors, **other}.keys()


def test_templates_of_a_folder_go_into_the_identity_and_the_policy(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", LlamaConfig(**TINY))
    student = load(base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MODELS / "ledger-student" / name, base / name)
    plain, named = identify(base), base / "additional_chat_templates" / "tool_use.jinja"
    named.parent.mkdir()
    found = {plain.rendering_sha256}
    for text in ("{{ messages }}", "{{ tools }}"):
        named.write_text(text)
        found.add(identify(base).rendering_sha256)
    assert len(found) == 3
    (base / "model.gguf").write_bytes(b"GGUF")
    save_student(student, base, tmp_path / "policy")
    assert identify(tmp_path / "policy").rendering_sha256 == identify(base).rendering_sha256
    assert not (tmp_path / "policy" / "model.gguf").exists()


def test_a_quantised_base_of_adapters_is_published_whole(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    wide = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
    base = saved(tmp_path / "base", LlamaConfig(**{**TINY, **wide}))
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    four_bit = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=how, dtype=torch.float32
    )
    four_bit.save_pretrained(tmp_path / "four")
    teacher = load_model(tmp_path / "four", dtype=torch.float32)
    check_engine(teacher, tmp_path / "four")
    student = load(tmp_path / "four", Lora(rank=2))
    save_student(student, tmp_path / "four", tmp_path / "policy")
    published = load_model(tmp_path / "policy", dtype=torch.float32)
    assert "quantization_config" not in (tmp_path / "policy" / "config.json").read_text()
    ids = torch.arange(10)[None]
    assert torch.allclose(published(ids).logits, student.model.eval()(ids).logits, atol=1e-5)


def test_what_lies_beside_whole_weights_is_not_read(tmp_path: Path) -> None:
    """transformers takes model.safetensors alone; a policy would publish what else is counted."""
    base, policy = tmp_path / "base", tmp_path / "policy"
    shutil.copytree(MODELS / "ledger-student", base)
    whole = weight_shapes(base)
    other = {name: torch.zeros(2) for name in ("model.norm.weight", "output.weight")}
    save_file(other, base / "consolidated.safetensors")
    index = {"weight_map": {"output.weight": "consolidated.safetensors", "a": "gone.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weight_shapes(base) == whole
    student = load_student(base, lora=None, initial=base, gradient_checkpointing=False)
    policy.mkdir()
    save_student(student, base, policy)
    assert weight_shapes(policy) == whole
