"""The calculator of the embedded task: it works out sums that the student asks for."""

import re
from collections.abc import Sequence
from typing import Any

CALL = re.compile(r"(?<!\d)(\d{1,9})([+-])(\d{1,9})=\s*$")


def calculator(messages: Sequence[dict[str, Any]], reference: str | None) -> Any:
    """The result of a sum that the last turn ends with, such as `42+38=`; None: there is none.

    Example:
        >>> calculator([{"role": "assistant", "content": "Monday 42+38="}], None)
        [{'role': 'tool', 'content': '80'}]
    """
    found = CALL.search(str(messages[-1].get("content") or ""))
    if found is None:
        return None
    left, sign, right = int(found[1]), found[2], int(found[3])
    return [{"role": "tool", "content": f"{left + right if sign == '+' else left - right:02d}"}]
