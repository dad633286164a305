"""A copy of the embedded teacher that reads its texts in other tokens, for docs/alignment.md.

    python -m benchmarks.other_tokenizer OUT --ids            # the same tokens under other ids
    python -m benchmarks.other_tokenizer OUT --merges 0.5     # the last half of its merges missing

Without merges the teacher's weights are as they were: it reads texts in pieces that it has seldom
seen, and is asked what comes next all the same.
"""

import argparse
import json
import shutil
from pathlib import Path

from tests.tiny_tokenizers import permuted

TEACHER = Path(__file__).parent.parent / "configs" / "models" / "ledger-teacher"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="new folder")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--ids", action="store_true", help="permute the vocabulary")
    kind.add_argument("--merges", type=float, help="share of the merges to leave out")
    arguments = parser.parse_args()
    if arguments.ids:
        permuted(TEACHER, arguments.out)
    else:
        without_merges(TEACHER, arguments.out, arguments.merges)


def without_merges(source: Path, folder: Path, share: float) -> None:
    """A copy whose tokenizer lacks the merges that were learned last; no id changes."""
    spec = json.loads((source / "tokenizer.json").read_text())
    merges = spec["model"]["merges"]
    spec["model"]["merges"] = merges[: len(merges) - round(share * len(merges))]
    shutil.copytree(source, folder)
    (folder / "tokenizer.json").write_text(json.dumps(spec))


if __name__ == "__main__":
    main()
