"""Image preprocessing: once per distinct content, and on request ahead of time in background threads."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrl.answers import View
from fastrl.batch import ImageInput
from fastrl.data.pictures import AnyPicture, bands, opened_picture

if TYPE_CHECKING:
    from PIL.Image import Image


class ImagePreprocessor:
    """A model's own resize, normalisation and patching, with a bounded cache keyed by the picture's content.

    A family implements :meth:`read`, :meth:`picture` and ``settings``. ``processor`` is the model's image processor.
    ``cache_bytes`` bounds the cached pixels; the least recently used are dropped first. :meth:`prefetch` starts
    preprocessing in background threads; results do not depend on it.
    """

    def __init__(self, processor: Any, *, cache_bytes: int = 256 << 20) -> None:
        self.processor = processor
        self.cache_bytes = cache_bytes
        self._cache: OrderedDict[str, tuple[ImageInput, View]] = OrderedDict()
        self._held = 0
        self._lock = threading.Lock()  # guards the cache
        self._pool: ThreadPoolExecutor | None = None
        # By (path or id, tag). The value holds the picture too: alive, its id is not reused.
        self._started: dict[tuple[str | int, str], tuple[Any, Future]] = {}

    # Implemented by each family

    @property
    def settings(self) -> str:
        """All settings that, besides a picture's pixels, determine the result."""
        raise NotImplementedError

    def tag(self, among: int) -> str:
        """Names the variant of preprocessing used in a prompt of ``among`` pictures; "" if there is only one.

        Pixels, tokens and features of a picture may differ between tags, so they are cached separately.
        """
        return ""

    def area(self, size: tuple[int, int]) -> int:
        """About how many pixels the tower sees of a picture of this (width, height), for ``Family.sizes``; 1, the
        default: all pictures become equally large."""
        return 1

    def read(self, picture: Image, key: str, among: int) -> tuple[ImageInput, View]:
        """Preprocess an RGB picture of a prompt with ``among`` pictures; also returns which part the model sees."""
        raise NotImplementedError

    def picture(self, image: ImageInput) -> Image:
        """The RGB picture whose pixels ``image`` holds, to send to a server: preprocessed again, it gives the same."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write the preprocessor's files into a model folder."""
        self.processor.save_pretrained(folder)

    # Common to all families

    def prefetch(self, images: Iterable[AnyPicture], workers: int, *, among: int = 1) -> None:
        """Start preprocessing ``images`` in ``workers`` threads; the next call with an image returns its result.

        Errors are raised by that call.
        """
        self._pool = self._pool or ThreadPoolExecutor(workers, thread_name_prefix="images")
        for image in images:
            name = _name(image), self.tag(among)
            if name not in self._started:
                self._started[name] = image, self._pool.submit(self._preprocess, image, among)

    def close(self) -> None:
        """Cancel prefetching and drop results that were not requested."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool, self._started = None, {}

    def __call__(self, image: AnyPicture, among: int = 1) -> tuple[ImageInput, View]:
        """Preprocess an image of a prompt with ``among`` images; the ``View`` has its size and the part that is seen.

        Raises:
            PictureError: the file is missing, broken or too large (an ``OSError``).
            ValueError: the processor refuses the picture (one side over 200 times the other).
        """
        started = self._started.pop((_name(image), self.tag(among)), None)
        return started[1].result() if started is not None else self._preprocess(image, among)

    def _preprocess(self, image: AnyPicture, among: int) -> tuple[ImageInput, View]:
        with opened_picture(image) as picture:  # only one large picture is open at a time
            return self._prepare(picture, among)

    def _prepare(self, picture: Image, among: int) -> tuple[ImageInput, View]:
        key = self.key(picture, among)
        with self._lock:
            found = self._cache.get(key)
            if found is not None:
                self._cache.move_to_end(key)
        if found is None:
            found = self.read(picture, key, among)
            with self._lock:
                self._keep(key, found)
        return found

    def key(self, picture: Image, among: int = 1) -> str:
        """Content key: pictures with equal pixels under equal settings have equal keys."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"{picture.size} {self.settings}{self.tag(among)}".encode())
        for _, band in bands(picture):
            digest.update(band.tobytes())
        return digest.hexdigest()

    def _keep(self, key: str, found: tuple[ImageInput, View]) -> None:
        if key in self._cache:  # another thread processed the same picture
            return
        self._cache[key] = found
        self._held += _bytes(found[0])
        while self._held > self.cache_bytes and len(self._cache) > 1:
            self._held -= _bytes(self._cache.popitem(last=False)[1][0])


def _name(image: AnyPicture) -> str | int:
    return str(image) if isinstance(image, str | Path) else id(image)


def unique_images(images: Iterable[ImageInput]) -> list[ImageInput]:
    """One image per key, in order of first appearance."""
    return list({image.key: image for image in reversed(list(images))}.values())[::-1]


def joined_pixels(images: Iterable[ImageInput], device: torch.device, dtype: torch.dtype) -> Tensor:
    """The pixels of several pictures, [sum of their first sizes, ...], on ``device`` in ``dtype``.

    For a GPU they are rounded to ``dtype`` on the way into one page-locked buffer: in bfloat16 half of their bytes
    cross, in one copy that the host does not wait for and that needs no joining on the GPU.
    """
    parts = [image.pixel_values for image in images]
    if device.type == "cuda" and all(part.device.type == "cpu" for part in parts):
        return staged_pixels(parts, dtype, pinned=True).to(device, non_blocking=True)
    return torch.cat([part.to(device, dtype, non_blocking=True) for part in parts])


def staged_pixels(parts: Sequence[Tensor], dtype: torch.dtype, *, pinned: bool) -> Tensor:
    """The parts one after another in a new buffer on the host."""
    lengths = [len(part) for part in parts]
    staged = torch.empty((sum(lengths), *parts[0].shape[1:]), dtype=dtype, pin_memory=pinned)
    for place, part in zip(staged.split(lengths), parts, strict=True):
        place.copy_(part)
    return staged


def picture_of(pixels: Tensor, processor: Any) -> Image:
    """Undo normalisation: pixels [height, width, 3] → RGB picture."""
    from PIL import Image as pil

    mean, std = (torch.tensor(getattr(processor, f"image_{name}")) for name in ("mean", "std"))
    values = (pixels * std + mean) / processor.rescale_factor
    return pil.fromarray(values.round().clamp(0, 255).to(torch.uint8).numpy())


def _bytes(image: ImageInput) -> int:
    held = image.pixel_values.numel() * image.pixel_values.element_size()
    return held + (0 if image.original is None else image.original.numel())
