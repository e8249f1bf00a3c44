"""The work of a comparison: prompts of a given length with pictures on disk, and answers of a forced length."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastrl.data.records import Record


@dataclass(frozen=True)
class Work:
    """One optimizer step: ``prompts`` prompts of P tokens, G answers of R tokens each."""

    name: str
    prompt: int  # P, image tokens included
    answer: int  # R
    prompts: int
    picture: int = 0  # side of the square picture in pixels (28 per image token); 0: text only
    group: int = 8  # G
    pictures: int = 1  # in a prompt

    @property
    def rows(self) -> int:
        """Number of answers in a step."""
        return self.prompts * self.group

    def budget(self, rows: int) -> int:
        """fastrl's token budget for ``rows`` answers (whole groups) per micro-batch."""
        return max(1, rows // self.group) * (self.prompt + self.group * self.answer)

    def tokens(self) -> int:
        """Tokens of a step as fastrl counts them: each prompt once, plus all answers."""
        return self.prompts * self.prompt + self.rows * self.answer


GOAL = Work("goal: 448-pixel picture, 2 prompts", 300, 24, 2, picture=448)


def works(size: str) -> list[Work]:
    """The compared work: a perception prompt, a short text prompt, a long answer; for the small model the CPU goal."""
    prompts = 1 if size == "small" else 4
    shapes = [
        Work("perception prompt", 1000, 64, prompts, picture=868),
        Work("short text prompt", 64, 64, prompts),
        Work("long answer", 300, 512, prompts, picture=448),
    ]
    return [GOAL, *shapes] if size == "small" else shapes


TINY = Work("tiny", 48, 5, 2, picture=112, group=4)  # for tests


def never_sampled(tokenizer: Any) -> list[int]:
    """Ids that neither side samples, so that answers have the forced length: all special tokens."""
    return sorted(tokenizer.all_special_ids)


def make_records(work: Work, count: int, folder: Path, tokenizer: Any) -> list[Record]:
    """``count`` different prompts of exactly ``work.prompt`` tokens; pictures are PNG files in ``folder``."""
    rng = torch.Generator().manual_seed(0)
    content = _content(work, _question(work, tokenizer))
    records = []
    for number in range(count):
        files = [folder / f"{number}-{place}.png" for place in range(work.pictures if work.picture else 0)]
        images = tuple(_picture(work.picture, file, rng) for file in files)
        digits = "".join(str(int(d)) for d in torch.randint(10, (4 * work.answer,), generator=rng))
        messages = ({"role": "user", "content": content},)
        records.append(Record(f"{work.name} {number}", "ocr", images, messages, {"text": digits}))
    return records


def _content(work: Work, question: str) -> list[dict[str, str]]:
    pictures = [{"type": "image"}] * (work.pictures if work.picture else 0)
    return [*pictures, {"type": "text", "text": question}]


def _question(work: Work, tokenizer: Any) -> str:
    """Words that fill the prompt to its length."""

    def length(words: int) -> int:
        turns = [{"role": "user", "content": _content(work, "read" + " a" * words)}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    cells = (work.picture // 28) ** 2
    more = work.pictures * (cells - 1) if cells else 0  # a placeholder expands to its picture's cells
    words = work.prompt - more - length(0)
    if words < 0 or length(words) - length(0) != words:
        raise ValueError(f"{work.name}: cannot make a prompt of {work.prompt} tokens with {more} of pictures")
    return "read" + " a" * words


def _picture(side: int, file: Path, rng: torch.Generator) -> Path:
    from PIL import Image

    file.parent.mkdir(parents=True, exist_ok=True)
    colours = (255 * torch.rand(16, 16, 3, generator=rng)).to(torch.uint8).numpy()
    Image.fromarray(colours).resize((side, side), Image.Resampling.BICUBIC).save(file)
    return file
