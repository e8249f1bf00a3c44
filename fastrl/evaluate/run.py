"""Runs an evaluation: records → answers of a model or from a file → metrics."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from fastrl.answers import check_frame, style_of
from fastrl.data import load_data, without_pictures
from fastrl.data.blank import BlankImages
from fastrl.data.disk import nothing_empty_left, write_file
from fastrl.data.records import Record
from fastrl.evaluate import EVALUATIONS, evaluate, load_predictions
from fastrl.evaluate.frames import frame_report
from fastrl.evaluate.predictions import RESIZE, Predictions, row_of
from fastrl.evaluate.soft import caption_soft, is_free
from fastrl.models.open import open_policy
from fastrl.rewards.base import unknown
from fastrl.rewards.ocr import Normalise

if TYPE_CHECKING:
    from fastrl.batch import Completion
    from fastrl.models.load import Policy
    from fastrl.rollout import Generator, Sampling
    from fastrl.rollout.vllm import VllmGenerator

# Longest answer of each protocol (Perception-R1's released evaluation code, Video-UTR's demonstration)
MAX_NEW_TOKENS = {
    "grounding": 512,
    "counting": 512,
    "detection": 4096,
    "ocr": 2048,
    "caption": 1024,
    "trajectory": 2048,
    "qa": 64,
}
PORTION = 64  # prompts encoded and answered together; bounds the pixels held at once


def sample_records(
    policy: Policy,
    records: Sequence[Record],
    sampling: Sampling,
    seed: int = 0,
    portion: int = PORTION,
    *,
    generator: Generator | VllmGenerator | None = None,
) -> Iterator[tuple[Record, list[Completion]]]:
    """Each record as the policy sees it (with views and frame), with its completions.

    Records are read, encoded and answered ``portion`` at a time. ``seed`` makes sampling reproducible. ``generator``
    generates the answers; None: the policy creates one.
    """
    if generator is None:
        from fastrl.rollout import Generator

        generator = Generator(policy)
    rng = torch.Generator().manual_seed(seed)
    for start in range(0, len(records), portion):
        encoded = [policy.encode(records[i]) for i in range(start, min(start + portion, len(records)))]
        found = generator.generate([prompt for prompt, _ in encoded], sampling, rng)
        yield from zip([record for _, record in encoded], found, strict=True)


def run_evaluation(
    task: str,
    spec: str,
    *,
    model: str | None = None,
    predictions: Path | None = None,
    frame: str = "auto",
    family: str | None = None,
    pixels: tuple[int | None, int | None] = (None, None),
    max_new_tokens: int | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
    blank_images: bool = False,
    soft: str | None = "auto",
    normalise: str | None = None,
    out: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Metrics of a model (greedy answers) or of a predictions file on the data named by ``spec``.

    ``frame`` and ``family`` say what a file's coordinates mean, see :func:`load_predictions`; ``pixels`` are the least
    and the largest area of a resized picture (None: the usual), as a file's model saw it or as ``model`` is shown it.
    Of tasks with boxes or points, the result also holds ``frame``, in which they were read,
    and ``frame_changes``, how many answers another plausible frame would have scored otherwise (:func:`frame_report`).
    With ``blank_images`` the model sees grey pictures of the same size: what it scores then
    it knows from the text. ``soft`` names the sentence-embedding model by which captions are matched softly
    (:func:`fastrl.evaluate.soft.caption_soft`; the result's ``matching`` says what was done), and ``normalise``
    says how pages are compared (see ``evaluate_ocr``; None: ``nfc``).

    Raises:
        ValueError: the task is unknown, not exactly one of ``model`` and ``predictions`` is given, the data is bad, or
            records have another task.
    """
    if task not in EVALUATIONS:
        raise ValueError(unknown("task to evaluate", task, EVALUATIONS))
    if (model is None) == (predictions is None):
        raise ValueError("give either --model or --predictions")
    check_frame(frame)
    if normalise is not None and task != "ocr":
        raise ValueError(f"--normalise says how texts of pages are compared: it goes with eval ocr, not eval {task}")
    if normalise not in (None, *get_args(Normalise)):
        raise ValueError(unknown("value of --normalise", normalise, get_args(Normalise)))
    if model is not None and frame != "auto":
        raise ValueError("--frame says what the coordinates of --predictions mean; those of a model are its own")
    if model is not None and family is not None:
        raise ValueError("--family says whose answers --predictions are; a model's own is known")
    usual = "auto" if family is None else style_of(family).frame
    if pixels != (None, None) and model is None and "resized" not in (frame, usual if frame == "auto" else ""):
        raise ValueError(
            "--min-pixels and --max-pixels go with --model, or with --frame resized of --predictions: they say at "
            "which size pictures are, or were, seen"
        )
    if predictions is not None:
        spec = without_pictures(spec)
    data = load_data(spec, skip_bad=skip_bad, deep=skip_bad and model is not None)
    if data.summary:
        say(data.summary)
    records: Sequence[Record] = data if limit is None else data[:limit]
    if blank_images and predictions is not None:
        raise ValueError("--blank-images changes what a model sees: give --model, not --predictions")
    if blank_images:
        records = BlankImages(records)
    with nothing_empty_left(*([out] if out is not None else [])):
        if out is not None:  # raise now, and not after all answers, if the file cannot be written
            out.parent.mkdir(parents=True, exist_ok=True)
            out.open("a").close()
        if predictions is not None:
            known = () if limit is None else {record.id for record in data}
            seen, answers = _file_answers(predictions, records, pixels, frame=frame, family=family, known=known)
        else:
            assert model is not None
            seen, answers = _model_answers(task, model, records, max_new_tokens, pixels)
        compared = "none" if normalise == "none" else "nfc"
        softly = caption_soft(task, soft, free=any(is_free(r.task, r.target) for r in seen))
        if softly.note:
            say(softly.note)
        metrics = dict(evaluate(task, seen, answers, similarity=softly.similarity, normalise=compared))
        metrics |= {"matching": softly.matching} if task == "caption" else {}
        framed = frame_report(task, seen, answers)
        if framed is not None:
            metrics |= {"frame": framed.frame, "frame_changes": framed.changes}
            guessed = predictions is not None and any(record.frame == "auto" for record in seen)
            for line in framed.words(guessed):
                say(line)
        if out is not None:
            _write(out, seen, answers, metrics)
    return metrics


