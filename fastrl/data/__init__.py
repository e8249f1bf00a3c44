"""Data: ``load_data("adapter:path?key=value")`` → records, checked before anything is trained on them.

The adapter may also be a user's function, ``my_data.py:rows:path`` (see ``user``).

Adapters, each in its own module with a ``load(path, query)`` (a new format needs a module and a line here):

- ``rows``: rows of EasyR1, verl, ms-swift, TRL, VLM-R1, LLaVA, Perception-R1, recognised by their columns
- ``coco``: instance JSON → detection or counting     - ``refexp``: referring expressions → grounding
- ``pixmo``: counts with points → counting            - ``ocr``: lines, words, pages → OCR
- ``mot``, ``sav``, ``tracks``: tracked clips → trajectory   - ``scenes``: synthetic pictures, every task
- ``lists``: several answers to a prompt with their rewards → PerPO
- ``captions``: pictures with reference captions     - ``reflection``: policy/critic dialogues → RePer
- ``utr``: questions about tracked clips with their answers → trajectory
- ``nextqa``, ``pope``: multiple choice, yes or no → qa   - ``choice``: MMBench, SEED, AI2D, MVBench, … → qa
- ``hallusion``, ``mme``: yes or no, scored in groups → qa   - ``refcoco``: RefCOCO's pickles → grounding
"""

from __future__ import annotations

import errno
import importlib
import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple
from urllib.parse import quote, unquote

from fastrl.config.registry import Registry, called
from fastrl.data.decodable import decoded
from fastrl.data.prompts import KEY, asked, template_of
from fastrl.data.records import PROMPTS, Dataset, Record, question
from fastrl.data.validate import DataError, Problem, fail, nearest, short

__all__ = [
    "ADAPTERS",
    "PROMPTS",
    "DataError",
    "Dataset",
    "Problem",
    "Record",
    "brings",
    "load_data",
    "own_spec",
    "parse_spec",
    "question",
    "read_data",
    "register",
    "with_options",
    "with_reading",
]

Load = Callable[[str, dict[str, str]], Iterable[Record]]  # (path, query) → records, or a Dataset of them


class Adapter(NamedTuple):
    """The reader of one format; ``keys``: allowed query keys, None: ``load`` checks them itself.

    ``brings``: see :func:`brings`.
    """

    load: Load
    keys: Collection[str] | None = None
    brings: str | None = None

    def __str__(self) -> str:
        return called(self.load)


class Shipped(NamedTuple):
    """An adapter of this package, imported on first use."""

    module: str
    function: str
    brings: str | None = None

    def __str__(self) -> str:
        return f"{self.module}.{self.function}"

    def open(self, name: str) -> Adapter:
        """Import it. The module's ``KEYS`` are its query keys, or a mapping from its adapters' names to theirs."""
        module = importlib.import_module(self.module)
        keys = vars(module).get("KEYS")
        keys = keys[name] if isinstance(keys, Mapping) else keys
        return Adapter(getattr(module, self.function), keys, self.brings)


TASK_OF = MappingProxyType({"refexp": "grounding", "pixmo": "counting", "ocr": "OCR"})  # adapters for a single task

ADAPTERS: Registry[Adapter | Shipped] = Registry(
    "data adapter",
    {
        name: Shipped(*place)
        for name, place in {
            "rows": ("fastrl.data.any_rows", "load"),
            "coco": ("fastrl.data.coco", "load"),
            "refexp": ("fastrl.data.refexp", "load"),
            "pixmo": ("fastrl.data.pixmo", "load"),
            "ocr": ("fastrl.data.page_ocr", "load"),
            "scenes": ("fastrl.data.scenes", "load"),
            "mot": ("fastrl.data.tracks", "load_mot"),
            "sav": ("fastrl.data.tracks", "load_sav"),
            "tracks": ("fastrl.data.tracks", "load_jsonl"),
            "lists": ("fastrl.data.lists", "load", "answers"),
            "captions": ("fastrl.data.captions", "load"),
            "reflection": ("fastrl.data.reflection", "load", "dialogues"),
            "utr": ("fastrl.data.utr", "load"),
            "nextqa": ("fastrl.data.qa", "load_nextqa"),
            "pope": ("fastrl.data.qa", "load_pope"),
            "choice": ("fastrl.data.choice", "load"),
            "hallusion": ("fastrl.data.hallusion", "load"),
            "mme": ("fastrl.data.mme", "load"),
            "refcoco": ("fastrl.data.refcoco", "load"),
        }.items()
    },
)


