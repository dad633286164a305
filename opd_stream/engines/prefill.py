"""Forward passes over prompts and completions; a prompt that several rows share is read once.

What comes back is what the head needs and nothing else: the hidden state that predicts each
completion token.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from opd_stream.logprobs import completion_rows

Ids = NDArray[np.integer[Any]]

LEAST_SAVING = 0.9  # share of the tokens from which reading shared prompts once is worth a cache


def completion_hidden(
    decoder: Any, prompts: Sequence[Ids], completions: Sequence[Ids], device: torch.device
) -> torch.Tensor:
    """Hidden states that predict the completion tokens [N, H], row after row.

    Args:
        decoder: of a Hugging Face causal language model, without its head.
        prompts: ids of each row; equal ones are read once where that saves enough.
        completions: ids of each row; some may be empty.
        device: of the model.
    """
    place_of: dict[bytes, int] = {}
    shared_R = [
        place_of.setdefault(ids.astype(np.int64).tobytes(), len(place_of)) for ids in prompts
    ]
    firsts = [shared_R.index(place) for place in range(len(place_of))]
    apart = sum(map(len, prompts)) + sum(map(len, completions))
    together = sum(len(prompts[row]) for row in firsts) + sum(map(len, completions))
    longest = max(map(len, completions))
    if together > LEAST_SAVING * apart or longest < 2:
        return _apart(decoder, prompts, completions, device)
    unique = [prompts[row] for row in firsts]
    return _together(decoder, unique, shared_R, completions, device)


def _apart(
    decoder: Any, prompts: Sequence[Ids], completions: Sequence[Ids], device: torch.device
) -> torch.Tensor:
    """Each row whole, padded on the right."""
    rows = [np.concatenate(pair) for pair in zip(prompts, completions, strict=True)]
    ids, mask = padded(rows, device, side="right")
    hidden = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    places = completion_rows(
        torch.tensor([len(prompt) for prompt in prompts]),
        torch.tensor([len(completion) for completion in completions]),
        padded_length=ids.shape[1],
    )
    return hidden.flatten(0, 1)[places.to(device)]


def _together(
    decoder: Any,
    prompts: Sequence[Ids],
    shared_R: Sequence[int],
    completions: Sequence[Ids],
    device: torch.device,
) -> torch.Tensor:
    """Prompts once, padded on the left; then completions on their keys and values."""
    ids, mask = padded(prompts, device, side="left")
    found = decoder(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        use_cache=True,
    )
    rows = torch.tensor(shared_R, device=device)
    cache = found.past_key_values
    cache.batch_select_indices(rows)
    last_R1H = found.last_hidden_state[rows, -1:]
    new_ids, new_mask = padded(
        [completion[:-1] for completion in completions], device, side="right"
    )
    lengths_R = mask.sum(1)[rows]
    positions = lengths_R[:, None] + torch.arange(new_ids.shape[1], device=device)
    hidden = decoder(
        input_ids=new_ids,
        attention_mask=torch.cat([mask[rows], new_mask], dim=1),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    hidden = torch.cat([last_R1H, hidden], dim=1)
    counts = torch.tensor([len(completion) for completion in completions], device=device)
    return hidden[torch.arange(hidden.shape[1], device=device) < counts[:, None]]


def padded(
    rows: Sequence[Ids], device: torch.device, *, side: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask [R, L]; padding is id 0 and never read."""
    width = max(map(len, rows))
    ids = np.zeros((len(rows), width), np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    for place, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        ids[place, start : start + len(row)] = row
        mask[place, start : start + len(row)] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
