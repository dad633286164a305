"""How many rows of logits exist at one time while scoring; needs no torch."""

LOGITS_PER_CHUNK = {"cpu": 2**22, "cuda": 2**28}  # that exist at one time while scoring
FEWEST_ROWS = 16  # of a chunk, however large the vocabulary


def logit_rows(vocabulary: int, device: str) -> int:
    """Completion tokens whose logits exist at one time: few enough for a CPU's caches."""
    return max(FEWEST_ROWS, LOGITS_PER_CHUNK[device] // vocabulary)
