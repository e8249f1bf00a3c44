"""Pictures → what a family's vision tower takes, once per content, in threads beside the training where asked."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrl.answers import View
from fastrl.batch import ImageInput
from fastrl.data.pictures import AnyPicture, opened_picture

if TYPE_CHECKING:
    from PIL.Image import Image


class ImagePreprocessor:
    """A model's own resize, normalisation and patching, with a bounded cache keyed by the picture's content.

    A family fills in :meth:`read`, :meth:`picture` and ``settings``. ``processor`` is the model's image processor.
    ``cache_bytes`` bounds the pixels kept; the least recently used go first. :meth:`prefetch` starts on pictures that
    will be asked for, in threads; what comes out is the same.
    """

    def __init__(self, processor: Any, *, cache_bytes: int = 256 << 20) -> None:
        self.processor = processor
        self.cache_bytes = cache_bytes
        self._cache: OrderedDict[str, tuple[ImageInput, View]] = OrderedDict()
        self._held = 0
        self._lock = threading.Lock()  # of the cache
        self._pool: ThreadPoolExecutor | None = None
        # By path or identity, and the tag; with the picture, which is kept alive.
        self._started: dict[tuple[str | int, str], tuple[Any, Future]] = {}

    # A family's own

    @property
    def settings(self) -> str:
        """Whatever beside a picture's pixels decides what is made of it."""
        raise NotImplementedError

    def tag(self, among: int) -> str:
        """What becomes different in a prompt of so many pictures; "" where nothing does. Pixels, tokens and features of
        one picture may differ between two tags, and are kept apart."""
        return ""

    def read(self, picture: Image, key: str, among: int) -> tuple[ImageInput, View]:
        """The RGB picture as the model takes it in a prompt of ``among`` pictures, and what it sees of it."""
        raise NotImplementedError

    def picture(self, image: ImageInput) -> Image:
        """The RGB picture whose pixels ``image`` holds: preprocessed again, it gives the same ones. For a server."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write what a model folder needs of it."""
        self.processor.save_pretrained(folder)

    # Common to all

    def prefetch(self, images: Iterable[AnyPicture], workers: int, *, among: int = 1) -> None:
        """Begin to preprocess ``images`` in ``workers`` threads; each is handed out by the next call for it.

        What goes wrong with a picture is raised by that call.
        """
        self._pool = self._pool or ThreadPoolExecutor(workers, thread_name_prefix="images")
        for image in images:
            name = _name(image), self.tag(among)
            if name not in self._started:
                self._started[name] = image, self._pool.submit(self._preprocess, image, among)

    def close(self) -> None:
        """Give up what was begun and not asked for."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool, self._started = None, {}

    def __call__(self, image: AnyPicture, among: int = 1) -> tuple[ImageInput, View]:
        """The image as the model takes it in a prompt of ``among`` images, and its size and what is seen of it.

        Raises:
            PictureError: a file that is missing, broken or too large (an ``OSError``).
            ValueError: a picture the processor refuses (one side over 200 times the other).
        """
        started = self._started.pop((_name(image), self.tag(among)), None)
        return started[1].result() if started is not None else self._preprocess(image, among)

    def _preprocess(self, image: AnyPicture, among: int) -> tuple[ImageInput, View]:
        with opened_picture(image) as picture:  # of large pictures there is one at a time
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
        digest.update(picture.tobytes())
        return digest.hexdigest()

    def _keep(self, key: str, found: tuple[ImageInput, View]) -> None:
        if key in self._cache:  # two threads met the same picture
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


def picture_of(pixels: Tensor, processor: Any) -> Image:
    """The RGB picture of normalised pixels [height, width, 3]."""
    from PIL import Image as pil

    mean, std = (torch.tensor(getattr(processor, f"image_{name}")) for name in ("mean", "std"))
    values = (pixels * std + mean) / processor.rescale_factor
    return pil.fromarray(values.round().clamp(0, 255).to(torch.uint8).numpy())


def _bytes(image: ImageInput) -> int:
    held = image.pixel_values.numel() * image.pixel_values.element_size()
    return held + (0 if image.original is None else image.original.numel())
