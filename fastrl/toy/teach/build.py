"""Make the small models: built from a config and taught the scene tasks by supervised training.

The result is a standard Hugging Face folder, independent of fastrl's trainer. A training row is one scene with several
questions: the shared start (system turn and image) is followed by the questions with their answers as branches that
attend to the start and themselves, which is the packed layout with a fixed picture size.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrl.answers import View, format_answer
from fastrl.batch import ImageInput
from fastrl.data.records import Record
from fastrl.data.scenes import tasks
from fastrl.data.scenes.world import LEVELS
from fastrl.models.families import Family, Placed, family_of
from fastrl.models.families.qwen2_vl import Qwen2_5VL
from fastrl.models.vision import ImagePreprocessor
from fastrl.models.weights import read_weights
from fastrl.toy.teach.architectures import ARCHITECTURES, TOWERS, WIDTH, Architecture
from fastrl.toy.teach.clip_lessons import frame_of_step
from fastrl.toy.teach.curriculum import CURRICULA, Row, RowMaker
from fastrl.toy.teach.dialogues import feedbacks
from fastrl.toy.teach.optim import make_optimizers, schedule
from fastrl.toy.teach.reasons import spoken
from fastrl.toy.teach.tokenizer import train_tokenizer
from fastrl.toy.teach.transfer import coordinate_twins, take_over


def corpus(
    answer: Callable[[Record], str],
    seed: int,
    made_of: Architecture = ARCHITECTURES[Qwen2_5VL.model_type],
    clips: bool = False,
    reasons: bool = False,
) -> Iterator[str]:
    """Texts the tokenizer is trained on: questions and answers of every task, and every coordinate spelled out.

    With ``clips``, and for an architecture of which one model learns every task, also those of dialogues about clips
    and the numbers and times of frames; for such an architecture also the feedback of a critic. ``reasons``: what is
    said in lessons in the use of reasons.
    """
    clips = clips or made_of.one_for_all
    for task in (*tasks.MAKERS, *(("utr", "shown") if clips else ())):
        for index in range(400):
            record = tasks.scene_record(task, index, seed, difficulty=1 + index % len(LEVELS))
            yield record.messages[0]["content"][-1]["text"]
            yield made_of.spelling.before + answer(record)
            if clips and task == "utr":
                yield " ".join(part["text"] for part in record.messages[0]["content"] if part["type"] == "text")
    if made_of.one_for_all:
        yield from feedbacks(seed)
    if reasons:
        yield from spoken(seed)
    yield from made_of.coordinates()


def collate(rows: list[Row], pad_id: int) -> dict[str, Tensor]:
    """Pad rows of equal starts to one length. Positions of every branch continue from the start; it attends to the
    start and itself."""
    length = max(len(r.ids) for r in rows)
    start = rows[0].start
    axes, shared = start.shape
    ids = torch.full((len(rows), length), pad_id)
    branch = torch.full((len(rows), length), -1)
    answer = torch.zeros(len(rows), length, dtype=torch.bool)
    positions = torch.zeros(axes, len(rows), length, dtype=torch.long)
    base = int(start.max()) + 1
    for i, row in enumerate(rows):
        n = len(row.ids)
        ids[i, :n], branch[i, :n], answer[i, :n] = (
            torch.tensor(row.ids),
            torch.tensor(row.branch),
            torch.tensor(row.answer),
        )
        positions[:, i, :shared] = start
        for first, end in zip(row.position, [*row.position[1:], n], strict=True):
            positions[:, i, first:end] = base + torch.arange(end - first)
    sees = (branch[:, None, :] == branch[:, :, None]) | (branch[:, None, :] == 0)
    mask = sees & torch.ones(length, length, dtype=torch.bool).tril() & (branch[:, None, :] >= 0)
    mask |= torch.eye(length, dtype=torch.bool)  # padding attends to itself, so that no row of the softmax is empty
    return {
        "ids": ids,
        "answer": answer,
        "positions": positions,
        "mask": mask[:, None],
    }


def supervised_loss(model: Any, family: Family, batch: dict[str, Tensor], images: Sequence[ImageInput]) -> Tensor:
    """Mean negative log-likelihood of the answer tokens."""
    rows = (batch["ids"].flatten() == family.image_token).nonzero()[:, 0]
    placed = Placed(rows, tuple(family.features(model, images)))
    embeds = model.get_input_embeddings()(batch["ids"])
    hidden = family.hidden(model, embeds, batch["positions"], placed, attention_mask=batch["mask"])
    predicted = batch["answer"][:, 1:]
    logits = model.get_output_embeddings()(hidden[:, :-1][predicted])
    return torch.nn.functional.cross_entropy(logits.float(), batch["ids"][:, 1:][predicted])


def train(
    model: Any,
    make_row: RowMaker,
    *,
    steps: int,
    rows: int,
    seed: int,
    lr: float = 2e-3,
    log: Callable[[str], None] = print,
    every: int = 50,
    save: Callable[[int], None] = lambda step: None,
) -> None:
    """Teach ``model`` for ``steps`` steps of ``rows`` scenes each: AdamW, short warm-up, cosine to a tenth, in fp32."""
    optimizers = make_optimizers(model, lr)
    began, running = time.perf_counter(), 0.0
    model.train()
    for step in range(steps):
        maker = make_row.of_step(step)
        frames = maker.curriculum.frames
        alone = frame_of_step(step, steps, frames, random.Random(f"{seed}/{step}")) if frames > 1 else None
        count = rows if frames > 1 and alone is None else maker.curriculum.more * rows
        made = [maker(random.Random(f"{seed}/{step}/{i}"), alone) for i in range(count)]
        batch = collate(made, make_row.tokenizer.pad_token_id)
        loss = supervised_loss(model, make_row.family, batch, [image for row in made for image in row.images])
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            scale = schedule(step, steps)
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * scale
            optimizer.step()
        running += (loss.item() - running) / min(step + 1, 50)
        if (step + 1) % every == 0:
            log(f"step {step + 1}/{steps}  loss {running:.4f}  {(time.perf_counter() - began) / (step + 1):.2f} s/step")
            save(step + 1)
    model.eval()


def save_folder(
    model: Any, tokenizer: Any, preprocessor: ImagePreprocessor, out: Path, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write a standard Hugging Face folder: weights in ``dtype``, tokenizer with chat template, image processor."""
    out.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).to(dtype).save_pretrained(out)
    tokenizer.save_pretrained(out)
    preprocessor.save(out)


