"""The output head and an objective in one pass: loss and gradients without the logits of a batch.

Every objective is a function of the student's log-probabilities at J ids of a position. With g the
gradient in these J numbers, the gradient in the logits is scatter(g) - sum(g) * p, so a chunk of
rows needs its logits once, and its softmax once: both gradients are made in the forward pass, by
three matrix products in all. Memory holds one chunk, whatever the number of tokens.

Shapes: N completion tokens, n rows of a chunk, H hidden, V vocabulary, J gathered ids.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch.nn.functional import embedding_bag

TokenLoss = Callable[[torch.Tensor, slice], torch.Tensor]
"""(student log-probabilities [n, J] of rows, the rows) -> losses [n]."""

CHUNK_BYTES = {"cpu": 24 * 2**20, "cuda": 512 * 2**20}  # of the [n, V] buffer
FEWEST_ROWS = 96  # of a chunk: below, the products wait for the weight
ENTROPY_COLUMNS = 4096
OVERLAP_EVERY = 16  # rows of which one is searched for the student's own candidates


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputHead:
    """hidden -> logits: cap * tanh(scale * (hidden @ weight.T + bias) / cap).

    The weight may be the result of a computation (a LoRA head: base + scale * B @ A), in which case
    the gradient goes on from there.
    """

    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None = None
    scale: float = 1.0
    cap: float | None = None  # None: no soft cap

    @property
    def chunk_rows(self) -> int:
        """Rows whose logits may exist at one time."""
        budget = CHUNK_BYTES.get(self.weight_VH.device.type, CHUNK_BYTES["cuda"])
        return max(FEWEST_ROWS, budget // (4 * len(self.weight_VH)))

    def detached(self) -> "OutputHead":
        """The same without gradients."""
        bias_V = None if self.bias_V is None else self.bias_V.detach()
        return replace(self, weight_VH=self.weight_VH.detach(), bias_V=bias_V)

    def __call__(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """The logits [N, V], all at once."""
        weight_VH = self.weight_VH.to(hidden_NH.dtype)  # of a frozen base it may be narrower
        logits_NV = torch.nn.functional.linear(hidden_NH, weight_VH, self.bias_V)
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        return logits_NV if self.cap is None else torch.tanh(logits_NV / self.cap) * self.cap


@dataclass(frozen=True, slots=True)
class FusedLoss:
    """What one pass over the head gives; only `loss` carries a gradient."""

    loss: torch.Tensor  # sum of weights_N * losses_N
    losses_N: torch.Tensor  # before weights, nats
    logprobs_NJ: torch.Tensor  # student, over the full vocabulary, nats; [N, 0] without ids
    entropy_N: torch.Tensor  # of the student, nats
    overlap_M: torch.Tensor  # share of the teacher's candidates among the student's as many


def fused_loss(
    hidden_NH: torch.Tensor,
    head: OutputHead,
    *,
    ids_NJ: torch.Tensor | None,
    weights_N: torch.Tensor,
    token_loss: TokenLoss,
    top_NK: torch.Tensor | None = None,
    chunk_rows: int | None = None,
) -> FusedLoss:
    """Weighted loss of N tokens with gradients for hidden states, head weight and bias.

    Args:
        hidden_NH: hidden states that predict the tokens.
        head: the output head.
        ids_NJ: ids whose log-probabilities the objective reads; they may repeat. None: it reads
            those of the whole vocabulary, [n, V] of a chunk, and none are kept.
        weights_N: weight of each token in the sum; constants.
        token_loss: the objective; called once a chunk, differentiated in its first argument.
        top_NK: log-probabilities of the teacher's candidates, whose ids are columns 1 to K of
            `ids_NJ`; for every 16th token, `overlap_M` has the share of them (-inf: none) that are
            among the student's own as many. None: not measured.
        chunk_rows: rows whose logits exist at one time; None: by device and vocabulary.
    """
    device = hidden_NH.device.type
    if torch.is_autocast_enabled(device):  # a norm has widened what the head takes as narrow
        hidden_NH = hidden_NH.to(torch.get_autocast_dtype(device))
    if chunk_rows is None:
        chunk_rows = head.chunk_rows
    settings = _Settings(token_loss, top_NK, chunk_rows, head.cap)
    scaled_NH = hidden_NH if head.scale == 1.0 else hidden_NH * head.scale
    bias_V = None if head.bias_V is None else head.bias_V * head.scale
    apply = cast(Any, _FusedLoss.apply)  # pyright: ignore[reportUnknownMemberType]
    return FusedLoss(*apply(scaled_NH, head.weight_VH, bias_V, ids_NJ, weights_N, settings))


@dataclass(frozen=True, slots=True)
class _Settings:
    token_loss: TokenLoss
    top_NK: torch.Tensor | None
    chunk_rows: int
    cap: float | None


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        ids_NJ: torch.Tensor | None,
        weights_N: torch.Tensor,
        settings: _Settings,
    ) -> tuple[torch.Tensor, ...]:
        with torch.autocast(hidden_NH.device.type, enabled=False):
            work = _Pass(hidden_NH, weight_VH, bias_V, ctx.needs_input_grad[:3], settings)
            for start in range(0, max(len(hidden_NH), 1), settings.chunk_rows):
                rows = slice(start, start + settings.chunk_rows)
                if ids_NJ is None:
                    work.whole_chunk(rows, weights_N)
                else:
                    work.chunk(rows, ids_NJ, weights_N)
        outputs = work.outputs(weights_N)
        ctx.grads = (work.grad_hidden_NH, work.grad_weight_VH, work.grad_bias_V)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        grad_loss = grad_outputs[0]
        grads, ctx.grads = ctx.grads, None  # scaled in place, so they serve once
        return (*(None if grad is None else grad.mul_(grad_loss) for grad in grads), *[None] * 3)


class _Pass:
    """One forward pass: buffers that the chunks share, and what they add up."""

    def __init__(
        self,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        needed: tuple[bool, ...],
        settings: _Settings,
    ) -> None:
        self._settings, self._dtype = settings, hidden_NH.dtype
        self._hidden_NH, self._bias_V = hidden_NH, bias_V
        self._weight_VH = weight_VH.to(hidden_NH.dtype)
        self._exact = torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
        rows = min(settings.chunk_rows, len(hidden_NH))
        self._buffer = hidden_NH.new_empty(rows, len(weight_VH), dtype=self._exact)
        self.grad_hidden_NH = torch.empty_like(hidden_NH) if needed[0] else None
        self.grad_weight_VH = torch.zeros_like(weight_VH) if needed[1] else None
        self.grad_bias_V = None
        if bias_V is not None and needed[2]:
            self.grad_bias_V = torch.zeros_like(bias_V)
        self._parts: list[tuple[torch.Tensor, ...]] = []

    def chunk(self, rows: slice, ids_NJ: torch.Tensor, weights_N: torch.Tensor) -> None:
        """Loss and gradients of some rows."""
        hidden, ids, cap = self._hidden_NH[rows], ids_NJ[rows], self._settings.cap
        is_plain = cap is None and self._bias_V is None
        logits = self._logits_of(hidden, self._buffer[: len(ids)])
        asked = logits.gather(1, ids)
        overlap = self._overlap(logits, ids, rows)
        softmax = torch.softmax(logits, dim=1, out=logits) if is_plain else logits.softmax(1)
        norm = self._norm(softmax, asked, ids, hidden)
        logprobs = asked - norm[:, None]
        with torch.enable_grad():
            leaf = logprobs.detach().requires_grad_()
            losses = self._settings.token_loss(leaf, rows)
            (grad_asked,) = torch.autograd.grad((losses * weights_N[rows]).sum(), leaf)
        # In a narrower dtype the two large terms of `_gradients` would be rounded apart.
        if is_plain and self._dtype == self._exact:
            mean_weight = torch.mm(softmax, self._weight_VH)  # sum of p_v W_v
            entropy = norm - (hidden * mean_weight).sum(1)
            self._gradients(rows, hidden, ids, softmax, mean_weight, grad_asked)
        else:
            entropy = _entropy(softmax)
            self._dense_gradients(rows, hidden, ids, logits, softmax, grad_asked)
        self._parts.append((losses.detach(), logprobs, entropy, overlap))

    def whole_chunk(self, rows: slice, weights_N: torch.Tensor) -> None:
        """The same of an objective over the whole vocabulary: its own gradient is as large."""
        hidden = self._hidden_NH[rows]
        logits = self._logits_of(hidden, self._buffer[: len(hidden)])
        leaf = logits.log_softmax(1)
        with torch.enable_grad():
            leaf.requires_grad_()
            losses = self._settings.token_loss(leaf, rows)
            (grad,) = torch.autograd.grad((losses * weights_N[rows]).sum(), leaf)
        softmax = leaf.detach().exp()
        entropy = _entropy(softmax)
        grad = grad.sub_(softmax.mul_(grad.sum(1, keepdim=True)))
        self._from_logits(rows, hidden, logits, grad)
        self._parts.append((losses.detach(), leaf[:, :0].detach(), entropy, entropy[:0]))

    def outputs(self, weights_N: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The fields of `FusedLoss`."""
        columns = zip(*self._parts, strict=True)
        losses, logprobs, entropy, overlap = (torch.cat(column) for column in columns)
        return (losses * weights_N).sum(), losses, logprobs, entropy, overlap

    def _logits_of(self, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        logits, cap = _product(hidden, self._weight_VH.t(), out=out), self._settings.cap
        if self._bias_V is not None:
            logits.add_(self._bias_V)
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    def _norm(
        self, softmax: torch.Tensor, asked: torch.Tensor, ids: torch.Tensor, hidden: torch.Tensor
    ) -> torch.Tensor:
        """logsumexp of each row [n], from the likeliest of the asked ids: z - log p."""
        highest, place = asked.max(1, keepdim=True)
        norm = (highest - softmax.gather(1, ids.gather(1, place)).log())[:, 0]
        lost = norm.isinf().nonzero()[:, 0]  # no asked id has a probability that a float can hold
        if len(lost):
            room = softmax.new_empty(len(lost), softmax.shape[1])
            norm[lost] = self._logits_of(hidden[lost], room).logsumexp(1)
        return norm

    def _overlap(self, logits: torch.Tensor, ids: torch.Tensor, rows: slice) -> torch.Tensor:
        """Share of the teacher's k candidates among the student's k, for every 16th row."""
        if self._settings.top_NK is None:
            return logits.new_zeros(0)
        some = logits[::OVERLAP_EVERY]
        present = (self._settings.top_NK[rows] > -torch.inf)[::OVERLAP_EVERY]
        count = present.sum(1, keepdim=True).clamp(min=1)
        own = some.topk(present.shape[1], dim=1).values.gather(1, count - 1)
        theirs = some.gather(1, ids[::OVERLAP_EVERY, 1 : 1 + present.shape[1]])
        return ((theirs >= own) & present).sum(1) / count[:, 0]

    def _gradients(
        self,
        rows: slice,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        softmax: torch.Tensor,
        mean_weight: torch.Tensor,
        grad_asked: torch.Tensor,
    ) -> None:
        """scatter(g) - sum(g) * p never exists: its two terms meet the products apart."""
        total = grad_asked.sum(1, keepdim=True)
        if self.grad_hidden_NH is not None:
            picked = embedding_bag(ids, self._weight_VH, mode="sum", per_sample_weights=grad_asked)
            self.grad_hidden_NH[rows] = picked - total * mean_weight
        if self.grad_weight_VH is not None:
            grad, minus = self.grad_weight_VH, hidden * -total
            if grad.dtype == self._dtype:
                grad.addmm_(softmax.t(), minus)
            else:
                grad.add_(torch.mm(softmax.t(), minus))
            picked = (grad_asked[:, :, None] * hidden[:, None]).flatten(0, 1)
            grad.index_add_(0, ids.flatten(), picked.to(grad.dtype))

    def _dense_gradients(
        self,
        rows: slice,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        logits: torch.Tensor,
        softmax: torch.Tensor,
        grad_asked: torch.Tensor,
    ) -> None:
        """The same for capped logits, a bias or a narrow dtype, through the logits' gradient."""
        grad = softmax.mul_(-grad_asked.sum(1, keepdim=True)).scatter_add_(1, ids, grad_asked)
        self._from_logits(rows, hidden, logits, grad)

    def _from_logits(
        self, rows: slice, hidden: torch.Tensor, logits: torch.Tensor, grad: torch.Tensor
    ) -> None:
        """From the gradient in the logits, which is used up."""
        if self._settings.cap is not None:
            grad.mul_(1 - (logits / self._settings.cap).square_())
        if self.grad_bias_V is not None:
            self.grad_bias_V += grad.sum(0)
        if self.grad_hidden_NH is not None:
            product = _product(grad.to(self._dtype), self._weight_VH)
            self.grad_hidden_NH[rows] = product.to(self._dtype)
        if self.grad_weight_VH is not None:
            into, narrow = self.grad_weight_VH, grad.to(self._dtype)
            if into.dtype == self._dtype:
                into.addmm_(narrow.t(), hidden)
            else:
                into.add_(_product(narrow.t(), hidden))


def _entropy(softmax: torch.Tensor) -> torch.Tensor:
    """Of each row [n], nats; a few columns at a time, so that nothing as large is made."""
    parts = torch.split(softmax, ENTROPY_COLUMNS, dim=1)
    sums = [torch.special.entr(part).sum(1) for part in parts]  # pyright: ignore
    return torch.stack(sums).sum(0)  # pyright: ignore[reportUnknownArgumentType]


def _product(
    left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Matrix product as float32 (float64 of float64); narrow factors are rounded on a CPU alone."""
    if left.dtype in (torch.float32, torch.float64):
        return torch.mm(left, right, out=out)
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    product = torch.mm(left, right).float()
    return product if out is None else out.copy_(product)
