"""How a model's decoder may read texts, found by trying it: once for each decoder.

Every causal decoder reads whole rows, padded on the right. To go on from a cache is not as general:
states of recurrent layers may read the padding on the left, positions may be those of the columns,
a cache may know only its own model, or there may be none. So three short texts are read in each
way, the fastest first, and the first way whose hidden states are those of each text alone is taken.

What all rows of a batch begin with (a system prompt, examples) is read once, as one row. The rest
of them is padded on the left again, where a trial found that this changes nothing.

Shapes: B rows, C columns, L new columns, H hidden.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from functools import cache
from inspect import signature
from typing import Any, Literal, Protocol, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache

from opd_stream.errors import UserError

CACHE_NAMES = ("past_key_values", "cache_params", "cache", "state", "mems")
LLAMA_FAMILY = ("llama", "qwen2", "qwen3", "mistral")  # known: not tried
BLOCKS = ("chunk", "compressed", "sparse", "indexed")  # in a layer's type: columns are counted
WINDOWS = ("window", "local", "chunk", "block", "sparse")  # in settings: attention by distance
MOST_REREAD = 8  # tokens of a row that stand outside such a cache
MIN_SAVING = 0.9  # share of the tokens from which reading what is shared once is worth a cache
MIN_SHARED = 16  # tokens of a beginning that is read once
MIN_PADDING = 1024  # tokens of it that are worth several passes
ROWS_OF_A_PASS = 8
PROMPTS, NEW = (9, 5, 5), 6  # tokens of the texts' beginnings, and after them
SHARED = 3  # of the first of them, read once
NOISE_EPSILONS, NOISE_GAPS = 100, 30  # of the dtype; of what a batch changes: still rounding
CHOSEN = (2, 0, 1, 2)  # rows that read on

Read = tuple[int, int, torch.Tensor]  # a text, the place of the first, hidden states [L, H]
log = logging.getLogger(__name__)


class Decoder(Protocol):
    """A batch of rows in decoding."""

    def prefill(self, ids_BC: torch.Tensor, mask_BC: torch.Tensor) -> torch.Tensor:
        """Read the left-padded prompts (mask: 1 = a token); returns the last hidden state."""
        ...

    def step(self, ids_B: torch.Tensor) -> torch.Tensor:
        """Append one token to every row; returns its hidden state [B, H]."""
        ...

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows, in this order; a row may be named several times."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A way to read on.

    The cache is the library's, whose rows it selects itself or, where its layers forget some of
    what they hold, we do ("tensors"); or the model's own, which it returns; or there is none.

    Example:
        >>> Reading(cache="library", pads=False)  # a hybrid: rows of equal length together
    """

    cache: Literal["library", "tensors", "own", "none"]
    pads: bool = True  # on the left, rows of several lengths in one batch
    masks_steps: bool = True  # a step is told which columns are padding, too
    rereads: bool = False  # the latest tokens together, where one alone is not exact
    continues: bool = False  # several tokens at once may follow what the cache holds
    shares: bool = False  # padding may stand behind a beginning that all rows share

    def open(self, decoder: Any) -> Decoder:
        """A batch of rows in decoding."""
        if self.cache == "none":
            return WholeRows(decoder)
        if self.rereads:
            return RereadingRows(decoder, self)
        return CachedRows(decoder, self) if self.pads else GroupedRows(decoder, self)

    def __str__(self) -> str:
        if self.cache == "none":
            return "no cache: slow"
        if self.rereads:
            return "cached, the latest tokens read again"
        return "cached" if self.pads else "cached, rows of equal length together"


FASTEST = Reading(cache="library")
REREADING = Reading(cache="library", rereads=True)


def decoder_of(model: Any) -> Any:
    """The module whose last hidden state enters the head."""
    found, whole = model.get_decoder(), getattr(model, "get_base_model", lambda: model)()
    is_decoder = found is not whole and found is not model.get_output_embeddings()
    return found if is_decoder else whole.model


def layers_of(decoder: torch.nn.Module) -> torch.nn.ModuleList:
    """The layers, whatever the decoder calls them: of its lists the one with most weights."""
    lists = [module for module in decoder.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()))


