"""A teacher's output head as an artifact of its own, and hidden states beside it, both unrounded.

A hidden state after the last norm and the head give the whole distribution of a token: H numbers in
place of V. The head is stored once for each teacher, engine and dtype; numbers take two bytes where
that loses nothing, as of bfloat16 models, and four otherwise. What is rebuilt differs from the
engine's own distribution by the rounding of one product, which `check_bound` bounds.

Shapes: N tokens, H hidden, V vocabulary.
"""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from opd_stream.engines import hidden_engine
from opd_stream.engines.base import Engine, HiddenStates
from opd_stream.engines.head import from_numpy
from opd_stream.errors import UserError
from opd_stream.fused import OutputHead
from opd_stream.store.artifact import Artifact
from opd_stream.store.codecs.columns import list_rows, unrounded, widened
from opd_stream.store.recipe import Recipe
from opd_stream.store.shards import rows_of
from opd_stream.store.store import Store
from stages.recipes import head_beside

IDS_PER_ROW = 256  # of the vocabulary, in a row of the shard
ROWS_PER_UNIT = 64

# Nats by which the log-probability of a token, rebuilt from what is stored, may differ from the
# engine's: logits of a 16-bit engine are rounded, by up to 1/16 where they stand above 16.
BOUNDS = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.3}


def make_head(store: Store, made: Recipe, opened: Callable[[], Engine], made_by: str) -> None:
    """Store the head beside hidden states, unless it is there; `opened` gives the engine."""
    artifact = store.artifact(head_beside(made))
    if not artifact.is_complete():
        store_head(artifact, hidden_engine(opened()).head(), made_by=made_by)


def store_head(artifact: Artifact, head: OutputHead, *, made_by: str = "") -> None:
    """Publish a head as far as the store does not have it; damaged units are made again."""
    vocabulary, width = head.weight_VH.shape
    rows = -(-vocabulary // IDS_PER_ROW)
    artifact.create(rows=rows, rows_per_unit=ROWS_PER_UNIT)
    said = {
        "width": str(width),
        "dtype": str(head.weight_VH.dtype).removeprefix("torch."),
        "scale": repr(float(head.scale)),
        **({} if head.cap is None else {"cap": repr(float(head.cap))}),
    }
    for unit in artifact.units():
        if artifact.has_sound(unit):
            continue
        blocks = [
            slice(row * IDS_PER_ROW, (row + 1) * IDS_PER_ROW) for row in artifact.unit_rows(unit)
        ]
        weights = [_numbers(head.weight_VH[block]) for block in blocks]
        values = unrounded(np.concatenate(weights))
        columns = {
            "weight": list_rows(
                np.split(values, np.cumsum([*map(len, weights)])[:-1]), values.dtype
            )
        }
        if head.bias_V is not None:
            columns["bias"] = list_rows(
                [_numbers(head.bias_V[block]) for block in blocks], np.float32
            )
        table = pa.table(columns).replace_schema_metadata(said)
        artifact.commit(unit, table, counts={"rows": len(blocks)}, made_by=made_by)
    artifact.finish()


def hidden_table(hidden: HiddenStates) -> pa.Table:
    """Hidden states as a shard, one row a rollout."""
    whole = np.concatenate(hidden.states)
    if whole.size >= 2**31:
        raise UserError(
            f"a unit has hidden states of {whole.size:,} numbers; expected fewer than 2^31; lower "
            "prompts_per_unit"
        )
    values = unrounded(whole.reshape(-1))
    ends = np.cumsum([states.size for states in hidden.states])[:-1]
    columns = {
        "states": list_rows(np.split(values, ends), values.dtype),
        "logprobs": list_rows(hidden.logprobs, np.float32),
    }
    return pa.table(columns).replace_schema_metadata({"width": str(whole.shape[1])})


def hidden_of(table: pa.Table) -> HiddenStates:
    """The hidden states of a shard."""
    width = int((table.schema.metadata or {})[b"width"])
    states = rows_of(table["states"], table["states"].type.value_type.to_pandas_dtype())
    return HiddenStates(
        states=tuple(widened(row).reshape(-1, width) for row in states),
        logprobs=rows_of(table["logprobs"], np.float32),
    )


def check_bound(
    rebuilt_N: NDArray[np.float32], logprobs_N: NDArray[np.float32], head: OutputHead
) -> None:
    """Refuse log-probabilities of tokens that are further from the engine's than rounding explains.

    Raises:
        UserError: the bound of the head's dtype is passed; the two do not belong together.
    """
    is_known = np.isfinite(logprobs_N)
    found = float(np.abs(rebuilt_N - logprobs_N)[is_known].max(initial=0.0))
    bound = BOUNDS[head.weight_VH.dtype]
    if not found <= bound:
        raise UserError(
            f"distributions rebuilt from hidden states are {found:.3g} nats from the engine's; "
            f"expected at most {bound:g}; this model does more between its hidden states and its "
            "logits than a linear head with a scale and a soft cap: it cannot be stored this way"
        )


def head_input(states_NH: NDArray[np.float32], head: OutputHead) -> torch.Tensor:
    """Stored hidden states as the head takes them."""
    return from_numpy(states_NH, head.weight_VH.device).to(head.weight_VH.dtype)


def _numbers(values: torch.Tensor) -> NDArray[np.float32]:
    return values.detach().float().cpu().numpy().reshape(-1)
