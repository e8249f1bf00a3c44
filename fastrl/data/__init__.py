"""Data: ``load_data("adapter:path?key=value")`` → records, checked before anything is trained on them.

The adapter may be a function of a user's own, ``my_data.py:rows:path`` (see ``user``).

Adapters, each in its own module with a ``load(path, query)`` (a new format is one more module and one more line here):

- ``rows``: rows of EasyR1, verl, ms-swift, TRL, VLM-R1, LLaVA, Perception-R1, recognised by their columns
- ``coco``: instance JSON → detection or counting     - ``refexp``: referring expressions → grounding
- ``pixmo``: counts with points → counting            - ``ocr``: lines, words, pages → OCR
- ``mot``, ``sav``, ``tracks``: tracked clips → trajectory   - ``scenes``: made-up pictures, every task
- ``lists``: several answers to a prompt with their rewards → PerPO
- ``captions``: pictures with reference captions     - ``reflection``: policy/critic dialogues → RePer
- ``utr``: questions about tracked clips with their answers → trajectory
- ``nextqa``, ``pope``: multiple choice, yes or no → qa
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from urllib.parse import quote, unquote

from fastrl.data.records import PROMPTS, Dataset, Record, question
from fastrl.data.sound import decoded
from fastrl.data.validate import DataError, Problem, fail, nearest

__all__ = [
    "ADAPTERS",
    "PROMPTS",
    "DataError",
    "Dataset",
    "Problem",
    "Record",
    "load_data",
    "own_spec",
    "parse_spec",
    "question",
    "read_data",
    "with_options",
]

# name → (module, function), imported when asked for. The module's KEYS are its query keys; else it checks them.
ADAPTERS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "rows": ("fastrl.data.any_rows", "load"),
        "coco": ("fastrl.data.coco", "load"),
        "refexp": ("fastrl.data.refexp", "load"),
        "pixmo": ("fastrl.data.pixmo", "load"),
        "ocr": ("fastrl.data.page_ocr", "load"),
        "scenes": ("fastrl.data.scenes", "load"),
        "mot": ("fastrl.data.tracks", "load_mot"),
        "sav": ("fastrl.data.tracks", "load_sav"),
        "tracks": ("fastrl.data.tracks", "load_jsonl"),
        "lists": ("fastrl.data.lists", "load"),
        "captions": ("fastrl.data.captions", "load"),
        "reflection": ("fastrl.data.reflection", "load"),
        "utr": ("fastrl.data.utr", "load"),
        "nextqa": ("fastrl.data.qa", "load_nextqa"),
        "pope": ("fastrl.data.qa", "load_pope"),
    }
)


_OWN = re.compile(r"((?:[^?:]*\.py|[A-Za-z_][\w.]*):[A-Za-z_]\w*):")  # a user's function


def own_spec(adapter: str | None, spec: str) -> str:
    """``spec`` read by a function of the user's (``my_data.py:rows``), or as it is where there is none."""
    if adapter is None:
        return spec
    head, _, rest = spec.partition(":")
    return f"{adapter}:{rest if head in ADAPTERS else spec}"


def parse_spec(spec: str) -> tuple[str, str, dict[str, str]]:
    """``adapter:path?key=value&key=value`` → (adapter, path, query). Values may be percent-encoded; ``+`` is a plus.

    Raises ``DataError`` for an unknown adapter, a part that is not ``key=value``, or a key given twice.
    """
    adapter, colon, rest = spec.partition(":")
    own = _OWN.match(spec)
    if own is not None and adapter not in ADAPTERS:
        adapter, colon, rest = own.group(1), ":", spec[own.end() :]
    if not colon:
        raise fail(spec, "bad spec", f"names no adapter: a spec is adapter:path?key=value ({', '.join(ADAPTERS)})")
    if adapter not in ADAPTERS and own is None:
        message = f"unknown data adapter {adapter!r}{nearest(adapter, ADAPTERS)}; a spec is adapter:path?key=value"
        raise fail(spec, "bad spec", message)
    path, _, options = rest.partition("?")
    if not path:
        raise fail(spec, "bad spec", f"no path after {adapter}:")
    query: dict[str, str] = {}
    for option in filter(None, options.split("&")):
        key, equals, value = option.partition("=")
        if not equals or key in query:
            raise fail(spec, "bad spec", f"option {option!r} must be key=value, each key once")
        query[key] = unquote(value)
    return adapter, path, query


