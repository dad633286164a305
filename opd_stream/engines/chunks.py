"""How many rows of logits exist at one time while scoring; needs no torch."""

LOGITS_PER_CHUNK = {"cpu": 2**22, "cuda": 2**28}  # that a chunk is cut to: a CPU's cache holds them
FEWEST_ROWS = 64  # of a chunk, however large the vocabulary: below, the head's product is slow
MOST_LOGITS = {"cpu": 2**24, "cuda": 2**28}  # that a chunk of the fewest rows should not exceed


def logit_rows(vocabulary: int, device: str) -> int:
    """Completion tokens whose logits exist at one time: few enough for a CPU's caches."""
    return max(FEWEST_ROWS, LOGITS_PER_CHUNK[device] // vocabulary)
