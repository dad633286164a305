"""YAML that a person wrote, read within bounds.

YAML takes the last of two values under one key in silence, and a few lines of aliases can stand for
more values than there is memory. Here both are refused.
"""

from collections.abc import Iterator
from typing import Any

import yaml

MOST_CHARACTERS = 2**20
MOST_VALUES = 100_000  # with every alias written out


def parse_yaml(text: str) -> Any:
    """The value of a YAML text; None: it holds nothing.

    Raises:
        ValueError: it is none, names a key twice, or is too large (one line, with the place).
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"{len(text):,} characters; expected at most {MOST_CHARACTERS:,}")
    loader: Any = yaml.SafeLoader(text)  # whose methods are not typed
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _size(node, {})
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # as of a 30th of February
        raise ValueError(" ".join(str(error).split())) from error
    finally:
        loader.dispose()


def _size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Values below a node; `sizes` are of nodes that were seen, 0 while they are being counted."""
    if id(node) in sizes:
        if sizes[id(node)]:
            return sizes[id(node)]
        raise ValueError(f"an alias of what it stands in{node.start_mark}; write the value out")
    sizes[id(node)] = 0
    size = 1 + sum(_size(inner, sizes) for inner in _inside(node))
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
