"""YAML in common notations: merge keys work, and an error is one line with its location."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fastrl.config.reader import MAX_BYTES, MAX_DEPTH, RecipeError, override, parse_yaml, read_values
from fastrl.recipe import load_recipe

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("base: &b {lr: 1e-6, steps: 3}\noptim: {<<: *b, lr: 2}\n", {"lr": 2, "steps": 3}),
        ("base: &b {lr: 1}\nmid: &m {<<: *b, lr: 5}\noptim: {<<: *m, steps: 2}\n", {"lr": 5, "steps": 2}),
        ("a: &a {lr: 1}\nb: &b {lr: 2, steps: 3}\noptim: {<<: [*a, *b]}\n", {"lr": 1, "steps": 3}),
        ("a: &a {x: {y: 1}}\noptim:\n  <<: *a\n  z: 2\n", {"x": {"y": 1}, "z": 2}),
        ("optim: {lr: 1e-6, at: 2024-05-01, half: .5E+3}\n", {"lr": 1e-6, "at": "2024-05-01", "half": 500.0}),
    ],
)
def test_merge_keys_and_numbers(text: str, values: dict[str, Any]) -> None:
    assert parse_yaml(text, "r.yaml")["optim"] == values


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"r\.yaml: empty"),
        (b"# nothing\n", r"r\.yaml: empty"),
        (b"- a\n", "mapping of sections, got list"),
        (b"hello", "mapping of sections, got str"),
        ("seed: 1\n".encode("utf-16"), r"r\.yaml:1: not UTF-8 \(byte 0xff\)"),
        ("seed: 1\n".encode("utf-16-le"), "not YAML: unacceptable character #x0000"),
        ("seed: 1\nname: café\n".encode("latin-1"), r"r\.yaml:2: not UTF-8 \(byte 0xe9\)"),
        (b"a: [1\n", r"r\.yaml:\d+: not YAML: .*expected ',' or '\]'"),
        (b"seed: 1\n  out: 2\n", r"r\.yaml:2: not YAML: "),
        (b"a: {b: 1}\na: {b: 2}\n", r"r\.yaml:2: key 'a' is given twice"),
        (b"[" * 100_000, f"nested more than {MAX_DEPTH} deep"),
        (b"{a: " * 100_000, f"nested more than {MAX_DEPTH} deep"),
        (b"- " * 100_000, f"nested more than {MAX_DEPTH} deep"),
        (BOMB.encode(), "with aliases expanded, more than"),
        (
            b"a0: &a0 [1]\n" + b"".join(b"a%d: &a%d [*a%d]\n" % (i, i, i - 1) for i in range(1, 200)),
            "with aliases expanded",
        ),
        (b"a: &a [*a]\n", r"r\.yaml:1: an alias that contains itself"),
        (b"a: &a {<<: *a}\n", "an alias that contains itself"),
        (b"a: *b\n", "undefined alias"),
        (b"a: {<<: 3}\n", "expected a mapping"),
        (b"a: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
        (b"a: !!int x\n", "a value does not match its type"),
        (b"a: " + b"9" * 5000, "a value does not match its type"),
        (b'a: "\\ud800"\n', "a NUL or surrogate character"),
        (b'out: "a\\0b"\n', "a NUL or surrogate character"),
        (b"a: 1\n---\nb: 2\n", "expected a single document"),
        (b"? [1, 2]\n: 3\n", "unhashable key"),
        (b"a: " + b"x" * MAX_BYTES, "a recipe may have at most"),
    ],
    ids=lambda value: value[:24].decode("latin-1") if isinstance(value, bytes) else None,
)
def test_a_bad_file_is_one_line(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(data)
    with pytest.raises(RecipeError, match=message) as error:
        read_values(path)
    assert "\n" not in str(error.value)
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_a_byte_order_mark_is_no_part_of_a_key(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbfseed: 1\n")
    assert read_values(path) == {"seed": 1}


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        read_values(tmp_path)


def message(text: str) -> str:
    """The error message for a text; the recipe's name if there is none. Any other exception fails the test."""
    try:
        parse_yaml(text, "r.yaml")
    except RecipeError as error:
        return str(error)
    return "r.yaml"


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    assert message(data.decode("latin-1")).startswith("r.yaml")


@given(st.text(alphabet="{}[]:,-&*<!|>'\"\n #%@ab01~?.", max_size=60))
def test_no_text_raises_anything_else(text: str) -> None:
    assert "\n" not in message(text)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8", exclude_characters="\0")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(plain)
def test_what_is_dumped_is_read_again(value: Any) -> None:
    assert parse_yaml(yaml.safe_dump(value, allow_unicode=True), "r.yaml") == value


def test_overrides_are_put_at_their_paths() -> None:
    values: dict[str, Any] = {"optim": {"lr": 1}}
    override(values, ["optim.lr=2e-5", "model.lora.rank=4", "a=[1, 2]"])
    override(values, {"optim.steps": 3})
    assert values == {"optim": {"lr": 2e-5, "steps": 3}, "model": {"lora": {"rank": 4}}, "a": [1, 2]}
    for wrong, message in [
        ("optim", "key=value"),
        ("=3", "key=value"),
        ("optim.lr.x=1", "optim.lr has the value"),
        ("a." * 100 + "b=1", "sections deep"),
        ("a=" + "[" * 1000, "nested more than"),
        ("a=\udcff", "not YAML"),
    ]:
        with pytest.raises(RecipeError, match=message):
            override(values, [wrong])
