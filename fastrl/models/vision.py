"""Images → pixels (once per content) → vision features (once per batch)."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrl.batch import ImageInput
from fastrl.data.pictures import AnyPicture, opened_picture
from fastrl.models.positions import image_tokens

if TYPE_CHECKING:
    from PIL.Image import Image


class ImagePreprocessor:
    """A model's own resize, normalisation and patching, with a bounded cache keyed by the picture's content.

    ``processor`` is the model's image processor. ``cache_bytes`` bounds the pixels kept; the least recently used go
    first. :meth:`prefetch` starts on pictures that will be asked for, in threads; what comes out is the same.
    """

    def __init__(self, processor: Any, *, cache_bytes: int = 256 << 20) -> None:
        self.processor = processor
        self.patch = int(processor.patch_size)
        self.merge = int(processor.merge_size)
        self.cache_bytes = cache_bytes
        self._cache: OrderedDict[str, ImageInput] = OrderedDict()
        self._held = 0
        self._lock = threading.Lock()  # of the cache
        self._pool: ThreadPoolExecutor | None = None
        self._started: dict[str | int, tuple[Any, Future]] = {}  # by path or identity; the picture, kept alive

    def prefetch(self, images: Iterable[AnyPicture], workers: int) -> None:
        """Begin to preprocess ``images`` in ``workers`` threads; each is handed out by the next call for it.

        What goes wrong with a picture is raised by that call.
        """
        self._pool = self._pool or ThreadPoolExecutor(workers, thread_name_prefix="images")
        for image in images:
            name = _name(image)
            if name not in self._started:
                self._started[name] = image, self._pool.submit(self._preprocess, image)

    def close(self) -> None:
        """Give up what was begun and not asked for."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool, self._started = None, {}

    def __call__(self, image: AnyPicture) -> tuple[ImageInput, tuple[int, int]]:
        """The image as the model takes it, and its original (width, height) in pixels.

        Raises:
            PictureError: a file that is missing, broken or too large (an ``OSError``).
            ValueError: a picture the processor refuses (one side over 200 times the other).
        """
        started = self._started.pop(_name(image), None)
        return started[1].result() if started is not None else self._preprocess(image)

    def _preprocess(self, image: AnyPicture) -> tuple[ImageInput, tuple[int, int]]:
        with opened_picture(image) as picture:  # of large pictures there is one at a time
            return self._prepare(picture), picture.size

    def _prepare(self, picture: Image) -> ImageInput:
        key = self.key(picture)
        with self._lock:
            found = self._cache.get(key)
            if found is not None:
                self._cache.move_to_end(key)
        if found is None:
            out = self.processor(images=[picture], return_tensors="pt")
            t, h, w = (int(n) for n in out["image_grid_thw"][0])
            found = ImageInput(pixel_values=out["pixel_values"].float(), grid=(t, h, w), key=key)
            with self._lock:
                self._keep(found)
        return found

    def key(self, picture: Image) -> str:
        """Content key: pictures with equal pixels under equal processor limits have equal keys."""
        size = self.processor.size
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"{picture.size} {size['shortest_edge']} {size['longest_edge']}".encode())
        digest.update(picture.tobytes())
        return digest.hexdigest()

    def picture(self, image: ImageInput) -> Image:
        """The resized RGB picture whose pixels ``image`` holds: preprocessed again, it gives the same ones."""
        from PIL import Image as pil

        t, h, w = image.grid
        merge, patch = self.merge, self.patch
        # Rows are patches, those of one merge block together; a still image fills its temporal patch with copies.
        blocks = image.pixel_values.view(t, h // merge, w // merge, merge, merge, 3, -1, patch, patch)
        pixels = blocks[0, ..., 0, :, :].permute(0, 2, 5, 1, 3, 6, 4).reshape(h * patch, w * patch, 3)
        mean, std = (torch.tensor(getattr(self.processor, f"image_{name}")) for name in ("mean", "std"))
        values = (pixels * std + mean) / self.processor.rescale_factor
        return pil.fromarray(values.round().clamp(0, 255).to(torch.uint8).numpy())

    def tokens(self, image: ImageInput) -> int:
        """Number of language-model tokens of this image."""
        return image_tokens(image.grid, self.merge)

    def _keep(self, image: ImageInput) -> None:
        if image.key in self._cache:  # two threads met the same picture
            return
        self._cache[image.key] = image
        self._held += _bytes(image)
        while self._held > self.cache_bytes and len(self._cache) > 1:
            self._held -= _bytes(self._cache.popitem(last=False)[1])


def _name(image: AnyPicture) -> str | int:
    return str(image) if isinstance(image, str | Path) else id(image)


def unique_images(images: Iterable[ImageInput]) -> list[ImageInput]:
    """One image per key, in order of first appearance."""
    return list({image.key: image for image in reversed(list(images))}.values())[::-1]


def vision_features(core: Any, images: Sequence[ImageInput]) -> list[Tensor]:
    """Vision tower over unique ``images`` in one call.

    Args:
        core: the ``…ForConditionalGeneration`` model.
        images: images, each [patches, values] with its own grid.

    Returns:
        For each image, features [tokens, hidden] in token order.
    """
    if not images:
        return []
    visual = core.model.visual
    device = next(visual.parameters()).device
    pixels = torch.cat([image.pixel_values.to(device, visual.dtype, non_blocking=True) for image in images])
    grids = torch.tensor([image.grid for image in images])
    # A frozen tower needs no graph: nothing below the embeddings takes a gradient.
    trained = torch.is_grad_enabled() and any(p.requires_grad for p in visual.parameters())
    with torch.set_grad_enabled(trained):
        features = visual(pixels, grid_thw=grids.to(device), **_vision_tables(visual, grids, device)).pooler_output
    return list(features.split([image_tokens(image.grid, visual.spatial_merge_size) for image in images]))


def use_linear_patches(core: Any) -> None:
    """Embed patches by one matrix product. Patches do not overlap, so the tower's 3-D convolution is exactly that, but
    convolution libraries take several times as long over it."""
    embed = core.model.visual.patch_embed
    embed.forward = MethodType(_embed_patches, embed)


def _embed_patches(self: nn.Module, hidden_states: Tensor) -> Tensor:
    proj: Any = self.proj
    # An adapter, or a sharded weight that only the layer's own call gathers: leave it to the layer.
    if type(proj) is not nn.Conv3d or hasattr(proj.weight, "ds_id"):
        return type(self).forward(self, hidden_states)
    return F.linear(hidden_states.to(proj.weight.dtype), proj.weight.flatten(1), proj.bias)


def _vision_tables(visual: Any, grids: Tensor, device: torch.device) -> dict[str, Any]:
    """What the tower derives from the grids, made on the host: on the device each piece costs a synchronisation."""
    try:
        from transformers import vision_utils
    except ImportError:  # older versions derive them inside the tower and take no such keywords
        return {}
    config = visual.config
    where = torch.device("cpu") if device.type == "meta" else device  # attention may have to read the lengths
    cu = vision_utils.get_vision_cu_seqlens(grids)
    tables: dict[str, Any] = {
        "position_ids": vision_utils.get_vision_position_ids(grids, visual.spatial_merge_size).to(device),
        "cu_seqlens": cu.to(where),
        "max_seqlen": int((cu[1:] - cu[:-1]).max()),
    }
    if hasattr(config, "window_size"):
        index, cu = vision_utils.get_vision_window_index(
            grids, visual.spatial_merge_size, config.window_size, config.patch_size
        )
        tables |= {"window_index": index.to(device), "cu_window_seqlens": cu.to(where)}
        tables["max_window_seqlen"] = int((cu[1:] - cu[:-1]).max())
    return tables


def _bytes(image: ImageInput) -> int:
    return image.pixel_values.numel() * image.pixel_values.element_size()
