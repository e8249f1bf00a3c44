"""YAML text → plain values, and overrides of single keys. Every error is one line with its position."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1 << 20  # size of a recipe file
MAX_DEPTH = 50  # nesting of sections, and dots in an override
MAX_NODES = 100_000  # values in a document with all aliases expanded
_MERGE = "tag:yaml.org,2002:merge"


class RecipeError(ValueError):
    """An invalid recipe; the message lists every problem with its dotted path."""


class _Loader(yaml.SafeLoader):
    """A YAML loader that reads 1e-6 as a number and 2024-05-01 as a string (YAML 1.1 does the opposite)."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # as PyYAML spells it: first character → (tag, pattern)
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_values(path: Path) -> dict[str, Any]:
    """The sections of a recipe file.

    Raises:
        RecipeError: the file cannot be read, is not UTF-8, not YAML, empty, or not a mapping.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(data) > MAX_BYTES:
        raise RecipeError(f"{path}: {len(data)} bytes; a recipe may have at most {MAX_BYTES}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"{path}:{line}: not UTF-8 (byte 0x{data[error.start]:02x}); save the file as UTF-8"
        ) from None
    values = parse_yaml(text, str(path))
    if values is None:
        raise RecipeError(f"{path}: empty; a recipe must be a mapping of sections")
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe must be a mapping of sections, got {type(values).__name__}")
    return values


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML document with aliases and merge keys (``<<``) resolved; None if it is empty.

    Raises:
        RecipeError: the text is not YAML, gives a key twice, or exceeds the limits on nesting and number of values. The
            message begins with ``source``.
    """
    try:
        _check_depth(text, source)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_node(node, source)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise RecipeError(_one_line(error, source)) from None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        if isinstance(error, RecipeError):
            raise
        # PyYAML's constructors raise this for a value that does not match its tag: !!int x, a number of 5,000 digits
        raise RecipeError(f"{source}: not YAML: a value does not match its type ({error})") from None


def override(values: dict[str, Any], overrides: Sequence[str] | Mapping[str, Any]) -> None:
    """Put values at dotted paths, in place.

    Args:
        values: sections, changed in place.
        overrides: ``a.b=c`` strings (the value is YAML), or a mapping from dotted paths to values.

    Raises:
        RecipeError: an override is not ``key=value``, its value is not YAML, or its path runs through a plain value.
    """
    pairs = overrides.items() if isinstance(overrides, Mapping) else [_split(o) for o in overrides]
    for dotted, value in pairs:
        _set(values, dotted, value)


def _split(text: str) -> tuple[str, Any]:
    dotted, equals, value = text.partition("=")
    if not equals or not dotted.strip():
        raise RecipeError(f"--set takes key=value (optim.lr=1e-6), got {text!r}")
    return dotted.strip(), parse_yaml(value, f"--set {dotted.strip()}")


def _set(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Put ``value`` at a dotted path, creating missing mappings."""
    *sections, leaf = dotted.split(".")
    if len(sections) > MAX_DEPTH:
        raise RecipeError(f"{dotted[:60]}…: {len(sections)} sections deep; at most {MAX_DEPTH} are allowed")
    here: Any = values
    for depth, section in enumerate(sections):
        if here.get(section) is None:
            here[section] = {}
        here = here[section]
        if not isinstance(here, dict):
            at = ".".join(sections[: depth + 1])
            raise RecipeError(f"{dotted}: {at} has the value {here!r} and is not a section")
    here[leaf] = value


def _check_depth(text: str, source: str) -> None:
    """Check nesting on the stream of events, before any recursive code processes the document."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise RecipeError(f"{_place(event.start_mark, source)}: nested more than {MAX_DEPTH} deep")


def _check_node(root: yaml.Node, source: str) -> None:
    """Raise ``RecipeError`` for a key given twice, a NUL or surrogate character, or too large an expansion."""
    measured: dict[int, tuple[int, int]] = {}
    inside: set[int] = set()

    def measure(node: yaml.Node) -> tuple[int, int]:
        """Number of values below a node and their nesting, with aliases expanded."""
        if id(node) in inside:
            raise RecipeError(f"{_place(node.start_mark, source)}: an alias that contains itself")
        if id(node) not in measured:
            inside.add(id(node))
            below = [measure(child) for child in _children(node, source)]
            inside.discard(id(node))
            size, depth = 1 + sum(n for n, _ in below), 1 + max((d for _, d in below), default=0)
            if size > MAX_NODES or depth > MAX_DEPTH + 1:
                raise RecipeError(
                    f"{_place(node.start_mark, source)}: with aliases expanded, more than {MAX_NODES} values or "
                    f"nested more than {MAX_DEPTH} deep"
                )
            measured[id(node)] = size, depth
        return measured[id(node)]

    measure(root)


def _children(node: yaml.Node, source: str) -> list[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        return node.value
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                if key.value in seen:
                    raise RecipeError(f"{_place(key.start_mark, source)}: key {key.value!r} is given twice")
                seen.add(key.value)
        return [child for pair in node.value for child in pair]
    if any("\ud800" <= character <= "\udfff" or character == "\0" for character in node.value):
        raise RecipeError(f"{_place(node.start_mark, source)}: a string with a NUL or surrogate character")
    return []


def _place(mark: Any, source: str) -> str:
    return f"{source}:{mark.line + 1}" if mark is not None else source


def _one_line(error: yaml.YAMLError, source: str) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if isinstance(error, yaml.MarkedYAMLError):
        parts = [part for part in (error.context, error.problem) if part]
        where = f", column {mark.column + 1}" if mark is not None else ""
        return f"{_place(mark, source)}: not YAML: {': '.join(parts)}{where}"
    return f"{source}: not YAML: {' '.join(str(error).split())}"
