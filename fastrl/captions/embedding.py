"""Soft matching by a sentence-embedding model: any folder transformers' ``AutoModel`` reads (MiniLM, BERT)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl.captions.match import OfReferences, Similarity, embedding_similarity

PUBLISHED = "sentence-transformers/all-mpnet-base-v2"  # CAPTURE's model, in its public metric code
AUTO, OFF = "auto", "none"  # besides models; a folder of such a name is "./auto"


class MissingModel(ValueError):
    """A model that is not on this machine."""


class Soft(NamedTuple):
    """Soft matching as it was asked for: ``auto``, ``none`` or a model."""

    similarity: Similarity | None = None  # None: it is off
    matching: str = "rules"  # for results: by what facts are matched
    note: str = ""  # why ``auto`` is off


def open_soft(soft: str) -> Soft:
    """Soft matching named by a user.

    Args:
        soft: ``auto``: by CAPTURE's model if a copy of it is on this machine, of facts from reference captions alone;
            ``none``; or a folder or downloaded hub name of a sentence-embedding model, of all facts.

    Raises:
        ValueError: the model that is named cannot be loaded. For ``auto`` the reason is its ``note``.
    """
    if soft == OFF:
        return Soft()
    try:
        similarity = open_similarity(PUBLISHED if soft == AUTO else soft)
    except ValueError as error:
        if soft != AUTO:
            raise
        absent = isinstance(error, MissingModel)
        why = f"{PUBLISHED} is not on this machine" if absent else str(error).removeprefix("soft matching: ")
        how = f"get it with `hf download {PUBLISHED}`, or name another sentence-embedding model; none turns it off"
        return Soft(note=f"soft matching of captions is off: {' '.join(why.split())}; {how}")
    if soft == AUTO:
        return Soft(OfReferences(similarity), f"rules, then {PUBLISHED}")
    return Soft(similarity, f"rules, then {soft}")


class Embedder:
    """Phrases → vectors: the mean of the last layer over a phrase's tokens. Phrases are kept, for facts repeat."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._kept: dict[str, Tensor] = {}

    def encode(self, phrases: Sequence[str]) -> Tensor:
        """[phrases, hidden] float32."""
        new = [phrase for phrase in dict.fromkeys(phrases) if phrase not in self._kept]
        if new:
            tokens = self.tokenizer(new, padding=True, return_tensors="pt")
            with torch.no_grad():
                hidden = self.model(**tokens).last_hidden_state.float()
            real = tokens["attention_mask"][..., None].to(hidden.dtype)
            self._kept |= dict(zip(new, (hidden * real).sum(1) / real.sum(1), strict=True))
        return torch.stack([self._kept[phrase] for phrase in phrases])


def _folder(model: str) -> Path:
    """A model's folder, or that of its downloaded snapshot. Raises ``OSError`` or ``ValueError`` where there is none.

    (transformers asks the hub for an adapter of a model that is named, whatever ``local_files_only`` says.)
    """
    from huggingface_hub import snapshot_download

    return Path(model) if Path(model).is_dir() else Path(snapshot_download(model, local_files_only=True))


def open_similarity(model: str) -> Similarity:
    """Cosine similarity by a model: a folder or a downloaded hub name. Raises ``ValueError`` where it cannot be
    loaded; nothing is downloaded."""
    from transformers import AutoModel, AutoTokenizer

    try:
        folder = _folder(model)
    except (OSError, ValueError):
        what = "neither a folder nor the name of a downloaded model"
        raise MissingModel(f"soft matching: no sentence-embedding model in {model!r}: {what}") from None
    try:
        network, found = AutoModel.from_pretrained(folder, output_loading_info=True, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"soft matching: no sentence-embedding model in {model!r}: {error}") from None
    if missing := sorted(name for name in found["missing_keys"] if not name.startswith("pooler.")):  # never asked
        raise ValueError(f"soft matching: the weights in {model!r} lack {len(missing)}, the first: {missing[0]}")
    return embedding_similarity(Embedder(network.eval(), tokenizer))
