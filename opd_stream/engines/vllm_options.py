"""How vLLM uses its device, and what it reads from the environment while it is imported."""

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmOptions:
    """How vLLM uses its device; placement only.

    Example:
        >>> VllmOptions(memory_share=0.8, kv_cache_bytes=None, tensor_parallel=1,
        ...             batched_tokens=8192, compiled=True)
    """

    memory_share: float = 0.8  # of the device; leaves room for logits, which vLLM does not plan for
    kv_cache_bytes: int | None = None  # instead of what is left of the share
    max_context: int | None = None  # tokens of prompt and completion; None: the model's
    tensor_parallel: int = 1
    batched_tokens: int = 8192  # of one forward pass: bounds the logits of scoring
    compiled: bool = True  # graphs and compilation; False starts faster


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
