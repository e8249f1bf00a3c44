"""``Family``: everything specific to one kind of model, one file per family. Defaults that suit most are here.

A family is found by its config's ``model_type``. It keeps only the config; the model itself (``core``, the transformers
``…ForConditionalGeneration``) is an argument, because the policy, its reference and a plan's empty model each have
their own. A hook that a family does not override behaves as its docstring here says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastrl.batch import ImageInput
from fastrl.models.decode_layers import DecodeLayers
from fastrl.models.vision import ImagePreprocessor
from fastrl.models.weights import read_weights

PARTS = ("language", "vision", "projector")  # names of a model's parts in recipes, the same for every family
_NOT_SIZES = ("model_type", "architectures", "transformers_version")


class VisionFeatures(NamedTuple):
    """Vision features for the language model."""

    tokens: Tensor  # [n, hidden], replace the placeholders' embeddings
    deep: tuple[Tensor, ...] = ()  # [n, hidden] each, added to the same rows after layer 0, 1, …


class Placed(NamedTuple):
    """Features of all pictures in a call, and the rows they go to."""

    rows: Tensor  # [n] int64, ascending: rows of [B * L]
    features: tuple[VisionFeatures, ...]  # one per picture, n rows in total


class Layout(NamedTuple):
    """A prompt's ids with image placeholders expanded."""

    ids: Tensor  # [P] int64
    slots: tuple[tuple[int, int], ...]  # (start, length) of each run of placeholders, in order
    positions: Tensor  # [position_axes, P] int64


class Parts(NamedTuple):
    """Modules of a model (each an ``nn.Module``). ``vision`` may contain the projector."""

    language: Any  # the text model: layers and last norm
    vision: Any
    projector: Any
    embedding: Any
    head: Any


class Size(NamedTuple):
    """Size of one picture: language model tokens, and rows of the vision tower (patches)."""

    tokens: int
    patches: int