def register(name: str, load: Load, *, keys: Collection[str] | None = None, brings: str | None = None) -> Load:
    """Register a data format, so that ``name:path?key=value`` is a valid spec.

    Args:
        name: of the adapter; must not contain any of ``: ? & = /``.
        load: ``load(path, query)`` returns records, which are checked like those of a user's function (see ``user``);
            or a ``Dataset`` or a sequence class that makes records on demand, which are not checked again.
        keys: query keys that the adapter takes in addition to ``orient``, ``max_image_pixels`` and ``pictures``, which
            every spec may have; others are refused. None: ``load`` checks them.
        brings: what the records contain besides prompts (see :func:`brings`).

    Raises:
        TypeError: ``load`` cannot be called with a path and a query.
        ValueError: another adapter has the name, or the name is invalid.
    """
    try:
        inspect.signature(load).bind("path", {})
    except TypeError as error:
        raise TypeError(f"data adapter {short(name)}: load must be a function of (path, query): {error}") from None
    if isinstance(name, str) and set(name) & set(":?&=/"):
        raise ValueError(f"data adapter {short(name)}: a name must not contain any of : ? & = /")
    from fastrl.data.rows import READING

    ADAPTERS.add(name, Adapter(load, None if keys is None else (*keys, *READING), brings))
    return load


_OWN = re.compile(r"((?:[^?:]*\.py|[A-Za-z_][\w.]*):[A-Za-z_]\w*):")  # a user's function


def own_spec(adapter: str | None, spec: str) -> str:
    """``spec`` with a user's function (``my_data.py:rows``) as its adapter; unchanged if ``adapter`` is None."""
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
        file = Path(spec.partition("?")[0])
        rows = file.suffix in (".jsonl", ".json", ".parquet", ".arrow") or file.is_dir()
        hint = f"; did you mean rows:{spec}? It recognises rows by their columns" if rows else ""
        known = f"a spec is adapter:path?key=value ({', '.join(ADAPTERS)})"
        raise fail(spec, "bad spec", f"names no adapter: {known}{hint}")
    if adapter not in ADAPTERS and own is None:
        message = f"unknown data adapter {short(adapter)}{nearest(adapter, ADAPTERS)}; a spec is adapter:path?key=value"
        raise fail(spec, "bad spec", message)
    path, _, options = rest.partition("?")
    if not path:
        raise fail(spec, "bad spec", f"no path after {adapter}:")
    query: dict[str, str] = {}
    for option in filter(None, options.split("&")):
        key, equals, value = option.partition("=")
        if not equals or key in query:
            raise fail(spec, "bad spec", f"option {short(option)} must be key=value, each key once")
        query[key] = unquote(value)
    return adapter, path, query


def brings(spec: str) -> str | None:
    """What the records of a spec bring beside their prompts, so that nothing is sampled for them.

    ``"answers"``: ranked answers (``target["list"]``); ``"dialogues"``: dialogues with candidates; None: neither, or a
    user's function, of which it is not known before it is called.
    """
    entry = ADAPTERS.get(spec.partition(":")[0])
    return entry.brings if entry is not None else None


def with_options(spec: str, **options: str | int | None) -> str:
    """``spec`` with query keys added (None: not added). Raises ``DataError`` if the spec has a key with another value.

    Whether the adapter takes the key is checked when the data is loaded.
    """
    adapter, path, query = parse_spec(spec)
    given = {key: str(value) for key, value in options.items() if value is not None}
    for key, value in given.items():
        if query.get(key, value) != value:
            raise fail(spec, "bad spec", f"says {key}={query[key]}, data.{key} says {value}; give it in one place")
    query |= given
    options_text = "&".join(f"{key}={quote(value, safe='/:,+ ')}" for key, value in query.items())
    return f"{adapter}:{path}" + (f"?{options_text}" if query else "")


