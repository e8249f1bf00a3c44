"""``Record`` → ``Prompt``: chat template, token ids with image runs expanded, explicit positions, pixels.

The chat template comes with the tokenizer. Answers inside a dialogue are tokenised separately, exactly like sampled
answers, so a prompt that is extended turn by turn has the same ids as one encoded at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrl.answers import TASK_FRAME
from fastrl.batch import Completion, ImageInput, Prompt
from fastrl.models.families import Family
from fastrl.models.vision import ImagePreprocessor

if TYPE_CHECKING:
    from fastrl.data.records import Record


class EncodeError(ValueError):
    """A record that cannot become a prompt; the message names the record."""


class Encoder:
    """Turns records into prompts for one model family.

    Args:
        family: renders the chat template and lays out images.
        tokenizer: with a chat template that writes one image token per image.
        preprocessor: the model's image preprocessing.
        end_of_turn: text of the token that closes an assistant turn.
        control_tokens: texts of tokens that must not come from message text (placeholders, turn markers); each is
            replaced by a space.
        frame: what coordinates mean in this model's answers (``fastrl.answers.FRAMES``).
        style: how this model writes answers (``fastrl.answers.STYLES``).
    """

    def __init__(
        self,
        family: Family,
        tokenizer: Any,
        preprocessor: ImagePreprocessor,
        *,
        end_of_turn: str,
        control_tokens: Sequence[str],
        frame: str,
        style: str = "",
    ) -> None:
        self.family = family
        self.tokenizer = tokenizer
        self.preprocessor = preprocessor
        self.end_of_turn = end_of_turn
        self.frame, self.style = frame, style
        self._control = re.compile("|".join(re.escape(text) for text in control_tokens))

    def encode(self, record: Record, *, max_prompt_tokens: int | None = None) -> tuple[Prompt, Record]:
        """Encode all of ``record.messages``, with a generation prompt unless the last turn is the assistant's.

        Returns:
            The prompt, and the record with ``views`` (original and resized size of each image), ``frame`` and ``style``
            filled in.

        Raises:
            EncodeError: images and placeholders do not match, an image is unreadable, there is no message, or the
                prompt is longer than ``max_prompt_tokens``. Nothing is ever truncated: a cut inside an image would
                corrupt what follows it.
        """
        images, record = self._images(record)
        generate = not record.messages or record.messages[-1]["role"] != "assistant"
        (head, _), *rest = self._pieces(record, generate)
        ids = torch.cat([self._tokens(head, first=True), *(self._tokens(text) for text, _ in rest)])
        messages = self.family.template_messages([self._clean(record, message) for message in record.messages])
        prompt = replace(self._prompt(record, ids, images), messages=tuple(messages))
        self._check_length(record, prompt, max_prompt_tokens)
        return prompt, record

    def encode_dialogue(
        self, record: Record, *, max_prompt_tokens: int | None = None
    ) -> tuple[Prompt, Completion, Record]:
        """Encode a dialogue that ends with the assistant as one prompt and one completion.

        The prompt ends where the first assistant turn's content begins. The completion is everything after it, with
        ``per_token`` ``mask`` [T] float32 (1 on the assistant's tokens, end of turn included) and ``turn`` [T] int64
        (index of the assistant turn a token belongs to; -1: none). The newline after the last turn is left out.

        Raises:
            EncodeError: as for ``encode``, and if the last turn is not the assistant's or an image comes after the
                first assistant turn.
        """
        images, record = self._images(record)
        if not record.messages or record.messages[-1]["role"] != "assistant":
            raise EncodeError(f"{_name(record)}: a dialogue must end with an assistant turn")
        (head, _), *rest = self._pieces(record, generate=False)
        prompt = self._prompt(record, self._tokens(head, first=True), images)
        self._check_length(record, prompt, max_prompt_tokens)
        while not rest[-1][1]:
            rest.pop()
        ids, turns, turn = [], [], 0
        for text, answer in rest:
            piece = self._tokens(text)
            ids.append(piece)
            turns.append(torch.full_like(piece, turn if answer else -1))
            turn += answer
        turn_of_token = torch.cat(turns)
        completion = Completion(token_ids=torch.cat(ids), text="".join(text for text, _ in rest))
        completion.per_token = {"mask": (turn_of_token >= 0).float(), "turn": turn_of_token}
        return prompt, completion, record

    def encode_continuation(self, record: Record) -> Tensor:
        """Ids [T] int64 of a dialogue's last assistant turn and everything after it (feedback, generation prompt).

        Appended to the prompt that the last assistant turn answered, they give the prompt of the whole dialogue. A
        session continues this way without processing the image and the history again.

        Raises:
            EncodeError: as for ``encode``, and if there is no assistant turn or the dialogue ends with one.
        """
        pieces = self._pieces(record, generate=True)
        if len(pieces) < 3 or record.messages[-1]["role"] == "assistant":
            raise EncodeError(f"{_name(record)}: to continue, a dialogue needs an answer followed by another turn")
        return torch.cat([self._tokens(text) for text, _ in pieces[-2:]])

    def encode_answer(self, text: str) -> Tensor:
        """Ids [T] int64 of one assistant turn's text, end of turn included."""
        return self._tokens(self.family.turn(self._control.sub(" ", text), self.end_of_turn))

    def _images(self, record: Record) -> tuple[list[ImageInput], Record]:
        images, views = [], []
        for n, source in enumerate(record.images):
            try:
                image, view = self.preprocessor(source, len(record.images))
            except (OSError, ValueError) as error:
                raise EncodeError(f"{_name(record)}: image {n}: {error}") from error
            views.append(view)
            images.append(image)
        frame = TASK_FRAME.get(record.task, self.frame)
        return images, replace(record, views=tuple(views), frame=frame, style=self.style)

    def _pieces(self, record: Record, generate: bool) -> list[tuple[str, bool]]:
        """The rendered dialogue as (text, is answer) pieces; an assistant's answer includes its end of turn."""
        messages = [self._clean(record, message) for message in record.messages]
        if not messages:
            raise EncodeError(f"{_name(record)}: no messages")
        full = self._render(record, messages, generate)
        pieces, at = [], 0
        for n, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start = self._render(record, messages[:n], True)
            answer = self.family.turn("".join(part["text"] for part in message["content"]), self.end_of_turn)
            if not full.startswith(start) or not full.startswith(answer, len(start)):
                raise EncodeError(f"{_name(record)}: the chat template does not render turn {n} as it was generated")
            pieces += [(full[at : len(start)], False), (answer, True)]
            at = len(start) + len(answer)
        pieces.append((full[at:], False))
        return pieces

    def _clean(self, record: Record, message: Mapping[str, Any]) -> dict[str, Any]:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        clean = []
        for part in parts:
            kind = part.get("type")
            if kind == "text":
                clean.append({"type": "text", "text": self._control.sub(" ", part["text"])})
            elif kind == "image" and message["role"] != "assistant":
                clean.append({"type": "image"})
            else:
                raise EncodeError(f"{_name(record)}: a {message['role']} turn cannot hold a {kind!r} part")
        return {"role": message["role"], "content": clean}

    def _render(self, record: Record, messages: list[dict[str, Any]], generate: bool) -> str:
        return self.family.render(self.tokenizer, messages, generate, self.end_of_turn)

    def _tokens(self, text: str, *, first: bool = False) -> Tensor:
        return torch.tensor(self.family.token_ids(self.tokenizer, text, first=first), dtype=torch.int64)

    def _prompt(self, record: Record, ids: Tensor, images: list[ImageInput]) -> Prompt:
        """Expand each image placeholder to its image's number of tokens and lay out the positions."""
        try:
            ids, slots, positions = self.family.lay_out(ids, images)
        except ValueError as error:
            raise EncodeError(f"{_name(record)}: {error}") from None
        return Prompt(token_ids=ids, positions=positions, images=tuple(images), image_slots=slots)

    def _check_length(self, record: Record, prompt: Prompt, limit: int | None) -> None:
        length = len(prompt.token_ids)
        if limit is not None and length > limit:
            of_images = sum(run for _, run in prompt.image_slots)
            raise EncodeError(
                f"{_name(record)}: the prompt has {length} tokens ({of_images} of images), over the limit of {limit}; "
                "prompts are never truncated: raise the limit, lower max_pixels or skip the record"
            )


def _name(record: Record) -> str:
    return f"record {record.id!r}" + (f" ({record.source})" if record.source else "")
