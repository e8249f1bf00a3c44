"""``Generator``: prompts → completions; everything a group shares is computed once.

Images go through the vision tower once each, prompts through the language model once each, and a prompt's keys and
values are stored once for all its rows (``cache.py``). All rows of all prompts decode together (``decode.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastrl.batch import Completion, ImageInput, Prompt
from fastrl.clock import Clock
from fastrl.models.families import Placed, VisionFeatures, family_of
from fastrl.models.kept import KeptPrompts, keep_prompt, trained_features
from fastrl.models.merged import Merged
from fastrl.rollout.cache import PromptCache, rollout_mode
from fastrl.rollout.decode import Decode, Start, decode_mode
from fastrl.rollout.limits import Limits
from fastrl.rollout.sampler import Sampling


class Generator:
    """Samples completions from a policy's current weights; keeps nothing between calls except ``features``, if given.

    Args:
        policy: a ``fastrl.models`` policy; its ``core``, ``features``, ``decode`` and token ids are used.
        max_rows, prefill_tokens, vision_patches: what is processed at once, which bounds memory (see ``Limits``).
        decode: the decode mode (see ``fastrl.rollout.decode``): ``"auto"`` is ``"graph"`` on a GPU (``"static"`` with
            4-bit weights) and ``"eager"`` elsewhere; ``"static"`` computes the same as ``"graph"`` without capturing.
        clock: records the time of the phases ``vision``, ``prefill`` and ``decode``.
        features: vision features by image key, which ``generate`` reads and adds to. The owner empties it when the
            vision tower's weights change. None: features are dropped once all prompts that show them are prefilled.
        merge: compute with adapters merged into a copy of the weights, made once per call of ``generate`` and per
            session (see ``fastrl.models.merged``). Passes that ``keep`` gets have separate adapters.
    """

    def __init__(
        self,
        policy: Any,
        *,
        max_rows: int = Limits.max_rows,
        prefill_tokens: int = Limits.prefill_tokens,
        vision_patches: int = Limits.vision_patches,
        decode: str = "auto",
        clock: Clock | None = None,
        features: dict[str, VisionFeatures] | None = None,
        merge: bool = False,
    ) -> None:
        self.policy = policy
        self.limits = Limits(max_rows, prefill_tokens, vision_patches)
        if decode == "auto" and policy.device.type == "cuda" and policy.quantized:
            decode = "static"  # capturing 4-bit products in a CUDA graph is untested
        self.decode = decode_mode(decode, policy.device)
        self.phase = clock.phase if clock is not None else nullcontext
        self.features = features
        self.merge = merge

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        rng: torch.Generator | None = None,
        *,
        keep: KeptPrompts | None = None,
    ) -> list[list[Completion]]:
        """Sample ``sampling.n`` completions of each prompt.

        One uniform number per row and token is drawn from ``rng`` up front, in the order of ``prompts``. What a row
        samples then depends only on its own numbers and logits, not on how prompts are split into chunks or when rows
        finish. Multimodal positions come from the prompts; nothing is cached on the model.

        Args:
            prompts: encoded prompts; each image key goes through the vision tower at most once per call.
            sampling: see ``Sampling``. Temperature 0 draws nothing from ``rng``, and its n completions are equal.
            rng: on any device. May be None for temperature 0.
            keep: gets the prompts' passes with their graph, for an update with the same weights. Each prompt and its
                pictures then go through the model in calls of their own, which are those of training.

        Returns:
            The ``n`` completions of each prompt: ``token_ids`` [T] int64 on the CPU, ending with EOS if ``finished``,
            ``text``, and ``sampler_logp`` [T] float32 on the CPU (see ``sample``).

        Raises:
            ValueError: a prompt is empty, or ``rng`` is missing.
            FloatingPointError: the policy's logits are not finite.
        """
        rows = rows_per_prompt(sampling)
        uniform = _uniform(len(prompts), sampling, rng)
        features = self.features if self.features is not None else {}
        out: list[list[Completion]] = [[] for _ in prompts]
        merged = self._merged()
        chunks = self.limits.chunks([len(p.token_ids) for p in prompts], rows)
        several = self.decode == "graph" and len(chunks) > 1
        with closing(_Shared(prompts)) if several else nullcontext() as shared:
            for number, chunk in enumerate(chunks):
                session = self._session([prompts[i] for i in chunk], features, merged, keep, shared)
                if self.features is None:  # what no later chunk reads is freed before this one decodes
                    read = {image.key for later in chunks[number + 1 :] for i in later for image in prompts[i].images}
                    for key in features.keys() - read:
                        del features[key]
                own = None if uniform is None else uniform.view(len(prompts), rows, -1)[chunk].flatten(0, 1)
                for i, completions in zip(chunk, session.sample(sampling, own), strict=True):
                    out[i] = completions
        return out

    def sync(self) -> None:
        """Does nothing: this generator samples with the policy's own weights."""

    def take_notes(self) -> list[str]:
        """Nothing can happen to it."""
        return []

    def close(self) -> None:
        """Does nothing: this generator holds no resources outside the process."""

    def session(self, prompts: Prompt | Sequence[Prompt]) -> Session:
        """Keep the prompts' keys and values between turns: generate, ``extend``, generate again.

        A session is valid for the weights it was made with: make a new one after an update.
        """
        return self._session([prompts] if isinstance(prompts, Prompt) else list(prompts), {}, self._merged())

    def _merged(self) -> Merged | None:
        if not self.merge:
            return None
        with self.phase("decode"):
            return Merged(self.policy.core)

    def _session(
        self,
        prompts: list[Prompt],
        features: dict[str, VisionFeatures],
        merged: Merged | None,
        keep: KeptPrompts | None = None,
        shared: _Shared | None = None,
    ) -> Session:
        if keep is None:
            images = [image for p in prompts for image in p.images if image.key not in features]
            features.update(self._features(images, merged))
            return Session(self, prompts, features, merged, shared=shared)
        with self.phase("vision"):
            for prompt in prompts:
                features.update(trained_features(self.policy.core, [i for i in prompt.images if i.key not in features]))
        return Session(self, prompts, features, merged, keep, shared)

    def _features(self, images: Sequence[ImageInput], merged: Merged | None) -> dict[str, VisionFeatures]:
        """Vision features by image key, each computed once."""
        found: dict[str, VisionFeatures] = {}
        patches = family_of(self.policy.core.config).patches
        unique = list({image.key: image for image in images}.values())
        with self.phase("vision"), sampling_mode(self.policy.core, merged):
            for call in self.limits.vision_calls([patches(image) for image in unique]):
                found.update(self.policy.features([unique[i] for i in call]))
        return found