def _file_answers(
    path: Path, records: Sequence[Record], pixels: tuple[int | None, int | None], **options: Any
) -> Predictions:
    """Answers of a file; ``pixels`` as the command line has them."""
    least, most = (given or usual for given, usual in zip(pixels, RESIZE, strict=True))
    if least > most:
        raise ValueError(f"--min-pixels {least} is more than --max-pixels {most}")
    return load_predictions(path, records, pixels=(least, most), **options)


def check_answerable(task: str, records: Sequence[Record]) -> None:
    """Raise ``ValueError`` for records that lack what a model is to see; answers from a file may do without."""
    if task == "qa" and len(records) and not any(record.images for record in records):
        raise ValueError(
            "these questions come without pictures: give images= or videos= in their spec, or score --predictions"
        )


def _model_answers(
    task: str,
    model: str,
    records: Sequence[Record],
    max_new_tokens: int | None,
    pixels: tuple[int | None, int | None],
) -> tuple[list[Record], list[str]]:
    from fastrl.rollout import Sampling

    wrong = next((r for r in records if r.task != task), None)
    if wrong is not None:
        raise ValueError(f"{wrong.source or wrong.id}: a {wrong.task} record cannot be evaluated as {task}")
    check_answerable(task, records)
    sampling = Sampling(
        n=1, max_new_tokens=MAX_NEW_TOKENS[task] if max_new_tokens is None else max_new_tokens, temperature=0.0
    )
    policy = open_policy(model, min_pixels=pixels[0], max_pixels=pixels[1])
    answered = list(sample_records(policy, records, sampling))
    return [record for record, _ in answered], [completions[0].text for _, completions in answered]


def _write(out: Path, records: Sequence[Record], answers: Sequence[str], metrics: Mapping[str, Any]) -> None:
    rows = (json.dumps(row_of(record, answer)) for record, answer in zip(records, answers, strict=True))
    write_file(out, "".join(f"{row}\n" for row in rows))
    write_file(out.with_suffix(".metrics.json"), json.dumps(metrics, indent=2) + "\n")
