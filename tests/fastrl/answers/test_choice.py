"""Parsing choices: letters, positions, option texts, yes and no, in many wordings, and hostile text."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fastrl.answers.choice import parse_choice, parse_yes_no

OPTIONS = ["drink water", "look down", "resting", "to wet its head", "peck fishes"]


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize(
    "form",
    [
        *(
            "{L}",
            "{l}",
            "({L})",
            "{L}.",
            "{l})",
            "**{L}**",
            "'{L}'",
            " {L} \n",
            "{L}. {text}",
            "({L}) {text}",
            "{L}: {text}",
        ),
        *("The answer is {L}.", "The answer is ({L})", "Answer: {L}", "answer: option {l}", "I choose option {L}."),
        *("I think it is ({L}).", "<answer>{L}</answer>", "<think>Not A, maybe B</think>{L}", "```\n{L}\n```"),
        *("{L}<|im_end|>", "{n}", "({n})", "{n}.", "{text}", "{TEXT}.", "It is because of this: {text}!"),
        *("The best option would be {L}, because it fits.", "The correct choice: {L}) {text}"),
    ],
)
def test_every_wording_of_every_option(index: int, form: str) -> None:
    letter = "ABCDE"[index]
    text = form.format(L=letter, l=letter.lower(), n=index, text=OPTIONS[index], TEXT=OPTIONS[index].upper())
    assert parse_choice(text, OPTIONS) == index


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("F", None),
        ("7", None),
        ("I do not know", None),
        ("drink water or look down", None),
        ("A man goes to the river to drink water", 0),  # not the letter A
        ("(A) or (B)", None),
        ("<think>" + "The bird may be resting. " * 2000 + "</think>C", 2),
        ("B. It wants to drink water", 1),  # the first statement counts
    ],
)
def test_what_is_clear_and_what_is_not(text: str, expected: int | None) -> None:
    assert parse_choice(text, OPTIONS) == expected


def test_numbers_that_are_options_mean_those_options() -> None:
    assert parse_choice("2", ["1", "2", "3"]) == 1
    assert parse_choice("0", ["1", "2", "3"]) == 0  # no option has this text, so it is a position


def test_an_option_inside_another_does_not_make_it_unclear() -> None:
    options = ["down", "look down", "up"]
    assert parse_choice("It wants to look down.", options) == 1
    assert parse_choice("upwards", options) is None


words = st.lists(st.sampled_from(["bird", "runs", "red", "table", "eats", "sleeps", "jumps"]), min_size=1, max_size=4)
option_lists = st.lists(words.map(" ".join), min_size=2, max_size=6, unique=True)


@given(option_lists, st.data())
def test_an_option_said_in_full_is_found(options: list[str], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(options) - 1))
    decorated = data.draw(st.sampled_from(["{}", "{}.", "  {}!", '"{}"', "**{}**"])).format(options[index])
    assert parse_choice(decorated.upper(), options) == index
    letter = chr(ord("A") + index)
    assert parse_choice(f"{letter}. {options[(index + 1) % len(options)]}", options) == index


@given(st.text(max_size=200), st.lists(st.text(max_size=30), max_size=30))
def test_any_text_gives_an_option_or_none(text: str, options: list[str]) -> None:
    found = parse_choice(text, options)
    assert found is None or 0 <= found < len(options)
    assert parse_yes_no(text) in (True, False, None)


@pytest.mark.parametrize("piece", ["(A", "answer is ", "no ", "yes'", "<", "A, ", "ok "])
def test_long_text_is_read_in_bounded_time(piece: str) -> None:
    text = piece * 1_000_000
    assert parse_choice(text, OPTIONS) in (None, *range(len(OPTIONS)))
    assert parse_yes_no(text) in (True, False, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("yes", True),
        ("Yes.", True),
        ("YES, there is a snowboard.", True),
        ("Yes, there is no doubt about it.", True),
        ("**Yes**", True),
        ("<answer>yes</answer>", True),
        ("Yeah", True),
        ("There is a car in the image.", True),
        ("I can see a dog. It has no collar.", True),
        ("The answer is yes.", True),
        ("no", False),
        ("No, there is not.", False),
        ("no<|im_end|>", False),
        ("There is no car in the image.", False),
        ("There isn't a car in the image.", False),
        ("There isn’t one", False),
        ("The image does not show a car.", False),
        ("I see none.", False),
        ("False", False),
        ("", None),
        ("maybe", None),
        ("yes or no", None),
        ("I am not sure.", None),
        ("A snowboard", None),
        ("nothingness", None),
    ],
)
def test_yes_and_no(text: str, expected: bool | None) -> None:
    assert parse_yes_no(text) is expected


@given(st.sampled_from(["yes", "no"]), st.text(alphabet=" .,!\n*\"'", max_size=5), st.booleans())
def test_decoration_changes_nothing(word: str, around: str, upper: bool) -> None:
    assume("." not in around and "!" not in around and "\n" not in around)
    message = around + (word.upper() if upper else word) + around
    assert parse_yes_no(message) is (word == "yes")