class _Shared:
    """What the chunks of one rollout use one after another: buffers at fixed addresses, and the graphs that were
    captured on them. ``prompts``: of all chunks."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._capacity = max(len(prompt.token_ids) for prompt in prompts)
        self._decode: Decode | None = None
        self._prompts: PromptCache | None = None

    def prompts(self, size: int) -> PromptCache:
        """An empty cache for that many prompts: that of the chunk before, if it had as many."""
        if self._prompts is None or len(self._prompts.length) != size:
            self.close()
            self._prompts = PromptCache(size)
            self._prompts.reserve(self._capacity)
        self._prompts.restart()
        return self._prompts

    def again(self, start: Start, uniform: Tensor | None) -> Decode | None:
        """The decode of the chunk before, begun again; None, and nothing held, if this one needs its own."""
        decode, self._decode = self._decode, None
        if decode is None or decode.restart(start, uniform):
            return decode
        decode.close()
        return None

    def keep(self, decode: Decode) -> None:
        """Hold a finished decode for the next chunk, unless its buffers have moved."""
        if decode.cache.moved:
            decode.close()
        else:
            self._decode = decode

    def close(self) -> None:
        """Drop all."""
        if self._decode is not None:
            self._decode.close()
        self._decode = self._prompts = None


class Session:
    """B dialogues whose images and history are processed once. Made by ``Generator.session``."""

    def __init__(
        self,
        generator: Generator,
        prompts: Sequence[Prompt],
        features: Mapping[str, VisionFeatures],
        merged: Merged | None = None,
        keep: KeptPrompts | None = None,
        shared: _Shared | None = None,
    ) -> None:
        self._merged, self._shared = merged, shared
        self._generator, self._policy = generator, generator.policy
        device = self._policy.device
        self._family = family_of(self._policy.core.config)
        for i, prompt in enumerate(prompts):
            if not len(prompt.token_ids):
                raise ValueError(f"prompts[{i}]: no tokens")
        self.next_position = [prompt.next_position for prompt in prompts]
        self._cache = PromptCache(len(prompts)) if shared is None else shared.prompts(len(prompts))
        self._cache.reserve(max((len(p.token_ids) for p in prompts), default=0))
        self._hidden: list[Tensor] = [torch.empty(0)] * len(prompts)  # [H] of each dialogue's last token
        if keep is not None:
            self._read_and_keep(prompts, features, keep)
            return
        with generator.phase("prefill"), sampling_mode(self._policy.core, merged):
            for rows in generator.limits.prefill_calls([len(p.token_ids) for p in prompts]):
                ends = prefill(self._policy.core, self._cache, rows, [prompts[i] for i in rows], features, device)
                self._keep(rows, ends)

    def extend(self, token_ids: Tensor | Sequence[Tensor]) -> None:
        """Append text to each dialogue, such as a chosen completion and the next turn of the user.

        Args:
            token_ids: [T] int64 for each dialogue (one tensor for a session of one). An empty tensor adds nothing.
                Image placeholders are treated as ordinary tokens: images can only come with the prompt.
        """
        added = [token_ids] if isinstance(token_ids, Tensor) else list(token_ids)
        if len(added) != len(self.next_position):
            raise ValueError(f"token_ids: expected one tensor for each of {len(self.next_position)} dialogues")
        device = self._policy.device
        some = [i for i, ids in enumerate(added) if len(ids)]
        with self._generator.phase("prefill"), sampling_mode(self._policy.core, self._merged):
            for call in self._generator.limits.prefill_calls([len(added[i]) for i in some]):
                rows = [some[i] for i in call]
                ids = pad_sequence([added[i] for i in rows], batch_first=True).to(device)
                first = torch.tensor([self.next_position[i] for i in rows], device=device)
                positions = (first[:, None] + torch.arange(ids.shape[1], device=device)).expand(
                    self._family.position_axes, -1, -1
                )
                embeds = self._policy.core.get_input_embeddings()(ids)
                self._keep(
                    rows, _read(self._policy.core, self._cache, rows, [len(added[i]) for i in rows], embeds, positions)
                )
                for i in rows:
                    self.next_position[i] += len(added[i])

    def generate(self, sampling: Sampling, rng: torch.Generator | None = None) -> list[list[Completion]]:
        """Sample ``n`` completions of each dialogue (see ``Generator.generate``), without appending any.

        The rows of all dialogues decode at once: keep a session within the generator's ``max_rows``.
        """
        return self.sample(sampling, _uniform(len(self.next_position), sampling, rng))

    def sample(self, sampling: Sampling, uniform: Tensor | None) -> list[list[Completion]]:
        """``generate`` with given uniform numbers: [B n, max_new_tokens] float64, None if greedy."""
        policy, rows = self._policy, rows_per_prompt(sampling)
        device = policy.device
        if not self.next_position:
            return []
        with self._generator.phase("decode"), sampling_mode(policy.core, self._merged):
            start = Start(
                self._cache,
                self._family.parts(policy.core).head(torch.stack(self._hidden)),
                torch.tensor(self.next_position, device=device),
            )
            numbers = None if uniform is None else uniform.to(device)
            decode = None if self._shared is None else self._shared.again(start, numbers)
            if decode is None:
                decode = Decode(
                    policy.core,
                    start,
                    Sampling(rows, sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.top_k),
                    numbers,
                    eos=torch.tensor(policy.eos_token_ids, dtype=torch.int64, device=device),
                    suppressed=torch.tensor(policy.suppressed_token_ids, dtype=torch.int64, device=device),
                    mode=self._generator.decode,
                )
            decode.run(again=self._shared is not None)
            if self._shared is not None:
                self._shared.keep(decode)
        with self._generator.phase("decode"):
            flat = _completions(policy, decode.tokens.cpu(), decode.logp.cpu())
        if rows < sampling.n:
            return [[copy_completion(flat[b]) for _ in range(sampling.n)] for b in range(len(flat))]
        return [flat[b * rows : (b + 1) * rows] for b in range(len(self.next_position))]

    def _read_and_keep(
        self, prompts: Sequence[Prompt], features: Mapping[str, VisionFeatures], keep: KeptPrompts
    ) -> None:
        with self._generator.phase("prefill"):
            for i, prompt in enumerate(prompts):
                kept = keep_prompt(self._policy.core, prompt, features, self._policy.device)
                keep.add(prompt, kept)
                self._cache.fill(i, kept.keys, kept.values)
                self._hidden[i] = kept.last.detach()

    def _keep(self, rows: list[int], ends: Tensor) -> None:
        for i, hidden in zip(rows, ends, strict=True):
            self._hidden[i] = hidden


@contextmanager
def sampling_mode(core: Any, merged: Merged | None) -> Iterator[None]:
    """``rollout_mode``, with the merged weights if there are any."""
    with nullcontext() if merged is None else merged.active(), rollout_mode(core):
        yield


def prefill(
    core: Any,
    cache: PromptCache,
    rows: list[int],
    prompts: Sequence[Prompt],
    features: Mapping[str, VisionFeatures],
    device: torch.device,
) -> Tensor:
    """One forward over prompts, within ``rollout_mode``.

    Args:
        core: the model, on ``device``.
        cache: gets the prompts' keys and values; room for the longest is made if need be.
        rows: the cache's texts, empty so far, that these prompts are.
        features: vision features by image key.

    Returns:
        [len(prompts), hidden]: of each prompt's last token.
    """
    lengths = [len(prompt.token_ids) for prompt in prompts]
    ids = pad_sequence([prompt.token_ids for prompt in prompts], batch_first=True).to(device)
    positions = pad_sequence([prompt.positions.T for prompt in prompts]).permute(2, 1, 0).to(device)
    placed = _placed(prompts, features, ids.shape[1], device)
    return _read(core, cache, rows, lengths, core.get_input_embeddings()(ids), positions, placed)


def _read(
    core: Any,
    cache: PromptCache,
    rows: list[int],
    lengths: list[int],
    embeds: Tensor,
    positions: Tensor,
    placed: Placed | None = None,
) -> Tensor:
    """Append ``lengths`` tokens to the cache's texts ``rows``: hidden states [rows, H] of the last of them."""
    append = cache.append(rows, lengths)
    hidden = family_of(core.config).hidden(core, embeds, positions, placed, fastrl_cache=append)
    append.commit()
    last = torch.tensor([row * hidden.shape[1] + n - 1 for row, n in enumerate(lengths)], device=hidden.device)
    return hidden.flatten(0, 1).index_select(0, last)