def without_pictures(spec: str) -> str:
    """``spec`` for a use without pixels: picture files may be missing if their row states ``width`` and ``height``."""
    return with_reading(spec, pictures="stated") if "pictures" not in parse_spec(spec)[2] else spec


def with_reading(spec: str, **options: str | int | None) -> str:
    """:func:`with_options` for keys that say how picture files are read; nothing for data without such files."""
    adapter = parse_spec(spec)[0]
    entry = ADAPTERS.get(adapter)
    opens = not isinstance(entry, Shipped) or set(options) <= set(entry.open(adapter).keys or ())
    return with_options(spec, **options) if opens else spec


def load_data(
    spec: str,
    *,
    skip_bad: bool = False,
    deep: bool = False,
    misfit: Callable[[Record], str | None] | None = None,
) -> Dataset:
    """Load the data set that ``spec`` names and check every row.

    ``misfit`` returns why the caller cannot use a valid record, or None; such a row counts as bad too. With ``deep``
    every picture file is decoded (instead of reading only its header), and a record with a broken one is a bad row.
    With ``skip_bad`` bad rows are left out (``Dataset.skipped`` is their number, ``Dataset.reasons`` and
    ``Dataset.problems`` tell why and where); otherwise a ``DataError`` reports all of them. Also raises ``DataError``
    for an unknown adapter or option (with the nearest valid name), an unreadable file, or if no record is left.
    """
    dataset = read_data(spec)
    if deep:
        dataset = decoded(dataset)
    if misfit is not None:
        dataset = dataset.fitting(misfit)
    if dataset.problems and not skip_bad:
        raise DataError(dataset.problems, _other_adapter(spec, dataset))
    if len(dataset) == 0:
        found = dataset.problems or dataset.left_out or [Problem(spec, "empty", "holds no records")]
        raise DataError(found, _other_adapter(spec, dataset))
    return dataset


def read_data(spec: str) -> Dataset:
    """The data set that ``spec`` names, including its bad rows. Raises ``DataError`` like :func:`load_data`, except for
    bad rows."""
    try:
        return _read(spec)
    except OSError as error:  # of looking for a file, before any adapter can say that it is not there
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise fail(spec, "missing file", "names a file by more characters than a name may have") from None


def _read(spec: str) -> Dataset:
    adapter, path, query = parse_spec(spec)
    if adapter not in ADAPTERS:
        from fastrl.data.user import load

        return load(adapter, path, query)
    entry = ADAPTERS[adapter]
    opened = entry.open(adapter) if isinstance(entry, Shipped) else entry
    load, keys = opened.load, opened.keys
    for key in query:
        if keys is not None and key not in keys:
            raise fail(spec, "bad option", f"unknown option {short(key)} of {adapter}{nearest(key, keys)}")
    if isinstance(entry, Adapter):
        from fastrl.data.user import load_registered

        return load_registered(load, adapter, path, query)
    template = template_of(query.get(KEY), adapter, path)
    if template is not None:
        del query[KEY]
    loaded = load(path, query)
    data = loaded if isinstance(loaded, Dataset) else Dataset(loaded if isinstance(loaded, Sequence) else list(loaded))
    return data if template is None else asked(data, template, spec)


def _other_adapter(spec: str, dataset: Dataset) -> str:
    """A hint if most rows lack a column and have the layout of another adapter; else empty."""
    lacking = sum(problem.kind == "missing field" for problem in dataset.problems)
    adapter, path, query = parse_spec(spec)
    if 2 * lacking < len(dataset) + len(dataset.problems) or adapter not in ("refexp", "pixmo", "ocr", "rows"):
        return ""
    from fastrl.data.any_rows import layout_of

    columns, found = layout_of(path, query.get("split"))
    if found in (None, adapter):
        return ""
    task = TASK_OF.get(found)
    recipe = f" Then use a {task} recipe (fastrl recipes)." if task is not None else ""
    return f"The rows have columns {', '.join(columns)}: is this {found}:{path}?{recipe}"