def rows_hidden(decoder: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Hidden states [B, L, H] of whole rows, padded on the right (mask: 1 = a token)."""
    return decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state


def left_positions(mask: torch.Tensor) -> torch.Tensor:
    """Positions of rows that are padded on the left, from 0 at their first token."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def shared_tokens(ids_BC: torch.Tensor, mask_BC: torch.Tensor) -> int:
    """Tokens that all rows begin with, if reading them once saves enough, else 0.

    At least one token of every row is left. Rows are padded on the left.
    """
    rows, width = ids_BC.shape
    lengths_B = mask_BC.sum(1)
    most = int(lengths_B.min()) - 1
    if most < MIN_SHARED or rows == 1:
        return 0
    places_BP = torch.arange(most, device=ids_BC.device) + (width - lengths_B)[:, None]
    first_BP = ids_BC.gather(1, places_BP)
    shared = int((first_BP == first_BP[:1]).all(0).long().cumprod(0).sum())
    return shared if is_worth_it(shared, rows, int(lengths_B.sum())) else 0


def is_worth_it(shared: int, rows: int, tokens: int) -> bool:
    """Whether a beginning of so many tokens is read once for so many rows with so many tokens."""
    return shared >= MIN_SHARED and saves_enough(tokens - shared * (rows - 1), tokens)


def saves_enough(tokens: int, separately: int) -> bool:
    """Whether reading so many tokens in place of others is worth a cache."""
    return tokens <= MIN_SAVING * separately


def first_tokens(ids_BC: torch.Tensor, mask_BC: torch.Tensor, count: int) -> torch.Tensor:
    """The first tokens of the first row [count], which is padded on the left."""
    start = ids_BC.shape[1] - int(mask_BC[0].sum())
    return ids_BC[0, start : start + count]


def without_first(
    ids_BC: torch.Tensor, mask_BC: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of what follows the first tokens of every row, padded on the left."""
    width = int(mask_BC.sum(1).max()) - count
    is_left_BC = mask_BC.cumsum(1) > count
    return ids_BC[:, -width:], (mask_BC * is_left_BC)[:, -width:]


def passes_of(lengths: Sequence[int]) -> list[slice]:
    """The rows of each forward pass: all at once, unless fewer would save much padding.

    Rows of similar length should stand beside each other.
    """
    count, tokens = len(lengths), sum(lengths)
    padding = count * max(lengths) - tokens
    if padding < max(MIN_PADDING, tokens // 10):
        return [slice(0, count)]
    return [slice(start, start + ROWS_OF_A_PASS) for start in range(0, count, ROWS_OF_A_PASS)]


class CachedRows:
    """Rows on one cache; padded on the left, or of equal length."""

    def __init__(self, decoder: Any, reading: Reading) -> None:
        self._decoder, self._reading = decoder, reading
        self._parameters = _parameters(cast(type[torch.nn.Module], type(decoder)))
        self._name = next((name for name in CACHE_NAMES if name in self._parameters), "")
        self.cache: Any = None
        self._mask = torch.zeros(0, 0)  # [B, C], when something is read
        if reading.cache in ("library", "tensors"):
            self.cache = DynamicCache(config=decoder.config)

    def prefill(self, ids_BC: torch.Tensor, mask_BC: torch.Tensor) -> torch.Tensor:
        shared = shared_tokens(ids_BC, mask_BC) if self._reading.shares else 0
        if shared:
            self.read_once(first_tokens(ids_BC, mask_BC, shared), len(ids_BC))
            ids_BC, mask_BC = without_first(ids_BC, mask_BC, shared)
        return self.read(ids_BC, mask_BC)[:, -1]

    def read_once(self, ids_P: torch.Tensor, rows: int) -> None:
        """The beginning of so many rows."""
        self.read(ids_P[None], torch.ones_like(ids_P[None]))
        self.select(torch.zeros(rows, dtype=torch.long, device=ids_P.device))

    def step(self, ids_B: torch.Tensor) -> torch.Tensor:
        return self.read(ids_B[:, None], torch.ones_like(ids_B[:, None]))[:, -1]

    def read(self, ids_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, L, H] of new columns; padding among them is on the right."""
        is_first = self._mask.shape[1] == 0
        self._mask = mask_BL if is_first else torch.cat([self._mask, mask_BL], dim=1)
        given: dict[str, Any] = {}
        if self._reading.pads:
            if is_first or self._reading.masks_steps:
                given["attention_mask"] = self._mask
            if "position_ids" in self._parameters:
                given["position_ids"] = left_positions(self._mask)[:, -ids_BL.shape[1] :]
        if self.cache is not None:
            given[self._name] = self.cache
        output = self._decoder(input_ids=ids_BL, use_cache=True, **given)
        if self._reading.cache == "own":
            self.cache = getattr(output, self._name)
        return output.last_hidden_state

    def copy(self) -> "CachedRows":
        """The same rows on a cache of their own."""
        other = copy(self)
        other.cache = deepcopy(self.cache)
        return other

    def select(self, rows: torch.Tensor) -> None:
        if self._mask.shape[1] == 0:
            return
        if self._reading.cache == "tensors":
            for layer in self.cache.layers:
                held = cast("dict[str, Any]", vars(layer))
                held.update(_selected_tensors(held, rows, len(self._mask)))
            if hasattr(self.cache, "position_ids"):  # [3, B, C], of Qwen 4
                self.cache.position_ids = self.cache.position_ids.index_select(1, rows)
        else:
            self.cache = _selected(self.cache, rows, self._reading.cache)
        self._mask = self._mask[rows]


class GroupedRows:
    """Rows of equal length on a cache of their own, without any padding."""

    def __init__(self, decoder: Any, reading: Reading) -> None:
        self._decoder, self._reading = decoder, reading

    def prefill(self, ids_BC: torch.Tensor, mask_BC: torch.Tensor) -> torch.Tensor:
        lengths_B = mask_BC.sum(1)
        self._groups: list[tuple[torch.Tensor, CachedRows]] = []  # places of its rows
        read: list[torch.Tensor] = []
        for length in cast("list[int]", lengths_B.unique().tolist()):  # pyright: ignore
            places = (lengths_B == length).nonzero()[:, 0]
            rows = CachedRows(self._decoder, self._reading)
            read.append(rows.prefill(ids_BC[places, -length:], mask_BC[places, -length:]))
            self._groups.append((places, rows))
        return self._in_place(read)

    def step(self, ids_B: torch.Tensor) -> torch.Tensor:
        return self._in_place([rows.step(ids_B[places]) for places, rows in self._groups])

    def select(self, rows: torch.Tensor) -> None:
        kept: list[tuple[torch.Tensor, CachedRows]] = []
        for places, group in self._groups:
            wanted, within = (rows[:, None] == places).nonzero(as_tuple=True)
            if len(wanted):
                group.select(within)
                kept.append((wanted, group))
        self._groups = kept

    def _in_place(self, parts: list[torch.Tensor]) -> torch.Tensor:
        order = torch.cat([places for places, _ in self._groups])
        return torch.cat(parts)[order.argsort()]


class RereadingRows:
    """Rows on a cache that is exact for several tokens at once and not for one.

    Mamba 2 clamps its steps of time in one way of the two. So at least the two latest tokens stand
    outside the cache, and are read together on a copy of it.
    """

    def __init__(self, decoder: Any, reading: Reading) -> None:
        self._rows = CachedRows(decoder, reading)

    def prefill(self, ids_BC: torch.Tensor, mask_BC: torch.Tensor) -> torch.Tensor:
        self._ids, self._mask = ids_BC, mask_BC
        return self._read()

    def step(self, ids_B: torch.Tensor) -> torch.Tensor:
        self._ids = torch.cat([self._ids, ids_B[:, None]], dim=1)
        self._mask = pad(self._mask, (0, 1), value=1)
        is_long = self._ids.shape[1] > MOST_REREAD and self._mask[:, :-2].any(1).all()
        if is_long:  # and no row would begin with padding alone
            self._rows.read(self._ids[:, :-2], self._mask[:, :-2])
            self._ids, self._mask = self._ids[:, -2:], self._mask[:, -2:]
        return self._read()

    def select(self, rows: torch.Tensor) -> None:
        self._rows.select(rows)
        self._ids, self._mask = self._ids[rows], self._mask[rows]

    def _read(self) -> torch.Tensor:
        return self._rows.copy().read(self._ids, self._mask)[:, -1]


class WholeRows:
    """Rows read anew at every step: exact for every causal decoder, and slow."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder

    def prefill(self, ids_BC: torch.Tensor, mask_BC: torch.Tensor) -> torch.Tensor:
        width = mask_BC.shape[1]
        self._lengths = mask_BC.sum(1)
        columns = torch.arange(width, device=ids_BC.device)
        from_left = (columns + width - self._lengths[:, None]) % width
        self._ids = ids_BC.gather(1, from_left)
        return self._read()

    def step(self, ids_B: torch.Tensor) -> torch.Tensor:
        self._ids = pad(self._ids, (0, 1))
        self._ids[torch.arange(len(ids_B), device=ids_B.device), self._lengths] = ids_B
        self._lengths = self._lengths + 1
        return self._read()

    def select(self, rows: torch.Tensor) -> None:
        self._ids, self._lengths = self._ids[rows], self._lengths[rows]

    def _read(self) -> torch.Tensor:
        ids = self._ids[:, : int(self._lengths.max())]
        mask = torch.arange(ids.shape[1], device=ids.device) < self._lengths[:, None]
        hidden = rows_hidden(self._decoder, ids, mask.long())
        return hidden[torch.arange(len(ids), device=ids.device), self._lengths - 1]


def _selected(state: Any, rows: torch.Tensor, kind: str) -> Any:
    """The rows of a cache, or of tensors whose first dimension is the batch."""
    verb = "reorder_cache" if kind == "library" else "batch_select_indices"
    if hasattr(state, verb):  # every layer of the library's has the first, a cache of a model's own
        getattr(state, verb)(rows)  # tends to the second
        return state
    if isinstance(state, torch.Tensor):
        return state[rows]
    if isinstance(state, (list, tuple)):
        return [_selected(part, rows, kind) for part in cast("list[Any]", state)]
    raise TypeError(f"a {type(state).__name__} cannot be selected by rows")


def _selected_tensors(held: Any, rows: torch.Tensor, batch: int) -> Any:
    """The rows of every tensor whose first dimension is the batch; the rest as it is."""
    if isinstance(held, torch.Tensor):
        return held.index_select(0, rows) if held.dim() and len(held) == batch else held
    if isinstance(held, dict):
        entries = cast("dict[Any, Any]", held).items()
        return {name: _selected_tensors(part, rows, batch) for name, part in entries}
    if isinstance(held, list):
        return [_selected_tensors(part, rows, batch) for part in cast("list[Any]", held)]
    return held


@cache
def _parameters(decoder: type[torch.nn.Module]) -> frozenset[str]:
    """Names of what a decoder's forward pass takes."""
    return frozenset(signature(decoder.forward).parameters)


def reading_of(decoder: Any) -> Reading:
    """The fastest way in which a decoder reads on exactly, found at the first call.

    Raises:
        UserError: the decoder is not causal, or rows of a batch change each other.
    """
    if decoder not in _found:
        is_plain = getattr(decoder.config, "model_type", None) in LLAMA_FAMILY
        _found[decoder] = (
            replace(FASTEST, continues=True, shares=not _has_windows(decoder.config))
            if is_plain
            else _Trial(decoder).reading()
        )
        if _found[decoder].cache == "none":
            log.warning(
                "%s has no cache that goes on exactly: every token of a rollout reads the whole "
                "text anew, which is slow",
                type(decoder).__name__,
            )
    return _found[decoder]


_found: WeakKeyDictionary[torch.nn.Module, Reading] = WeakKeyDictionary()


def short_texts(model: Any) -> tuple[torch.Tensor, ...]:
    """Ids of three texts, two of one length, on the device of a model or decoder."""
    weight = cast(torch.Tensor, model.get_input_embeddings().weight)
    first = min(8, len(weight) // 2)  # behind special ids, as a rule
    ids = first + 7 * torch.arange(sum(PROMPTS) + 3 * NEW) % (len(weight) - first)
    ends = np.cumsum([count + NEW for count in PROMPTS])[:-1].tolist()
    return ids.to(weight.device).tensor_split(ends)


class _Trial:
    """Three short texts, read in every way and compared with each of them alone."""

    def __init__(self, decoder: Any) -> None:
        self._decoder, self._problem = decoder, ""
        weight = cast(torch.Tensor, decoder.get_input_embeddings().weight)
        self._epsilon = float(torch.finfo(weight.dtype).eps)
        self._most = self._epsilon**0.5
        self._texts = short_texts(decoder)
        self._prompts = _padded([text[:-NEW] for text in self._texts], left=True)
        self._chosen = torch.tensor(CHOSEN, device=weight.device)

    @torch.no_grad()
    def reading(self) -> Reading:
        """The first way that gives the hidden states of each text alone."""
        try:
            whole = [_padded([text], left=False) for text in self._texts]
            self._alone = [rows_hidden(self._decoder, *text)[0] for text in whole]
        except Exception as error:  # whatever a library says
            raise UserError(f"{self._name} reads no rows of text ({_line(error)})") from error
        if not self._is_exact(self._rows_of_a_batch):
            raise UserError(
                f"{self._name} reads a row of a batch otherwise than alone ({self._problem}); "
                "expected a causal language model, in which padding changes nothing"
            )
        self._most = min(self._most, max(NOISE_EPSILONS * self._epsilon, NOISE_GAPS * self._worst))
        for way in _ways(self._decoder):
            if self._is_exact(self._by_steps, way):
                continues = way in (FASTEST, REREADING) and self._is_exact(self._at_once, way)
                shares = continues and way == FASTEST and not _has_windows(self._decoder.config)
                shares = shares and self._is_exact(self._after_a_beginning, way)
                return replace(way, continues=continues, shares=shares)
        raise UserError(
            f"{self._name} does not read a text from left to right ({self._problem}); expected a "
            "causal language model (of an encoder, one with is_decoder: true)"
        )

    @property
    def _name(self) -> str:
        return type(self._decoder).__name__

    def _is_exact(self, read: Callable[..., Iterator[Read]], *way: Reading) -> bool:
        try:
            gaps = [self._gap(row, start, hidden) for row, start, hidden in read(*way)]
        except Exception as error:  # where this is not the model's way
            self._problem = _line(error)
            return False
        self._worst = max(gaps)
        self._problem = f"hidden states {self._worst:.1g} apart, of 1; {self._most:.1g} is rounding"
        return all(gap <= self._most for gap in gaps)  # which NaN is not

    def _gap(self, row: int, start: int, hidden: torch.Tensor) -> float:
        """Mean difference as a share of the mean size."""
        right = self._alone[row][start : start + len(hidden)].float()
        return float((hidden.float() - right).abs().mean() / right.abs().mean())

    def _rows_of_a_batch(self) -> Iterator[Read]:
        together = rows_hidden(self._decoder, *_padded(self._texts, left=False))
        for row, text in enumerate(self._texts):
            yield row, 0, together[row, : len(text)]

    def _by_steps(self, way: Reading) -> Iterator[Read]:
        rows = way.open(self._decoder)
        read = [rows.prefill(*self._prompts)[self._chosen]]
        rows.select(self._chosen)
        for place in range(-NEW, 0):
            read.append(rows.step(torch.stack([self._texts[row][place] for row in CHOSEN])))
        for place, row in enumerate(CHOSEN):
            start = len(self._texts[row]) - NEW - 1
            yield row, start, torch.stack([hidden[place] for hidden in read])

    def _at_once(self, way: Reading) -> Iterator[Read]:
        rows = CachedRows(self._decoder, way)
        rows.prefill(*self._prompts)
        rows.select(self._chosen)
        counts = (NEW - 1, NEW, NEW - 2, NEW)  # padding on the right, too
        new = [self._texts[row][-NEW:][:count] for row, count in zip(CHOSEN, counts, strict=True)]
        read = rows.read(*_padded(new, left=False))
        for place, (row, count) in enumerate(zip(CHOSEN, counts, strict=True)):
            yield row, len(self._texts[row]) - NEW, read[place, :count]

    def _after_a_beginning(self, way: Reading) -> Iterator[Read]:
        """The first text's beginning before all of it and before a part: padding between them."""
        text = self._texts[0]
        rows = CachedRows(self._decoder, way)
        rows.read_once(text[:SHARED], len(CHOSEN))
        ends = [len(text) - NEW - place for place in range(len(CHOSEN))]
        read = rows.read(*_padded([text[SHARED:end] for end in ends], left=True))
        for place, end in enumerate(ends):
            yield 0, SHARED, read[place, SHARED - end :]
        step = rows.step(torch.stack([text[end] for end in ends]))
        for place, end in enumerate(ends):
            yield 0, end, step[place : place + 1]


def _has_windows(config: Any) -> bool:
    """Whether some layer may look at distances between columns; then none may be left empty."""
    kinds: list[str] | None = getattr(config, "layer_types", None)
    if kinds:
        return set(kinds) != {"full_attention"}
    settings = cast("dict[str, Any]", config.to_dict())
    return any(value and any(word in name for word in WINDOWS) for name, value in settings.items())


def _ways(decoder: Any) -> Iterator[Reading]:
    """The fastest first."""
    kinds: list[str] = getattr(decoder.config, "layer_types", None) or []
    counts_columns = any(word in kind for kind in kinds for word in BLOCKS)
    if not counts_columns:
        yield FASTEST
        yield replace(FASTEST, masks_steps=False)
        yield Reading(cache="own")
    yield Reading(cache="library", pads=False)
    yield Reading(cache="tensors", pads=False)
    yield Reading(cache="own", pads=False)
    if not counts_columns:
        yield REREADING
    yield Reading(cache="none", pads=False)


def _padded(rows: Sequence[torch.Tensor], *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [B, C]."""
    width = max(map(len, rows))
    gaps = [((width - len(row), 0) if left else (0, width - len(row))) for row in rows]
    ids = torch.stack([pad(row, gap) for row, gap in zip(rows, gaps, strict=True)])
    mask = [pad(torch.ones_like(row), gap) for row, gap in zip(rows, gaps, strict=True)]
    return ids, torch.stack(mask)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
