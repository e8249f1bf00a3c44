"""``Policy``: a perception MLLM that encodes records and computes log-probs of packed batches, each prompt once."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrl.answers import style_named
from fastrl.batch import Completion, ImageInput, PackedBatch, Prompt
from fastrl.models.attention.prefix import use_prefix_attention
from fastrl.models.encoding import Encoder
from fastrl.models.families import Parts, Placed, VisionFeatures, family_of
from fastrl.models.kept import KeptPrompt, answer_states
from fastrl.models.lora import Lora, add_lora, merged_state_dict, whole_state
from fastrl.models.quantize import is_quantized
from fastrl.models.vision import ImagePreprocessor, unique_images

if TYPE_CHECKING:
    from fastrl.data.records import Record
    from fastrl_kernels.linear_logprob import LogProb


PEFT = "base_model.model."  # what peft puts before the names of the core's weights


class Policy:
    """A model of one family with its tokenizer and image preprocessing.

    Attributes:
        core: the transformers ``…ForConditionalGeneration`` model, without any wrapper.
        model: ``core``, or the peft model around it.
        family: everything specific to this kind of model (see ``fastrl.models.families``).
        style: how the family writes answers (see ``fastrl.answers``).
        frame: what the coordinates in its answers mean (see ``fastrl.answers``).
        eos_token_ids: ids that end an answer.
        suppressed_token_ids: ids that are never sampled (image and video placeholders, vision start and end, turn
            markers other than EOS).
    """

    def __init__(
        self,
        core: Any,
        tokenizer: Any,
        preprocessor: ImagePreprocessor,
        *,
        lora: Lora | Mapping[str, Any] | None = None,
    ):
        self.core = core
        self.device: torch.device = core.get_output_embeddings().weight.device  # where it computes
        self.family = family_of(core.config)
        self.family.read_tokenizer(tokenizer)
        self.tokenizer = tokenizer
        self.preprocessor = preprocessor
        self.style = self.family.style
        self.frame = style_named(self.style).frame
        self.eos_token_ids = _eos_ids(core, tokenizer)
        controls = self.family.control_ids(tokenizer)
        self.suppressed_token_ids = tuple(sorted(controls - set(self.eos_token_ids)))
        end = tokenizer.convert_tokens_to_ids(self.family.end_of_turn)
        self.end_of_turn_id = int(end if end in self.eos_token_ids else self.eos_token_ids[0])
        self.encoder = Encoder(
            self.family,
            tokenizer,
            preprocessor,
            end_of_turn=tokenizer.convert_ids_to_tokens(self.end_of_turn_id),
            control_tokens=tokenizer.convert_ids_to_tokens([*self.suppressed_token_ids, *self.eos_token_ids]),
            frame=self.frame,
            style=self.style,
        )
        self.peft: Any = add_lora(core, lora, self.family) if lora is not None else None
        self._reference_core: Any = None
        core.eval()  # peft creates adapters in training mode
        use_prefix_attention(self.family, core)
        self.family.prepare(core)

    @property
    def model(self) -> Any:
        return self.peft if self.peft is not None else self.core

    @property
    def image_processor(self) -> Any:
        """transformers' image processor, as the model folder configures it."""
        return self.preprocessor.processor

    @property
    def parts(self) -> Parts:
        """The parts of the model in use (inside ``reference``, possibly those of a frozen copy)."""
        return self.family.parts(self.core)

    @property
    def cores(self) -> list[Any]:
        """The core, and the frozen copy that serves as reference, if there is one."""
        return [self.core, *([self._reference_core] if self._reference_core is not None else [])]

    @property
    def dtype(self) -> torch.dtype:
        return self.head_weight.dtype

    @property
    def head_weight(self) -> Tensor:
        """The language model's head, [vocabulary, hidden]."""
        return self.core.get_output_embeddings().weight

    @property
    def ties_head(self) -> bool:
        """Whether the head's weight is the embedding's."""
        return self.head_weight is self.core.get_input_embeddings().weight

    @property
    def trains_vision(self) -> bool:
        """Whether an update may change the vision features."""
        return self.family.trains_vision(self.core)

    # Text and images in, ids and positions out

    def encode(self, record: Record, *, max_prompt_tokens: int | None = None) -> tuple[Prompt, Record]:
        """See ``Encoder.encode``: the prompt, and the record with ``views`` and ``frame``."""
        return self.encoder.encode(record, max_prompt_tokens=max_prompt_tokens)

    def encode_dialogue(
        self, record: Record, *, max_prompt_tokens: int | None = None
    ) -> tuple[Prompt, Completion, Record]:
        """See ``Encoder.encode_dialogue``: a dialogue that ends with the assistant, as prompt and masked completion."""
        return self.encoder.encode_dialogue(record, max_prompt_tokens=max_prompt_tokens)

    def encode_continuation(self, record: Record) -> Tensor:
        """See ``Encoder.encode_continuation``: the ids that continue a session after an answer and its feedback."""
        return self.encoder.encode_continuation(record)

    def encode_text(self, text: str) -> Tensor:
        """Ids [T] int64 of an answer, end of turn included. Control tokens inside ``text`` become spaces."""
        return self.encoder.encode_answer(text)

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """Text of a completion up to its first EOS, without what the family writes before an answer (a space); special
        tokens (boxes, references) are kept. ``encode_text`` of it gives the same ids again."""
        listed = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        end = next((n for n, token in enumerate(listed) if token in self.eos_token_ids), len(listed))
        text = self.tokenizer.decode(listed[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text.removeprefix(self.family.turn("", ""))

    # The model

    def features(self, images: Sequence[ImageInput]) -> dict[str, VisionFeatures]:
        """Vision features by image key; each key goes through the tower once."""
        return keyed_features(self.core, images)

    def hidden(
        self,
        batch: PackedBatch,
        *,
        features: Mapping[str, VisionFeatures] | None = None,
        kept: Sequence[KeptPrompt] | None = None,
    ) -> Tensor:
        """Hidden states [N, hidden] at the batch's prediction rows.

        Args:
            batch: on this policy's device.
            features: vision features by image key, if the caller has them already (computed with the current weights);
                default: the tower runs once per unique image.
            kept: what the rollout kept of each group's prompt: only the answers are computed, and the backward is
                unfinished (see ``fastrl.models.kept``). ``features`` are then not read.
        """
        return predicted_states(self.core, batch, features, kept)

    def logprob(
        self,
        batch: PackedBatch,
        *,
        temperature: float = 1.0,
        return_entropy: bool = False,
        rows: Tensor | None = None,
        features: Mapping[str, VisionFeatures] | None = None,
        kept: Sequence[KeptPrompt] | None = None,
    ) -> LogProb:
        """Log-probs [N] float32 (and entropies) of the batch's completion tokens.

        Args:
            batch: on this policy's device.
            temperature: divides the logits.
            return_entropy: also the entropy [N] of each predicted distribution.
            rows: indices into N whose gradient may be nonzero (see ``fastrl_kernels.linear_logprob``).
            features, kept: see ``hidden``.
        """
        from fastrl_kernels.linear_logprob import linear_logprob

        hidden = self.hidden(batch, features=features, kept=kept)
        return linear_logprob(
            hidden,
            self.head_weight,
            batch.targets,
            temperature=temperature,
            return_entropy=return_entropy,
            rows=rows,
        )

    # The reference

    def make_reference(self) -> None:
        """Keep a frozen copy of the current weights as the reference; frozen weights are shared, not copied.

        Raises:
            RuntimeError: under LoRA, where the reference needs no copy.
        """
        if self.peft is not None:
            raise RuntimeError(
                "make_reference: under LoRA the reference is the model without its adapter; no copy is made"
            )
        shared = {id(p): p for p in self.core.parameters() if not p.requires_grad}
        self._reference_core = copy.deepcopy(self.core, shared).requires_grad_(False).eval()

    @contextmanager
    def reference(self) -> Iterator[Policy]:
        """Make this policy compute with the reference weights (adapter off, or frozen copy), without gradients.

        Raises:
            RuntimeError: there is no reference.
        """
        if self.peft is not None:
            wanted = {name: p.requires_grad for name, p in self.core.named_parameters()}
            with torch.no_grad(), self.peft.disable_adapter():
                yield self
            # Leaving disable_adapter turns on the gradient of every adapter weight, also of those that were frozen.
            for name, parameter in self.core.named_parameters():
                parameter.requires_grad_(wanted[name])
        elif self._reference_core is not None:
            live, self.core = self.core, self._reference_core
            try:
                with torch.no_grad():
                    yield self
            finally:
                self.core = live
        else:
            raise RuntimeError("no reference: call make_reference() before training, or train with LoRA")

    @property
    def quantized(self) -> bool:
        """Whether some weights are quantized to 4 bits."""
        return any(is_quantized(module) for module in self.core.modules())

    @property
    def saved_bytes(self) -> int:
        """Approximate bytes that :meth:`save` and :meth:`save_adapter` write."""
        adapters = sum(p.numel() * p.element_size() for n, p in self.core.named_parameters() if ".lora_" in n)
        plain = sum(p.numel() * p.element_size() for p in self.core.parameters())
        layers = [module for module in self.core.modules() if is_quantized(module)]
        packed = sum(layer.weight.numel() for layer in layers)
        unpacked = self.dtype.itemsize * sum(layer.in_features * layer.out_features for layer in layers)
        return plain + adapters + unpacked - packed

    def save_adapter(self, folder: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write only the adapters, in peft's format: ``PeftModel.from_pretrained(base_model, folder)`` loads them.

        Args:
            folder: is created.
            state: their weights by their names in ``core``; default: the present ones, which must be whole here.
        """
        # Copies, because peft also calls state_dict of modules trained in full, which shards gathered weights again
        parts, given = (".lora_", ".modules_to_save."), whole_state(self.core) if state is None else state
        state = {f"{PEFT}{n}": value.clone() for n, value in given.items() if any(part in n for part in parts)}
        with quiet_progress():
            self.peft.save_pretrained(folder, save_embedding_layers=False, state_dict=state)

    def save(self, folder: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write a standard Hugging Face folder (safetensors, tokenizer, image processor); adapters are merged in.

        Args:
            folder: is created.
            state: the weights by their names in ``core``; default: the present ones, which must be whole here.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if state is None:
            state = merged_state_dict(self.core) if self.peft is not None else whole_state(self.core)
        with quiet_progress():
            self.core.save_pretrained(folder, state_dict=state)
        self.tokenizer.save_pretrained(folder)
        self.preprocessor.save(folder)


def keyed_features(core: Any, images: Sequence[ImageInput]) -> dict[str, VisionFeatures]:
    """Vision features of ``core`` by image key; each key goes through the tower once."""
    unique = unique_images(images)
    features = family_of(core.config).features(core, unique)
    return {image.key: feature for image, feature in zip(unique, features, strict=True)}


def packed_states(
    core: Any, batch: PackedBatch, features: Mapping[str, VisionFeatures] | None = None, **attention: Any
) -> Tensor:
    """Hidden states [1, L, hidden] of ``core`` over a packed row; keyword arguments go to its attention function."""
    placed = None
    if batch.images:
        found = features if features is not None else keyed_features(core, batch.images)
        placed = Placed(batch.image_rows, tuple(found[batch.images[i].key] for i in batch.image_of_slot))
    embeds = core.get_input_embeddings()(batch.input_ids)
    return family_of(core.config).hidden(core, embeds, batch.positions, placed, **attention)


def predicted_states(
    core: Any,
    batch: PackedBatch,
    features: Mapping[str, VisionFeatures] | None = None,
    kept: Sequence[KeptPrompt] | None = None,
) -> Tensor:
    """Hidden states [N, hidden] of ``core`` at the batch's prediction rows (see ``Policy.hidden``)."""
    # Only passes with gradients use dropout and checkpointing; those for old and reference log-probs use neither.
    if core.training != torch.is_grad_enabled():
        core.train(torch.is_grad_enabled())
    if kept is not None:
        return answer_states(core, batch, kept)
    hidden = packed_states(core, batch, features, fastrl_segments=batch.segments)
    return hidden[0].index_select(0, batch.predict_rows)


@contextmanager
def quiet_progress() -> Iterator[None]:
    """Turn off transformers' progress bars, which it draws even without a terminal."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _eos_ids(core: Any, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end an answer: the generation config's, else the model config's, else the tokenizer's."""
    for holder in (getattr(core, "generation_config", None), core.config, core.config.get_text_config(), tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        if ids is not None:
            return tuple(int(i) for i in (ids if isinstance(ids, list | tuple) else [ids]))
    raise ValueError("this model names no end-of-sequence token: set eos_token_id in generation_config.json")
