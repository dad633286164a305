"""How vLLM uses its device, and what it reads from the environment while it is imported."""

import os

from pydantic import Field

from opd_stream.section import Section


class VllmOptions(Section):
    """How engine vllm uses its device (placement only)."""

    memory_share: float = Field(
        default=0.8, gt=0, le=1, description="of the device; logits need some of the rest"
    )
    kv_cache_bytes: int | None = Field(
        default=None, ge=1, description="for keys and values, instead of what the share leaves"
    )
    max_context: int | None = Field(
        default=None, ge=2, description="tokens of prompt and completion; null: the model's"
    )
    tensor_parallel: int = Field(default=1, ge=1, description="devices of one worker")
    batched_tokens: int = Field(
        default=8192, ge=64, description="of a forward pass; bounds the logits in scoring"
    )
    compiled: bool = Field(default=True, description="graphs and compilation; no: starts faster")


def prepare_environment() -> None:
    """Set what vLLM reads while it is imported; what the user has set stays."""
    import torch

    defaults = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if not torch.cuda.is_available():
        defaults |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # its processes start slowly
            "TORCH_COMPILE_DISABLE": "1",  # it would compile one small function for seconds
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
