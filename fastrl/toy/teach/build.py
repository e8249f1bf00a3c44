"""Make the small models: a Qwen2.5-VL built from a config and taught the scene tasks by supervised training.

The result is a standard Hugging Face folder, independent of fastrl's trainer. A training row is one scene with several
questions: the shared start (system turn and image) is followed by the questions with their answers as branches that
attend to the start and themselves, which is the packed layout with a fixed picture size.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrl.answers import View, format_answer
from fastrl.batch import ImageInput
from fastrl.data.records import Record
from fastrl.data.scenes import tasks
from fastrl.data.scenes.world import LEVELS
from fastrl.models.families import Family, Placed, family_of
from fastrl.models.families.qwen2_vl import CONFIG_TOKENS, IMAGE, Qwen2_5VL, QwenPreprocessor
from fastrl.models.vision import ImagePreprocessor
from fastrl.models.weights import read_weights
from fastrl.toy.teach.clip_lessons import frame_of_step
from fastrl.toy.teach.curriculum import CURRICULA, Row, RowMaker
from fastrl.toy.teach.optim import make_optimizers, schedule
from fastrl.toy.teach.tokenizer import train_tokenizer
from fastrl.toy.teach.transfer import coordinate_twins, take_over

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration


def model_config(
    tokenizer: Any, hidden: int = 128, layers: int = 4, vision_hidden: int = 96, vision_layers: int = 4
) -> Any:
    """Config of the small model: patch 14, merge 2 and multimodal RoPE as in Qwen2.5-VL, everything else small."""
    from transformers import Qwen2_5_VLConfig

    heads = hidden // 32
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": hidden * 8 // 3 // 32 * 32,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = IMAGE | {
        "depth": vision_layers,
        "hidden_size": vision_hidden,
        "intermediate_size": vision_hidden * 2,
        "num_heads": vision_hidden // 32,
        "out_hidden_size": hidden,
        "window_size": 112,
        "fullatt_block_indexes": [vision_layers // 2 - 1, vision_layers - 1],
    }
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in CONFIG_TOKENS.items()}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)


def corpus(answer: Callable[[Record], str], seed: int, clips: bool = False) -> Iterator[str]:
    """Texts the tokenizer is trained on: questions and answers of every task, and every coordinate spelled out.

    With ``clips`` also those of dialogues about clips, and the numbers and times of frames.
    """
    for task in (*tasks.MAKERS, *(("utr", "shown") if clips else ())):
        for index in range(400):
            record = tasks.scene_record(task, index, seed, difficulty=1 + index % len(LEVELS))
            yield record.messages[0]["content"][-1]["text"]
            yield answer(record)
            if clips and task == "utr":
                yield " ".join(part["text"] for part in record.messages[0]["content"] if part["type"] == "text")
    for number in range(1001):
        yield from [f"{number}"] * 2
        if number < 225:
            yield from [f", {number}"] * 4
    for side in (56, 84, 112):
        for pixel in range(side + 1):
            yield from [f",{round(1000 * pixel / side)}"] * 3
    yield from ["You are a helpful assistant.", "system\n", "user\n", "assistant\n"] * 50


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
    model: Qwen2_5_VLForConditionalGeneration,
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
    frames = make_row.curriculum.frames
    optimizers = make_optimizers(model, lr)
    began, running = time.perf_counter(), 0.0
    model.train()
    for step in range(steps):
        alone = frame_of_step(step, steps, frames, random.Random(f"{seed}/{step}")) if frames > 1 else None
        count = rows if alone is None else 2 * rows  # single frames are shorter
        made = [make_row(random.Random(f"{seed}/{step}/{i}"), alone) for i in range(count)]
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


def scene_answer(record: Record) -> str:
    """The answer a model is taught for a scene record: in Qwen2.5-VL's style, with labels only if they are
    requested."""
    if "answer" in record.target:
        return record.target["answer"]
    width, height = record.images[0].size  # type: ignore[union-attr]
    view = View(width, height, width, height)
    return format_answer(record.task, record.target, Qwen2_5VL.style, view, labels=record.task == "detection")


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
    log: Callable[[str], None] = print,
) -> None:
    """Build, teach and save the small model ``kind``. The same arguments give the same weights on the same machine.

    With ``start`` it is initialised from that small model (see ``transfer.take_over``) and, unless ``retokenize``, uses
    its vocabulary. Raises ``ValueError`` for an unknown kind.
    """
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from fastrl.models.load import load_tokenizer

    if kind not in CURRICULA:
        raise ValueError(f"kind: expected one of {', '.join(CURRICULA)}, got {kind!r}")
    if start is None or retokenize:
        tokenizer = train_tokenizer(corpus(scene_answer, seed, clips=CURRICULA[kind].frames > 1))
    else:
        tokenizer = load_tokenizer(start)
    # Larger pictures are resized to the size it was trained on, as it cannot read others.
    preprocessor = QwenPreprocessor(Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=CURRICULA[kind].size ** 2))
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(model_config(tokenizer))
    if start is not None:
        old = read_weights(Qwen2_5_VLForConditionalGeneration, Path(start), dtype=torch.float32)
        old_tokenizer = load_tokenizer(start)
        twins = coordinate_twins(tokenizer, old_tokenizer, CURRICULA[kind].size) if retokenize else {}
        take_over(model, tokenizer, old, old_tokenizer, twins)
    make_row = RowMaker(CURRICULA[kind], family_of(model.config), tokenizer, preprocessor, scene_answer)

    def save(step: int) -> None:
        save_folder(model, tokenizer, preprocessor, out)

    train(model, make_row, steps=steps, rows=rows, seed=seed, lr=lr, log=log, save=save)
    save(steps)
