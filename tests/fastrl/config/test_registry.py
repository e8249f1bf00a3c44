"""A registry has one entry for a name, and its errors say which."""

from __future__ import annotations

import pytest

from fastrl.config.registry import Registry, called, nearest


class First: ...


class Second: ...


def test_the_same_again_changes_nothing_and_another_names_both() -> None:
    registry: Registry[type] = Registry("method", {"a": First})
    registry.add("a", First)
    registry.add("b", Second)
    assert (list(registry), len(registry), registry["b"]) == (["a", "b"], 2, Second)
    with pytest.raises(ValueError, match=r"the method 'a' is already .*First and cannot also be .*Second"):
        registry.add("a", Second)
    assert registry["a"] is First


@pytest.mark.parametrize("name", ["", "  ", None, 3])
def test_a_name_is_a_word(name: object) -> None:
    with pytest.raises(ValueError, match="needs a name"):
        Registry[type]("method").add(name, First)  # type: ignore[arg-type]


def test_names_in_messages() -> None:
    assert called(First) == f"{__name__}.First"
    assert nearest("perpoo", ["perpo", "reper"]) == "perpo"
    assert nearest(None, ["perpo"]) is None
