"""Soft matching by a sentence-embedding model: any folder transformers' ``AutoModel`` reads (MiniLM, BERT)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrl.captions.match import Similarity, embedding_similarity


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


def open_similarity(folder: str) -> Similarity:
    """Cosine similarity by the model in ``folder``. Raises ``ValueError`` where it cannot be loaded."""
    from transformers import AutoModel, AutoTokenizer

    try:
        model, found = AutoModel.from_pretrained(folder, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"soft matching: no sentence-embedding model in {folder!r}: {error}") from None
    if missing := sorted(name for name in found["missing_keys"] if not name.startswith("pooler.")):  # never asked
        raise ValueError(f"soft matching: the weights in {folder!r} lack {len(missing)}, the first: {missing[0]}")
    return embedding_similarity(Embedder(model.eval(), tokenizer))