class Family:
    """One family of models.

    Attributes:
        model_type: the config's ``model_type``, by which the family is found.
        style: how it writes answers (see ``fastrl.answers``).
        end_of_turn: text of the token that ends an assistant's turn.
        control_tokens: texts of tokens that are never sampled and never accepted from message text.
        template_options: variables for the chat template besides the messages.
        position_axes: rows of a prompt's positions: 3 for multimodal rotary embedding, else 1.
        part_names: for each of ``PARTS`` the full names of its modules (or parameters). The longest matching name
            decides: a projector inside the tower does not belong to ``vision``. The first name of ``language`` is the
            text model.
        shared_layers: kinds of text layers (``layer_types``) in which prompts can be shared. Others are refused.
        published: published configs by hub name, for ``fastrl plan``.
        served_images: largest number of images in a prompt on a vLLM server; None: any number. From vLLM's table of
            supported models (docs/models/supported_models.md, commit 0046f77).
        served_lora: whether vLLM serves LoRA adapters for the family; from the same table.
    """

    model_type: ClassVar[str]
    style: ClassVar[str]
    end_of_turn: ClassVar[str]
    control_tokens: ClassVar[tuple[str, ...]] = ()
    template_options: ClassVar[Mapping[str, Any]] = {}
    position_axes: ClassVar[int] = 1
    part_names: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "language": ("model.language_model", "lm_head"),
        "vision": ("model.vision_tower",),
        "projector": ("model.multi_modal_projector",),
    }
    shared_layers: ClassVar[frozenset[str]] = frozenset({"full_attention"})
    published: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    served_images: ClassVar[int | None] = None
    served_lora: ClassVar[bool] = True

    def __init__(self, config: Any) -> None:
        """``config``: the transformers config, or the values of a ``config.json``."""
        if isinstance(config, Mapping):
            values = {k: v for k, v in config.items() if k not in _NOT_SIZES}
            config = self.model_class().config_class(**values)
        self.config = config
        self._ids: Callable[[str], list[int]] = lambda marker: [0]

    # The model

    @classmethod
    def model_class(cls) -> Any:
        """The transformers class; imported here, so that an unused family costs nothing."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise ``ValueError`` if the config has text layers in which prompts cannot be shared."""
        text = self.config.get_text_config()
        kinds = set(getattr(text, "layer_types", None) or ())
        if not kinds and getattr(text, "sliding_window", None):
            kinds = {"sliding_attention"}
        if unknown := sorted(kinds - self.shared_layers):
            raise ValueError(
                f"model type {self.model_type!r} with text layers of kind {', '.join(unknown)}: completions cannot "
                f"share a prompt there; supported: {', '.join(sorted(self.shared_layers))}"
            )

    def load(self, folder: Path, dtype: torch.dtype) -> Any:
        """Load the model from a Hugging Face folder, with every weight from its files."""
        return read_weights(self.model_class(), folder, dtype=dtype)

    def empty(self) -> Any:
        """A model of this config with newly initialised weights (inside a meta-device context, without storage)."""
        return self.model_class()(self.config)

    def prepare(self, core: Any) -> None:
        """Change a loaded model once, to compute the same faster. Default: no change."""

    # Its parts

    def parts(self, core: Any) -> Parts:
        """The modules of ``core``."""
        found = [core.get_submodule(self.part_names[part][0]) for part in PARTS]
        return Parts(*found, embedding=core.get_input_embeddings(), head=core.get_output_embeddings())

    def layers(self, core: Any) -> list[Any]:
        """The layers of the language model, in their order: what an engine with sharded weights gathers one by one."""
        return list(self.parts(core).language.layers)

    def alias(self, name: str) -> str:
        """Replace the prefix of a module's or parameter's full name by the name of its part: ``vision.blocks.0.…``,
        ``language.lm_head.weight``. Prefixes of wrappers are dropped; a name outside all parts is unchanged."""
        part, prefix = self._place(name)
        if part is None:
            return name
        rest = f".{name}.".partition(f".{prefix}.")[2].rstrip(".")
        own = () if "." in prefix else (prefix,)  # a top-level module such as lm_head keeps its name
        return ".".join((part, *own, *((rest,) if rest else ())))

    def part_of(self, name: str) -> str | None:
        """The part (one of ``PARTS``) of the module or parameter with this full name, or None."""
        return self._place(name)[0]

    def _place(self, name: str) -> tuple[str | None, str]:
        named = [(prefix, part) for part, prefixes in self.part_names.items() for prefix in prefixes]
        found = [(prefix, part) for prefix, part in named if f".{prefix}." in f".{name}."]
        prefix, part = max(found, key=lambda x: len(x[0]), default=("", None))
        return part, prefix

    def trains_vision(self, core: Any) -> bool:
        """Whether an update may change the vision features."""
        named = core.named_parameters()
        return any(p.requires_grad and self.part_of(name) in ("vision", "projector") for name, p in named)

    def trained(self, core: Any) -> bool:
        """Whether features need an autograd graph: not if vision and projector are frozen."""
        return torch.is_grad_enabled() and self.trains_vision(core)

    # Text

    @property
    def image_token(self) -> int:
        """Id of the placeholder that the chat template writes for a picture."""
        return self.config.image_token_id

    def control_ids(self, tokenizer: Any) -> set[int]:
        """Ids of control tokens, which are never sampled unless they end an answer."""
        vocabulary = tokenizer.get_vocab()
        found = {vocabulary.get(token) for token in (*self.control_tokens, self.end_of_turn)}
        return {token for token in (*found, self.image_token) if token is not None}

    def template_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Messages whose content is a list of parts, in the form the chat template takes: text-only ones as strings."""
        return [
            {**m}
            if any(p["type"] == "image" for p in m["content"])
            else {**m, "content": "".join(p["text"] for p in m["content"])}
            for m in messages
        ]

    def render(self, tokenizer: Any, messages: Sequence[Mapping[str, Any]], generate: bool, end: str) -> str:
        """Render messages as text; ``generate``: with a generation prompt; ``end``: as for :meth:`turn`."""
        return tokenizer.apply_chat_template(
            self.template_messages(messages),
            tokenize=False,
            add_generation_prompt=generate,
            **self.template_options,
        )

    def turn(self, text: str, end: str) -> str:
        """An assistant's turn as the template renders it after the generation prompt; ``end``: the token that closes it
        (``end_of_turn``, unless the model's folder names another)."""
        return text + end

    def token_ids(self, tokenizer: Any, text: str, *, first: bool) -> list[int]:
        """Ids of a piece of rendered text. ``first``: the piece starts the prompt, so it gets the tokenizer's BOS token
        unless the template wrote it or the tokenizer adds none."""
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return [tokenizer.bos_token_id, *ids] if first and self.lacks_bos(tokenizer, ids) else ids

    def lacks_bos(self, tokenizer: Any, ids: Sequence[int]) -> bool:
        """Whether the tokenizer puts a BOS token before every text and ``ids``, of a rendered prompt, lack it."""
        bos = tokenizer.bos_token_id
        if bos is None or [*ids[:1]] == [bos]:
            return False
        return tokenizer("", add_special_tokens=True)["input_ids"][:1] == [bos]

    def ids(self, marker: str) -> list[int]:
        """Ids of a marker text that the family writes around or between a picture's placeholders."""
        return self._ids(marker)

    def read_tokenizer(self, tokenizer: Any) -> None:
        """Take marker ids from the tokenizer. Before this call (a plan has no tokenizer) each marker is the id 0."""
        self._ids = lambda marker: tokenizer(marker, add_special_tokens=False)["input_ids"]

    # Pictures

    def preprocessor(
        self, folder: Path, *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> ImagePreprocessor:
        """The image preprocessor. Limits apply to a resized picture's area in pixels; default those of the folder."""
        raise NotImplementedError

    def image_limit(self, folder: Path) -> int | None:
        """Largest area in pixels that the folder's preprocessor config allows; None if it sets no limit."""
        return None

    def processed(self, inputs: Mapping[str, Any]) -> list[ImageInput] | None:
        """Split a batch made by transformers' processor into pictures whose keys are their indices, for other trainers.

        None (the default) if they cannot be separated.
        """
        return None

    def tokens(self, image: ImageInput) -> int:
        """Number of feature rows (language model tokens) of a picture."""
        raise NotImplementedError

    def blank(self, pixels: int, *, key: str = "") -> ImageInput:
        """An input for the tower of this area in pixels after resizing, without data (on the meta device)."""
        raise NotImplementedError

    def blank_among(self, pixels: int, count: int) -> ImageInput:
        """``blank`` as one of ``count`` images of a prompt. Differs from ``blank`` for families that only tile single
        images."""
        return self.blank(pixels)

    def sizes(self, pixels: int) -> Size:
        """The size of a picture of this area in pixels."""
        image = self.blank(pixels)
        return Size(self.tokens(image), self.patches(image))

    def patches(self, image: ImageInput) -> int:
        """Number of vision tower rows of a picture; bounds the pictures in one call."""
        return len(image.pixel_values)

    def heat(self, image: ImageInput, values: Tensor) -> Tensor:
        """One number per token of a picture [tokens] → a map [rows, columns] with the same sum. Default: one row."""
        return values[None]

    # Layout

    def expansion(self, image: ImageInput) -> list[int]:
        """Ids that replace a picture's single placeholder: one placeholder per token, and any markers that the family
        writes between them."""
        return [self.image_token] * self.tokens(image)

    def positions(
        self, length: int, slots: Sequence[tuple[int, int]], images: Sequence[ImageInput], start: int = 0
    ) -> Tensor:
        """Positions [position_axes, length] int64 of a row with pictures in its slots. Default: consecutive numbers."""
        return torch.arange(start, start + length).expand(self.position_axes, length)

    def lay_out(self, ids: Tensor, images: Sequence[ImageInput]) -> Layout:
        """Expand each placeholder in ``ids`` [T] for the corresponding picture.

        Raises:
            ValueError: the numbers of placeholders and pictures differ.
        """
        places = (ids == self.image_token).nonzero()[:, 0].tolist()
        if len(places) != len(images):
            raise ValueError(f"{len(images)} images, but the messages have {len(places)} image placeholders")
        pieces, slots, at, length = [], [], 0, 0
        for place, image in zip(places, images, strict=True):
            piece = torch.tensor(self.expansion(image), dtype=torch.int64)
            length += place - at
            slots += [(length + start, run) for start, run in _runs(piece == self.image_token)]
            pieces += [ids[at:place], piece]
            length += len(piece)
            at = place + 1
        ids = torch.cat([*pieces, ids[at:]])
        return Layout(ids, tuple(slots), self.positions(len(ids), slots, images))

    # Computing

    def features(self, core: Any, images: Sequence[ImageInput]) -> list[VisionFeatures]:
        """Run the vision tower and the projector over distinct pictures, in as few calls as possible."""
        raise NotImplementedError

    def hidden(
        self, core: Any, embeds: Tensor, positions: Tensor, placed: Placed | None = None, **attention: Any
    ) -> Tensor:
        """The forward of the language model, used for training, prefill, reference, attention maps and decoding.

        Args:
            core: the model.
            embeds: [B, L, hidden], token embeddings; may be overwritten.
            positions: [position_axes, B, L] int64.
            placed: the pictures among the tokens.
            attention: keywords for the current attention function (``fastrl_segments``, …).

        Returns:
            [B, L, hidden], after the last norm.
        """
        if placed is not None:
            embeds = place(embeds, placed)
        options = {"attention_mask": None, "use_cache": False, **self.deep_options(embeds, placed), **attention}
        ids = positions if self.position_axes > 1 else positions[0]
        return self.parts(core).language(inputs_embeds=embeds, position_ids=ids, **options).last_hidden_state

    def deep_options(self, embeds: Tensor, placed: Placed | None) -> dict[str, Any]:
        """Keywords that pass the ``deep`` features to the text model. Default: none."""
        return {}

    def decode_layers(self, core: Any) -> DecodeLayers | None:
        """A decode step that calls the layers' projections directly; None: use ``hidden``, which suits every family."""
        return DecodeLayers.of(self.parts(core), self.position_axes)


def place(embeds: Tensor, placed: Placed) -> Tensor:
    """``embeds`` [B, L, hidden] with the features in their rows. Placed by row and not by id, because a completion may
    contain an image token id as ordinary text."""
    tokens = [picture.tokens.to(embeds.dtype) for picture in placed.features]
    if len(embeds) == 1:  # a packed row; copied if gradients are on, as engines may keep a layer's output
        put = embeds.index_copy if torch.is_grad_enabled() else embeds.index_copy_
        return put(1, placed.rows, torch.cat(tokens)[None])
    rows = embeds.view(-1, embeds.shape[-1])
    for where, picture in zip(placed.rows.split([len(t) for t in tokens]), tokens, strict=True):
        rows.index_copy_(0, where, picture)
    return embeds


def _runs(inside: Tensor) -> list[tuple[int, int]]:
    """(start, length) of each run of True in [n] bool."""
    edges = torch.diff(inside.int(), prepend=torch.zeros(1), append=torch.zeros(1))
    starts, ends = (edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist()
    return [(start, end - start) for start, end in zip(starts, ends, strict=True)]
