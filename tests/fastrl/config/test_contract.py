"""Checking a class against its base class: missing, misspelt and wrong members are all reported."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import pytest

from fastrl.config.contract import faults


class Base(ABC):
    fact: bool = False
    declared: int

    @abstractmethod
    def work(self, rows: int) -> int: ...

    def hook(self, batch: int) -> int:
        return batch

    @classmethod
    def reads(cls, options: Any) -> bool:
        return False


class Sound(Base):
    fact = True
    declared = 3

    def work(self, rows: int) -> int:
        return self._own(rows)

    def _own(self, rows: int) -> int:
        return rows


class Deeper(Sound):
    @classmethod
    def reads(cls, options: Any) -> bool:
        return True


@pytest.mark.parametrize("cls", [Sound, Deeper])
def test_a_sound_class(cls: type) -> None:
    assert faults(cls, Base) == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"hok": lambda self, batch: None}, "hok is not part of a Base; did you mean hook?"),
        ({"facts": True}, "did you mean fact?"),
        ({"zzz": 1}, "zzz is not part of a Base (names of helpers"),
        ({"hook": 3}, "hook must be a function, got 3"),
        ({"hook": lambda self, group: None}, "hook takes (self, group), but is called with (self, batch)"),
        ({"work": lambda self: 0}, "work takes (self), but is called with (self, rows)"),
        ({"reads": classmethod(lambda cls: True)}, "reads takes (), but is called with (options)"),
    ],
)
def test_faults_are_named(body: dict[str, Any], message: str) -> None:
    found = faults(type("Toy", (Sound,), body), Base)
    assert len(found) == 1
    assert message in found[0]


def test_what_is_missing_and_what_is_no_subclass() -> None:
    assert faults(type("Toy", (Base,), {}), Base) == ["work is missing"]
    assert "must be a subclass of" in faults(int, Base)[0]
    assert "must be a subclass of" in faults(3, Base)[0]  # type: ignore[arg-type]
    assert faults(type("Toy", (Sound,), {"size": 1}), Base, own=("size",)) == []
