"""From a prompt source to the prompts artifact: ids, text and reference answer, once.

No later stage sees a template or a tokenizer's opinion of the prompt: ids travel from here on.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opd_stream.errors import UserError, named
from opd_stream.rendering import ChatTemplate, Prompt, RawTemplate, Renderer, Rendering
from opd_stream.rows import PlacedRow
from opd_stream.sources import EmbeddedPrompts, Prompts, belongs, read_rows, shown
from opd_stream.store.shards import COMPLETIONS, LEVEL, PROMPTS, id_lists

ROWS_AT_ONCE = 1024  # of a source: what a tokenizer is given in one call


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenisedPrompts:
    """A source, or a part of it, in the prompts schema, and how many of its rows are not in it."""

    table: pa.Table
    lost: dict[str, int]  # why -> rows, a key of `LOSSES`; only what lost some


# Why rows of a source are left out, as counts of an artifact name it, and in words.
LOSSES = {
    "skipped_long": "longer than max_prompt_tokens (long_prompts=skip)",
    "skipped_control_tokens": "control tokens in their text (template.control_tokens=skip)",
}


def lost_rows(field: str, kept: int, counts: Mapping[str, float]) -> Iterator[str]:
    """A line for every reason why rows of a source are left out.

    Args:
        field: of the config that names the source.
        kept: rows that are not left out.
        counts: of the artifact, or `TokenisedPrompts.lost`.
    """
    found = {name: int(counts[name]) for name in LOSSES if counts.get(name)}
    of = kept + sum(found.values())
    for name, rows in found.items():
        yield f"{field}: {rows:,} of {of:,} rows are left out: {LOSSES[name]}"


def prompts_table(source: Prompts, tokenizer: Any) -> pa.Table:
    """`tokenised_prompts`, without what was lost."""
    return tokenised_prompts(source, tokenizer).table


def tokenised_prompts(source: Prompts, tokenizer: Any) -> TokenisedPrompts:
    """Read, template and tokenise a source into the prompts schema; raises as `tokenised_parts`."""
    lost: Counter[str] = Counter()
    tables: list[pa.Table] = []
    for part in tokenised_parts(source, tokenizer):
        tables.append(part.table)
        lost.update(part.lost)
    return TokenisedPrompts(table=pa.concat_tables(tables), lost=dict(lost))


def tokenised_parts(source: Prompts, tokenizer: Any) -> Iterator[TokenisedPrompts]:
    """`tokenised_prompts` of so many rows of the source at a time as are in memory.

    Raises:
        UserError: see `read_rows`; or a prompt is longer than the limit, or empty; or, at the end,
            none was kept.
    """
    renderer = Renderer(source.template, tokenizer)
    rows = (prompt for prompt, _ in read_rows(source))
    read, kept, lost = 0, 0, Counter[str]()
    while prompts := list(islice(rows, ROWS_AT_ONCE)):
        part = _tokenised(source, renderer, prompts)
        read, kept = read + len(prompts), kept + part.table.num_rows
        lost.update(part.lost)
        yield part
    if not kept:
        raise UserError(
            f"all {read} prompts are left out: {lost['skipped_long']} longer than "
            f"{source.max_prompt_tokens} tokens, {lost['skipped_control_tokens']} with control "
            "tokens; raise the limit, or use other prompts"
        )


def _tokenised(source: Prompts, renderer: Renderer, prompts: list[Prompt]) -> TokenisedPrompts:
    """Some prompts of a source, without those that are left out."""
    spelled = _with_control_tokens(source.template, renderer, prompts)
    left = [prompt for prompt in prompts if prompt.prompt_id not in spelled]
    ids = renderer.ids_of(left)
    kept = [row for row, (p, n) in enumerate(zip(left, ids, strict=True)) if _fits(source, p, n)]
    lost = {"skipped_long": len(left) - len(kept), "skipped_control_tokens": len(spelled)}
    table = _table([left[row] for row in kept], [ids[row] for row in kept])
    if source.gives_answers:
        table = _with_completions(table, renderer, [left[row] for row in kept])
    if not isinstance(source, EmbeddedPrompts) and source.level_field is not None:
        levels = [left[row].level for row in kept]
        table = table.append_column(LEVEL, pa.array(levels, pa.string()))
    return TokenisedPrompts(table=table, lost={name: rows for name, rows in lost.items() if rows})


def rendered_prompts(
    source: Prompts, rendering: Rendering, tokenizer: Any, prompts: pa.Table
) -> pa.Table:
    """`rendered_parts` of one part."""
    return next(rendered_parts(source, rendering, tokenizer, [prompts]))


def rendered_parts(
    source: Prompts, rendering: Rendering, tokenizer: Any, parts: Iterable[pa.Table]
) -> Iterator[pa.Table]:
    """The prompts of a source that a teacher reads, as it reads them, however long they become.

    `parts` are those of the student, in the order of the source; each gives those that the teacher
    has of it.

    Raises:
        UserError: see `read_rows`; the template, the view or the rule does not take one, or one is
            not there.
    """
    rows, template, renderer = read_rows(source), rendering.template, None
    if template is not None:
        with named(rendering.field):
            renderer = Renderer(template, tokenizer)
    for prompts in parts:
        found = [_found(name, rows) for name in prompts["prompt_id"].to_pylist()]
        if rendering.when:
            with named(rendering.setting("when")):
                kept = [n for n, (_, row) in enumerate(found) if belongs(rendering.when, row)]
            prompts, found = prompts.take(pa.array(kept, pa.int64())), [found[n] for n in kept]
        yield prompts if renderer is None else _rendered(source, rendering, renderer, found)


def _rendered(
    source: Prompts,
    rendering: Rendering,
    renderer: Renderer,
    found: Sequence[tuple[Prompt, PlacedRow]],
) -> pa.Table:
    """Some prompts of a source as a teacher with a template or a view reads them."""
    template, view = rendering.template, rendering.view
    assert template is not None  # there is a renderer
    with named(rendering.field):
        read = [prompt if view is None else shown(view, source, prompt, r) for prompt, r in found]
        spelled = _with_control_tokens(template, renderer, read)
        if spelled:  # by the view: prompts that spell them are not among those of the student
            raise UserError(
                f"the view of {len(spelled)} prompts spells control tokens, the first "
                f"{next(iter(spelled))!r}, and the teacher reads every prompt; set "
                f"{rendering.setting('template')}, with control_tokens=escape or allow"
            )
        return _table(read, renderer.ids_of(read))


def _found(name: str, rows: Iterator[tuple[Prompt, PlacedRow]]) -> tuple[Prompt, PlacedRow]:
    """Read on to the row of a prompt."""
    found = next((each for each in rows if each[0].prompt_id == name), None)
    if found is None:
        raise UserError(
            f"prompt {name!r} is no longer in the source; expected the same rows as before; "
            "restore it, or name another revision"
        )
    return found


def _table(prompts: Sequence[Prompt], ids: Sequence[NDArray[np.int32]]) -> pa.Table:
    columns = [
        pa.array([prompt.prompt_id for prompt in prompts], pa.string()),
        id_lists(ids),
        pa.array([prompt.text for prompt in prompts], pa.string()),
        pa.array([prompt.answer for prompt in prompts], pa.string()),
    ]
    return pa.Table.from_arrays(columns, schema=PROMPTS)


def _with_completions(table: pa.Table, renderer: Renderer, prompts: Sequence[Prompt]) -> pa.Table:
    """Prompts with the ids of their given answers."""
    ids = [[renderer.completion_ids(p, text).tolist() for text in p.completions] for p in prompts]
    return table.append_column(COMPLETIONS, pa.array(ids, pa.list_(pa.list_(pa.uint32()))))


def _with_control_tokens(
    template: RawTemplate | ChatTemplate, renderer: Renderer, prompts: Sequence[Prompt]
) -> dict[str, list[str]]:
    """Prompts that are skipped, since their text spells control tokens; these tokens."""
    if isinstance(template, RawTemplate) or template.control_tokens in ("allow", "escape"):
        return {}
    found = {prompt.prompt_id: renderer.control_tokens(prompt) for prompt in prompts}
    spelled = {prompt_id: tokens for prompt_id, tokens in found.items() if tokens}
    if spelled and template.control_tokens == "refuse":
        first, tokens = next(iter(spelled.items()))
        raise UserError(
            f"{len(spelled)} of {len(prompts)} prompts spell control tokens, the first "
            f"{first!r} {tokens[0]!r}, which would end or begin turns; set "
            "template.control_tokens=escape to quote them, skip to leave such prompts out, or "
            "allow"
        )
    return spelled


def _fits(source: Prompts, prompt: Prompt, ids: NDArray[np.int32]) -> bool:
    """Whether a prompt is kept.

    Raises:
        UserError: it is empty, or too long where such prompts are refused.
    """
    if not len(ids):
        raise UserError(f"prompt {prompt.prompt_id!r} is empty; expected text; mend the source")
    limit = source.max_prompt_tokens
    if len(ids) > limit and (isinstance(source, EmbeddedPrompts) or source.long_prompts != "skip"):
        raise UserError(
            f"prompt {prompt.prompt_id!r} has {len(ids)} tokens; the limit is {limit}; "
            "raise max_prompt_tokens, or set long_prompts=skip to leave such prompts out"
        )
    return len(ids) <= limit


def shuffled_rows(*, rows: int, seed: int, round_index: int, per_round: int) -> list[int]:
    """The prompts of a round: consecutive slices of a permutation, a new one for each pass.

    Raises:
        UserError: a round wants more prompts than there are.
    """
    if per_round > rows:
        raise UserError(
            f"rollouts.prompts_per_round is {per_round} but there are {rows} prompts; "
            "lower it or add prompts"
        )
    rounds_per_pass = rows // per_round
    pass_index, place = divmod(round_index, rounds_per_pass)
    digest = hashlib.sha256(f"prompts/{seed}/{pass_index}".encode()).digest()
    order = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "big"))).permutation(
        rows
    )
    return order[place * per_round : (place + 1) * per_round].tolist()