def with_options(spec: str, **options: str | int | None) -> str:
    """``spec`` with query keys added; None adds nothing. Raises ``DataError``: the spec has the key with another value.

    Whether the adapter knows the key is checked when the data is loaded.
    """
    adapter, path, query = parse_spec(spec)
    given = {key: str(value) for key, value in options.items() if value is not None}
    for key, value in given.items():
        if query.get(key, value) != value:
            raise fail(spec, "bad spec", f"says {key}={query[key]}, data.{key} says {value}; give it in one place")
    query |= given
    options_text = "&".join(f"{key}={quote(value, safe='/:,+ ')}" for key, value in query.items())
    return f"{adapter}:{path}" + (f"?{options_text}" if query else "")


def load_data(
    spec: str,
    *,
    skip_bad: bool = False,
    deep: bool = False,
    misfit: Callable[[Record], str | None] | None = None,
) -> Dataset:
    """Load the data set that ``spec`` names, every row checked.

    ``misfit`` says why a sound record is of no use to whoever asks (None: it is of use); such a row is a bad one too.
    With ``deep`` every picture file is decoded, not only its header read; a record with a broken one is a bad row.
    With ``skip_bad`` bad rows are left out (``Dataset.skipped`` counts them, ``Dataset.reasons`` says why, and
    ``Dataset.problems`` where); without, a ``DataError`` reports them all. Also raises ``DataError`` for an unknown
    adapter or option (with the nearest valid name), an unreadable file, and when no record is left.
    """
    dataset = read_data(spec)
    if deep:
        dataset = decoded(dataset)
    if misfit is not None:
        dataset = dataset.fitting(misfit)
    if dataset.problems and not skip_bad:
        raise DataError(dataset.problems, _other_adapter(spec, dataset))
    if len(dataset) == 0:
        raise DataError(dataset.problems or dataset.left_out or [Problem(spec, "empty", "holds no records")])
    return dataset


def read_data(spec: str) -> Dataset:
    """What ``spec`` names, good and bad rows. Raises ``DataError`` as :func:`load_data` does, but not for bad rows."""
    adapter, path, query = parse_spec(spec)
    if adapter not in ADAPTERS:
        from fastrl.data.user import load

        return load(adapter, path, query)
    module_name, function = ADAPTERS[adapter]
    module = importlib.import_module(module_name)
    keys = getattr(module, "KEYS", None)
    if isinstance(keys, Mapping):
        keys = keys[adapter]
    for key in query:
        if keys is not None and key not in keys:
            raise fail(spec, "bad option", f"unknown option {key!r} of {adapter}{nearest(key, keys)}")
    loaded = getattr(module, function)(path, query)
    return loaded if isinstance(loaded, Dataset) else Dataset(loaded)


def _other_adapter(spec: str, dataset: Dataset) -> str:
    """A hint where most rows lack a column and are of another layout than the adapter's; else nothing."""
    lacking = sum(problem.kind == "missing field" for problem in dataset.problems)
    adapter, path, query = parse_spec(spec)
    if 2 * lacking < len(dataset) + len(dataset.problems) or adapter not in ("refexp", "pixmo", "ocr", "rows"):
        return ""
    from fastrl.data.any_rows import layout_of

    columns, found = layout_of(path, query.get("split"))
    if found in (None, adapter):
        return ""
    return f"The rows have columns {', '.join(columns)}: is this {found}:{path}?"