def _placed(
    prompts: Sequence[Prompt], features: Mapping[str, VisionFeatures], width: int, device: torch.device
) -> Placed | None:
    """Where the images of a batch of prompts go, whose rows are padded to ``width``; None without images."""
    slots = [(row * width + start, length) for row, p in enumerate(prompts) for start, length in p.image_slots]
    if not slots:
        return None
    rows = torch.tensor([row for start, length in slots for row in range(start, start + length)], device=device)
    return Placed(rows, tuple(features[image.key] for p in prompts for image in p.images))


def rows_per_prompt(sampling: Sampling) -> int:
    """Rows decoded per prompt: greedy completions of a prompt are equal, so one row is enough."""
    return 1 if sampling.greedy else sampling.n


def _uniform(prompts: int, sampling: Sampling, rng: torch.Generator | None) -> Tensor | None:
    if sampling.greedy:
        return None
    if rng is None:
        raise ValueError("rng: a torch.Generator is needed unless the temperature is 0")
    shape = (prompts * sampling.n, sampling.max_new_tokens)
    return torch.rand(shape, generator=rng, dtype=torch.float64, device=rng.device)


def _completions(policy: Any, tokens: Tensor, logp: Tensor) -> list[Completion]:
    """Rows [R, T] → completions, each cut after its first EOS."""
    ends = torch.isin(tokens, torch.tensor(policy.eos_token_ids))
    finished = ends.any(-1)
    lengths = torch.where(finished, ends.int().argmax(-1) + 1, tokens.shape[1])
    written = torch.arange(tokens.shape[1]) < lengths[:, None]
    if not logp[written].isfinite().all():
        raise FloatingPointError("rollout: the policy's logits are not finite (have its weights diverged?)")
    texts: dict[tuple[int, ...], str] = {}  # short answers repeat, and tokenizers are slow
    out = []
    for row, (length, done) in enumerate(zip(lengths.tolist(), finished.tolist(), strict=True)):
        ids = tokens[row, :length].clone()
        spelled = tuple(ids.tolist())
        if spelled not in texts:
            texts[spelled] = policy.decode(ids)
        logps = logp[row, :length].clone()
        out.append(Completion(token_ids=ids, text=texts[spelled], finished=done, sampler_logp=logps))
    return out


def copy_completion(completion: Completion) -> Completion:
    assert completion.sampler_logp is not None
    return Completion(
        token_ids=completion.token_ids.clone(),
        text=completion.text,
        finished=completion.finished,
        sampler_logp=completion.sampler_logp.clone(),
        sampler=completion.sampler,
    )
