"""What a caller hands to ``train``, checked before any work is done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastrl.data.made import problems_of
from fastrl.data.records import Record
from fastrl.data.validate import DataError, ImageFolder
from fastrl.recipe import Recipe


def check_arguments(recipe: object, policy: object, **records: object) -> None:
    """Check the types of a call's arguments, and every record of a list.

    Records of a sequence that makes them on demand are not looked at.

    Args:
        recipe: a ``Recipe``.
        policy: a ``Policy``, or None.
        records: by the name of their argument; None: not given.

    Raises:
        TypeError: an argument is something else; the message says what makes one.
        DataError: records of a list are wrong.
    """
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe must be a Recipe, got {recipe!r:.80}: fastrl.load_recipe(NAME_OR_FILE) gives one")
    for name, given in records.items():
        if given is not None:
            _check_records(name, given)
    if policy is None:
        return
    from fastrl.models.policy import Policy

    if not isinstance(policy, Policy):
        raise TypeError(f"policy must be a Policy, got {policy!r:.80}: fastrl.load_policy(FOLDER) gives one")


def _check_records(name: str, given: object) -> None:
    if isinstance(given, str | Path):
        key = "eval.spec" if name == "eval_records" else "data.spec"
        raise TypeError(f"{name} must be a sequence of Records, got the text {str(given)!r}: set {key} in the recipe")
    if not hasattr(given, "__len__") or not hasattr(given, "__getitem__"):
        raise TypeError(f"{name} must be a sequence of Records, as a list is; got {type(given).__name__}")
    if isinstance(given, list | tuple):
        _check_list(name, given)


def _check_list(name: str, given: Sequence[object]) -> None:
    images, problems = ImageFolder(Path()), []
    for number, record in enumerate(given):
        if not isinstance(record, Record):
            raise TypeError(f"{name}[{number}] must be a fastrl.Record, got {record!r:.80}")
        problems += problems_of(record, images, record.source or f"{name}[{number}]")
    if problems:
        raise DataError(problems)
