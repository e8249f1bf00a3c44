"""Caption text → objects, attributes, relations, by rules: no model, no download, linear time, never an error.

A noun phrase is a run of determiners, numbers, adjectives and unknown words; its head is the last unknown word. The
words between two phrases link them: a preposition, or a verb. A later phrase with a definite article refers to an
object named before, if one fits. CAPTURE uses a trained scene-graph parser; these rules are weaker on free text and
exact on scenes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from fastrl.answers.text import answer_region
from fastrl.captions.coco import LONGEST, PHRASES
from fastrl.captions.lexicon import (
    ADJECTIVE_ENDINGS,
    ADJECTIVES,
    COPULAS,
    DETERMINERS,
    FUNCTION,
    ING_NOUNS,
    LY_NOUNS,
    NEGATIONS,
    NUMBERS,
    RELATIONS,
    STOP_NOUNS,
    VAGUE_RELATIONS,
    VERBS,
    singular,
)

MAX_CHARACTERS = 20_000  # characters read of a caption
MAX_OBJECTS = 200  # objects kept of a caption
_WORD = re.compile(r"[a-z0-9]+(?:['’-][a-z0-9]+)*|[.,;:!?\n()]")
_LINKS = sorted(((tuple(k.split()), v) for k, v in RELATIONS.items()), key=lambda pair: -len(pair[0]))
_LINKS_BY_FIRST: dict[str, list[tuple[tuple[str, ...], str]]] = {}
for _words, _name in _LINKS:
    _LINKS_BY_FIRST.setdefault(_words[0], []).append((_words, _name))
_DEFINITE = frozenset({"the", "this", "that", "these", "those", "its", "his", "her", "their"})


class Facts(NamedTuple):
    """What a caption says. Words are lower case, objects singular."""

    objects: tuple[str, ...]
    attributes: tuple[tuple[str, str], ...]  # (object, attribute)
    relations: tuple[tuple[str, str, str], ...]  # (subject, relation, object)


class Token(NamedTuple):
    """A word, or a phrase that counts as one, with what it does in a sentence."""

    kind: str  # det | num | adj | noun | verb | link | neg | stop | end
    text: str


@dataclass
class Entity:
    """An object of a caption with its modifiers."""

    name: str
    attributes: list[str] = field(default_factory=list)


def words_of(text: str) -> list[str]:
    """Lower-case words and punctuation marks of a caption; what a model thinks before it is none of it."""
    return _WORD.findall(answer_region(text)[:MAX_CHARACTERS].lower())


def phrase_at(words: list[str], at: int) -> tuple[int, str | None] | None:
    """The longest COCO phrase that starts at a word: (words it takes, its category or None); None: no such phrase."""
    for length in range(min(LONGEST, len(words) - at), 0, -1):
        phrase = (*tuple(words[at : at + length - 1]), singular(words[at + length - 1]))
        if phrase in PHRASES:
            return length, PHRASES[phrase]
    return None


def parse_caption(text: str) -> Facts:
    """Objects, attributes and relations a caption states; what is denied ("no dog") is left out. Never raises."""
    reader = _Reader()
    for token in _tokens(words_of(text)):
        reader.read(token)
        if len(reader.entities) >= MAX_OBJECTS:
            break
    reader.close_phrase()
    return Facts(
        tuple(entity.name for entity in reader.entities),
        tuple((entity.name, attribute) for entity in reader.entities for attribute in entity.attributes),
        tuple((a.name, relation, b.name) for a, relation, b in reader.relations),
    )


class _Reader:
    """Reads tokens one by one; ``entities`` and ``relations`` grow."""

    def __init__(self) -> None:
        self.entities: list[Entity] = []
        self.relations: list[tuple[Entity, str, Entity]] = []
        self._by_name: dict[str, list[Entity]] = {}
        self._start_sentence()
        self._clear()

    def _start_sentence(self) -> None:
        self._subject: Entity | None = None  # the object named last
        self._link: str | None = None  # the link since then
        self._copula = False
        self._denied = False

    def _clear(self) -> None:
        self._modifiers: list[str] = []
        self._nouns: list[str] = []
        self._definite = False

    def read(self, token: Token) -> None:
        kind, text = token
        if kind == "det":
            self.close_phrase()
            self._definite = text in _DEFINITE
        elif kind in ("adj", "num"):
            if self._nouns:
                self.close_phrase()
            self._modifiers.append(text)
        elif kind == "noun":
            self._nouns.append(text)
        else:
            self.close_phrase()
            if kind == "end":
                if text != ",":
                    self._start_sentence()
                self._link, self._copula, self._denied = None, False, False
            elif kind == "neg":
                self._denied = True
            elif kind == "verb":
                self._copula = text in COPULAS
                self._link = None if self._copula else text
            elif kind == "link":
                self._link, self._copula = text, False

    def close_phrase(self) -> None:
        """Turn the phrase read so far into an entity, or into attributes of the subject ("the square is red")."""
        modifiers, nouns, definite = self._modifiers, self._nouns, self._definite
        self._clear()
        if not nouns:
            if modifiers and self._copula and self._subject is not None and not self._denied:
                self._describe(self._subject, modifiers)
            return
        name = nouns[-1]
        denied, self._denied = self._denied, False
        if denied or name in STOP_NOUNS:
            self._link = None
            return
        entity = self._known(name, modifiers) if definite else None
        if entity is None:
            entity = Entity(name)
            self.entities.append(entity)
            self._by_name.setdefault(name, []).append(entity)
            self._describe(entity, modifiers)
        subject, link = self._subject, self._link
        if subject is not None and subject is not entity and link is not None and link not in VAGUE_RELATIONS:
            self.relations.append((subject, link, entity))
        self._subject, self._link, self._copula = entity, None, False

    def _known(self, name: str, modifiers: list[str]) -> Entity | None:
        """The latest object of that name with all these modifiers."""
        return next((t for t in reversed(self._by_name.get(name, [])) if set(modifiers) <= set(t.attributes)), None)

    @staticmethod
    def _describe(entity: Entity, modifiers: list[str]) -> None:
        entity.attributes += [m for m in dict.fromkeys(modifiers) if m not in entity.attributes]


def _tokens(words: list[str]) -> list[Token]:
    tokens, at = [], 0
    while at < len(words):
        token, length = _token(words, at)
        if token is not None:
            tokens.append(token)
        at += length
    return tokens


def _token(words: list[str], at: int) -> tuple[Token | None, int]:
    """What stands at a word, and how many words it takes; None: nothing that matters."""
    word = words[at]
    if word in ".,;:!?\n()":
        return Token("end", word), 1
    for phrase, name in _LINKS_BY_FIRST.get(word, ()):
        if tuple(words[at : at + len(phrase)]) == phrase:
            return Token("link", name), len(phrase)
    if word in DETERMINERS:
        return Token("det", word), 1
    if word in NUMBERS or word.isdigit():
        return Token("num", NUMBERS.get(word, word)), 1
    if word in NEGATIONS:
        return Token("neg", word), 1
    found = phrase_at(words, at)
    if found is not None and found[0] > 1:  # also one that begins with an adjective: hot dog
        return Token("noun", " ".join([*words[at : at + found[0] - 1], singular(words[at + found[0] - 1])])), found[0]
    if word in ADJECTIVES and not _is_fruit(words, at):
        return Token("adj", "gray" if word == "grey" else word), 1
    if found is None and (word in VERBS or _is_participle(word)):
        if at and (words[at - 1] in DETERMINERS or words[at - 1] in ADJECTIVES) and word not in COPULAS:
            # "a cross", "a smiling man": after the beginning of a noun phrase no word is a verb
            return (None, 1) if _is_participle(word) else (Token("noun", singular(word)), 1)
        return Token("verb", _stem(word)), 1
    if found is None and word.endswith(ADJECTIVE_ENDINGS):
        return Token("adj", word), 1
    if word in FUNCTION or (word.endswith("ly") and word not in LY_NOUNS):
        return Token("stop", word), 1
    return Token("noun", singular(word)), 1


def token_kind(words: list[str], at: int) -> str | None:
    """What a word does in its sentence (see ``Token.kind``)."""
    token = _token(words, at)[0]
    return token.kind if token is not None else None


def _is_participle(word: str) -> bool:
    return len(word) > 4 and word.endswith(("ing", "ed")) and word not in ING_NOUNS


def _is_fruit(words: list[str], at: int) -> bool:
    """Whether "orange" at a word is the fruit: nothing that it could describe follows."""
    if words[at] != "orange":
        return False
    return at + 1 == len(words) or words[at + 1] in ".,;:!?\n()" or words[at + 1] in FUNCTION


def _stem(verb: str) -> str:
    """One form for ride, rides, riding; good enough to compare verbs with each other."""
    if verb in COPULAS:
        return verb
    for ending in ("ing", "es", "s", "ed", "e"):
        if verb.endswith(ending) and len(verb) - len(ending) >= 3:
            verb = verb[: -len(ending)]
            break
    return verb[:-1] if len(verb) > 3 and verb[-1] == verb[-2] else verb