def scene_answer(record: Record, family: type[Family] = Qwen2_5VL) -> str:
    """The answer a model is taught for a scene record: in its family's style, with labels only if they are
    requested."""
    if "answer" in record.target:
        return record.target["answer"]
    width, height = record.images[0].size  # type: ignore[union-attr]
    view = record.views[0] if record.views else View.unresized(width, height)
    return format_answer(record.task, record.target, family.style, view, labels=record.task == "detection")


@contextmanager
def threads_of_torch(count: int) -> Iterator[None]:
    """Torch computes in ``count`` threads inside, and in as many as before after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def build(
    kind: str,
    out: Path,
    *,
    steps: int,
    rows: int = 16,
    seed: int = 0,
    lr: float = 3e-3,
    start: Path | None = None,
    retokenize: bool = False,
    width: int = WIDTH,
    threads: int = 1,
    log: Callable[[str], None] = print,
) -> None:
    """Build, teach and save the small model ``kind``. The same arguments give the same weights on the same machine.

    It computes in ``threads`` threads, however many torch is told to use: sums that are split among others round
    otherwise, and training enlarges that. What ships was made in one.
    With ``start`` it is initialised from that small model (see ``transfer.take_over``) and, unless ``retokenize``, uses
    its vocabulary. ``width`` is the hidden size of the text half (see ``architectures.TOWERS``). Raises ``ValueError``
    for an unknown kind or width, and for a ``start`` of another width.
    """
    from fastrl.models.load import load_tokenizer

    if kind not in CURRICULA:
        raise ValueError(f"kind: expected one of {', '.join(CURRICULA)}, got {kind!r}")
    if width not in TOWERS:
        raise ValueError(f"width: expected one of {', '.join(map(str, TOWERS))}, got {width}")
    curriculum = CURRICULA[kind]
    made_of = ARCHITECTURES[curriculum.model_type]
    answer = partial(scene_answer, family=made_of.family)
    if start is None or retokenize:
        texts = corpus(answer, seed, made_of, clips=curriculum.frames > 1, reasons="reason" in curriculum.questions)
        tokenizer = train_tokenizer(texts, made_of.spelling)
    else:
        tokenizer = load_tokenizer(start)
    preprocessor = made_of.preprocessor(curriculum.size)
    with threads_of_torch(threads):
        torch.manual_seed(seed)
        kind_of_model = made_of.family.model_class()
        model = kind_of_model(made_of.config(tokenizer, curriculum.size, width))
        if start is not None:
            old = read_weights(kind_of_model, Path(start), dtype=torch.float32)
            old_tokenizer = load_tokenizer(start)
            theirs = old.get_input_embeddings().weight.shape[1]
            if theirs != width:
                raise ValueError(f"{start}: a model of width {theirs} cannot begin one of width {width}")
            # Of clips, coordinates are said from 0 to 1000, of pictures in pixels
            moved = retokenize and curriculum.frames > 1
            twins = coordinate_twins(tokenizer, old_tokenizer, curriculum.size) if moved else {}
            take_over(model, tokenizer, old, old_tokenizer, twins)
        make_row = RowMaker(curriculum, family_of(model.config), tokenizer, preprocessor, answer)

        def save(step: int) -> None:
            save_folder(model, tokenizer, preprocessor, out)

        train(model, make_row, steps=steps, rows=rows, seed=seed, lr=lr, log=log, save=save)
        save(steps)
