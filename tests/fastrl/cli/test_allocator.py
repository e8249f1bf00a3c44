"""The CUDA allocator's settings: set only if the user has not set them."""

from __future__ import annotations

import pytest

from fastrl.cli.allocator import NAMES, described, use_expandable_segments

WANTED = f"{NAMES[0]}=expandable_segments:True"


def test_segments_expand_where_nothing_is_set() -> None:
    environ: dict[str, str] = {}
    assert described(environ) == f"not set; recommended: {WANTED}"
    use_expandable_segments(environ)
    assert described(environ) == WANTED


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", ["expandable_segments:False", "max_split_size_mb:128", ""])
def test_what_the_user_set_stands(name: str, value: str) -> None:
    environ = {name: value}
    use_expandable_segments(environ)
    assert environ == {name: value}
    assert described(environ) == f"{name}={value}; recommended: {WANTED}"


def test_a_setting_among_others_is_recognised() -> None:
    told = "max_split_size_mb:128,expandable_segments:True"
    assert described({NAMES[1]: told}) == f"{NAMES[1]}={told}"
