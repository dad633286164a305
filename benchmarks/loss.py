"""CPU seconds and memory of the fused loss beside dense logits and public chunked losses.

    python benchmarks/loss.py                     # CPU, float32
    python benchmarks/loss.py --dtype bfloat16    # hidden states and head in bfloat16
    python benchmarks/loss.py --device cuda       # bfloat16, larger shapes

All compute the same number: the forward KL over K teacher candidates and one tail bucket, mean over
tokens, with gradients for hidden states and head weight. Memory is the growth of the process's peak
over its state before the call, each measured in a process of its own; "beyond gradients" leaves out
the gradients themselves, which every loss has to return. trl and liger-kernel are in
the benchmark environment (`make bench-loss`), never in the project's.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from opd_stream.fused import OutputHead, fused_loss
from opd_stream.objectives import kl, log_tail

REPEATS = 5
CPU_SHAPES = {
    "N 1,024 H 256 V 32,768 K 32": (1024, 256, 32768, 32),
    "N 256 H 896 V 151,936 K 64": (256, 896, 151936, 64),
    "N 2,048 H 896 V 151,936 K 64": (2048, 896, 151936, 64),
}
CUDA_SHAPES = {
    "N 1,024 H 4,096 V 151,936 K 64": (1024, 4096, 151936, 64),
    "N 8,192 H 4,096 V 151,936 K 64": (8192, 4096, 151936, 64),
}
LARGEST_DENSE = 10**8  # logits; more does not fit beside the others
Loss = Callable[["Case"], torch.Tensor]
Shape = tuple[int, int, int, int]


class Case:
    """Hidden states, head and teacher candidates of one shape."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        tokens, hidden, vocabulary, top_k = shape
        torch.manual_seed(0)
        with torch.device(device):
            self.hidden_NH = torch.randn(tokens, hidden).to(dtype).requires_grad_()
            weight = torch.randn(vocabulary, hidden) * 2 / hidden**0.5
            self.weight_VH = weight.to(dtype).requires_grad_()
            self.teacher_hidden_NH = torch.randn(tokens, hidden).to(dtype)
            with torch.no_grad():
                parts = self.teacher_hidden_NH.split(256)
                tops = [(part @ self.weight_VH.t()).float().log_softmax(1) for part in parts[:1]]
                top = tops[0].topk(top_k, dim=1)
                copies = -(-tokens // len(top.indices))
                self.ids_NK = top.indices.repeat(copies, 1)[:tokens]
                self.teacher_NK = top.values.repeat(copies, 1)[:tokens]

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the last backward pass; cleared."""
        found = (self.hidden_NH.grad, self.weight_VH.grad)
        self.hidden_NH.grad = self.weight_VH.grad = None
        assert found[0] is not None
        assert found[1] is not None
        return found  # pyright: ignore[reportReturnType]


def tail_forward(student_NK: torch.Tensor, teacher_NK: torch.Tensor) -> torch.Tensor:
    """Forward KL of K candidates and a tail bucket [N]."""
    student, teacher = (
        torch.cat([side, log_tail(side)[:, None]], dim=1) for side in (student_NK, teacher_NK)
    )
    return kl(teacher, student)


def fused(case: Case) -> torch.Tensor:
    """This project's."""
    tokens = len(case.ids_NK)
    return fused_loss(
        case.hidden_NH,
        OutputHead(weight_VH=case.weight_VH),
        ids_NJ=case.ids_NK,
        weights_N=torch.full((tokens,), 1 / tokens, device=case.ids_NK.device),
        token_loss=lambda logprobs, rows: tail_forward(logprobs, case.teacher_NK[rows]),
    ).loss


def dense(case: Case) -> torch.Tensor:
    """All logits at once, plain autograd."""
    logprobs = (case.hidden_NH @ case.weight_VH.t()).float().log_softmax(1)
    return tail_forward(logprobs.gather(1, case.ids_NK), case.teacher_NK).mean()


def trl_chunked(case: Case) -> torch.Tensor:
    """The chunked loss of trl's asynchronous distillation trainer, as it calls it."""
    from trl.experimental.async_distillation import (  # pyright: ignore[reportMissingImports]
        async_distillation_trainer as trainer,
    )

    loss, *_ = trainer._chunked_jsd_loss(
        case.hidden_NH,
        case.weight_VH,
        None,
        1.0,
        None,
        case.ids_NK,
        case.teacher_NK,
        torch.ones_like(case.ids_NK, dtype=torch.bool),
        beta=0.0,
        temperature=1.0,
        add_tail_bucket=True,
        teacher_id_idx=None,
        num_teachers=1,
        chunk_size=trainer._CHUNKED_LM_HEAD_CHUNK_SIZE,
    )
    return loss / len(case.ids_NK)


def liger_jsd(case: Case) -> torch.Tensor:
    """liger-kernel's chunked JSD: full vocabulary and a live teacher, so another value."""
    from liger_kernel.chunked_loss.jsd_loss import (  # pyright: ignore[reportMissingImports]
        LigerFusedLinearJSDLoss,
    )

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=0.0,
        compiled=case.hidden_NH.is_cuda,
        chunk_size=256,
    )
    labels = torch.zeros(len(case.ids_NK), dtype=torch.long, device=case.ids_NK.device)
    return loss(
        case.hidden_NH, case.weight_VH, case.teacher_hidden_NH, case.weight_VH.detach(), labels
    )


