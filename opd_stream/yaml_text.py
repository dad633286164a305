"""YAML that a person wrote, read within bounds.

YAML takes the last of two values under one key in silence, a few lines of aliases can stand for
more values than there is memory, and YAML 1.1 reads 12:30 as 750 and 010 as 8.
Here all are refused.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml

MOST_CHARACTERS = 2**20
MOST_VALUES = 100_000  # with every alias written out
MOST_DEPTH = 64
MOST_DIGITS = 400  # of a number
_HALF = re.compile(r"[\ud800-\udfff]")
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def parse_yaml(text: str) -> Any:
    """The value of a YAML text; None: it holds nothing.

    Raises:
        ValueError: it is none, names a key twice, holds a number that is easily misread, or is too
            large (one line, with the place).
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"{len(text):,} characters; expected at most {MOST_CHARACTERS:,}")
    loader: Any = None  # whose methods are not typed
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _size(node, {})
        return loader.construct_document(node)
    except Exception as error:  # the loader's constructors raise what they meet: `!!timestamp x`
        is_said = isinstance(error, yaml.YAMLError | ValueError | RecursionError)
        text = str(error) if is_said else f"a value that its tag does not fit ({error})"
        raise ValueError(" ".join(text.split())) from error
    finally:
        if loader is not None:
            loader.dispose()


def _check_scalar(node: yaml.ScalarNode) -> None:
    if half := _HALF.search(node.value):
        raise ValueError(
            f"{half[0]!r}, half a surrogate pair{node.start_mark}; write the character"
        )
    if node.tag not in _NUMBERS:
        return
    if len(node.value) > MOST_DIGITS:
        raise ValueError(f"a number of {len(node.value):,} characters{node.start_mark}")
    if ":" in node.value or re.match(r"[-+]?0[\d_]", node.value):
        raise ValueError(
            f"{node.value}, which YAML 1.1 counts in sixties or eights{node.start_mark}; write a "
            "decimal number, or quote it"
        )


def _size(node: yaml.Node, sizes: dict[int, int], depth: int = 0) -> int:
    """Values below a node; `sizes` are of nodes that were seen, 0 while they are being counted."""
    if depth > MOST_DEPTH:
        raise ValueError(f"more than {MOST_DEPTH} values in one another{node.start_mark}")
    if isinstance(node, yaml.ScalarNode):
        _check_scalar(node)
    if id(node) in sizes:
        if sizes[id(node)]:
            return sizes[id(node)]
        raise ValueError(f"an alias of what it stands in{node.start_mark}; write the value out")
    sizes[id(node)] = 0
    size = 1 + sum(_size(inner, sizes, depth + 1) for inner in _inside(node))
    if size > MOST_VALUES:
        raise ValueError(
            f"aliases that stand for more than {MOST_VALUES:,} values{node.start_mark}; write the "
            "values out"
        )
    sizes[id(node)] = size
    return size


def _inside(node: yaml.Node) -> Iterator[yaml.Node]:
    """The nodes in a node."""
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        lines: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                line, name = key.start_mark.line + 1, (key.tag, key.value)
                if name in lines:
                    raise ValueError(
                        f"the key {key.value!r:.80} stands in lines {lines[name]} and {line}; keep "
                        "one of them"
                    )
                lines[name] = line
            yield key
            yield value