LOSSES: dict[str, Loss] = {
    "fused": fused,
    "dense": dense,
    "trl chunked top-k": trl_chunked,
    "liger chunked JSD, live teacher": liger_jsd,
}


def main() -> None:
    """Print one table a shape."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--memory-of", nargs=2, metavar=("LOSS", "SHAPE"), help="one measurement")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shapes = CPU_SHAPES if arguments.device == "cpu" else CUDA_SHAPES
    default = torch.float32 if arguments.device == "cpu" else torch.bfloat16
    dtype = default if arguments.dtype is None else getattr(torch, arguments.dtype)
    if arguments.memory_of:
        loss, shape = arguments.memory_of
        print(json.dumps(_growth(LOSSES[loss], shapes[shape], arguments.device, dtype)))
        return
    device = platform.processor() or platform.machine()
    if arguments.device == "cuda":
        device = torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {device}, {dtype}, one thread, median of {REPEATS}\n")
    for name, shape in shapes.items():
        _compare(name, shape, arguments.device, dtype)


def _compare(name: str, shape: Shape, device: str, dtype: torch.dtype) -> None:
    case = Case(shape, device, dtype)
    held = sum(t.numel() * t.element_size() for t in (case.hidden_NH, case.weight_VH)) / 2**20
    losses = {label: loss for label, loss in LOSSES.items() if _runs(label, shape, device)}
    seconds: dict[str, list[float]] = {label: [] for label in losses}
    values: dict[str, tuple[float, torch.Tensor, torch.Tensor]] = {}
    for _ in range(REPEATS):
        for label, loss in losses.items():
            start = _clock(device)
            value = loss(case)
            value.backward()
            seconds[label].append(_clock(device) - start)
            gradients = case.gradients()
            values[label] = (value.item(), *gradients)
    print(f"## {name}\n")
    print(
        "| loss | seconds (range) | against fused | extra MiB | beyond gradients | value "
        "| gradient difference |"
    )
    print("|---|---|---|---|---|---|---|")
    ours = statistics.median(seconds["fused"])
    for label in losses:
        value, *gradients = values[label]
        apart = max(
            ((one - other).norm() / other.norm()).item()
            for one, other in zip(gradients, values["fused"][1:], strict=True)
        )
        median = statistics.median(seconds[label])
        memory = _memory(label, name, device, dtype)
        same = "" if "live teacher" in label else f"{apart:.1e}"
        print(
            f"| {label} | {median:.3f} ({min(seconds[label]):.3f} to {max(seconds[label]):.3f}) "
            f"| {median / ours:.2f} | {memory:,.0f} | {memory - held:,.0f} | {value:.6f} | {same} |"
        )
    print()


def _runs(label: str, shape: Shape, device: str) -> bool:
    package = {"trl": "trl", "liger": "liger_kernel"}.get(label.split()[0])
    if package is not None and importlib.util.find_spec(package) is None:
        return False
    return device == "cuda" or label != "dense" or shape[0] * shape[2] <= LARGEST_DENSE


def _memory(label: str, shape: str, device: str, dtype: torch.dtype) -> float:
    """MiB of a process that does only this."""
    name = str(dtype).removeprefix("torch.")
    command = [sys.executable, __file__, "--device", device, "--dtype", name]
    command += ["--memory-of", label, shape]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _growth(loss: Loss, shape: Shape, device: str, dtype: torch.dtype) -> float:
    """MiB that the peak rises over what is there before, a small call having gone before."""
    loss(Case((32, 64, 512, 8), device, dtype)).backward()
    case = Case(shape, device, dtype)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss(case).backward()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status_kib("VmRSS")
    loss(case).backward()
    return (status_kib("VmHWM") - before) / 1024


def status_kib(field: str) -> int:
    """A memory figure of this process, KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def _clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
