"""LoRA adapters (peft) and freezing parameters by name."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.engine.names import matches
from fastrl.models.adapted import use_stacked
from fastrl.models.families import PARTS, Family
from fastrl.models.quantize import dequantized, is_quantized

LANGUAGE_LINEARS = (
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "gate_up_proj", "down_proj"),  # GLM fuses gate and up into one layer
    *("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj", "shared_expert_gate"),  # Qwen3.5's
)


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (arXiv:2106.09685): W + (alpha / rank) · B A on chosen linear layers.

    ``targets``: names of linear layers of the language model; ``vision``, ``projector`` or ``language`` for all linear
    layers of that part; or one regular expression over full module names.
    ``also_train``: parts (``projector``), or suffixes of module names, that are trained in full in addition to the
    adapters; the reference still uses their initial weights.
    ``dora``: scale the columns of W + ΔW to trained norms (arXiv:2402.09353).
    ``rslora``: use alpha / √rank instead of alpha / rank (arXiv:2312.03732).
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] | str = LANGUAGE_LINEARS
    also_train: tuple[str, ...] = ()
    dora: bool = False
    rslora: bool = False

    @classmethod
    def of(cls, spec: Lora | Mapping[str, Any]) -> Lora:
        """From a mapping with this class's fields. Raises ``ValueError`` on an unknown field."""
        if isinstance(spec, Lora):
            return spec
        known = {f.name for f in fields(cls)}
        if unknown := set(spec) - known:
            raise ValueError(f"lora: unknown fields {sorted(unknown)}; allowed: {sorted(known)}")
        values = dict(spec)
        if "targets" in values and not isinstance(values["targets"], str):
            values["targets"] = tuple(values["targets"])
        if isinstance(values.get("also_train", ()), str):
            raise ValueError("lora: also_train must be a list of module names")
        values["also_train"] = tuple(values.get("also_train", ()))
        return cls(**values)


def add_lora(core: nn.Module, spec: Lora | Mapping[str, Any], family: Family) -> Any:
    """Wrap ``core`` in a peft model that trains only new adapters. The layers of ``core`` are changed in place."""
    from peft import LoraConfig, get_peft_model

    lora = Lora.of(spec)
    targets = lora.targets if isinstance(lora.targets, str) else _chosen(core, lora.targets, family)
    options: dict[str, Any] = {"lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "target_modules": targets}
    options |= {"use_dora": lora.dora, "use_rslora": lora.rslora}
    linears = [name for name, module in core.named_modules() if isinstance(module, nn.Linear)]
    try:
        matched = any(re.fullmatch(targets, name) for name in linears)
    except re.error as error:
        raise ValueError(f"lora.targets: {targets!r} is not a regular expression: {error}") from None
    if not matched:
        last = sorted({name.rpartition(".")[2] for name in linears if family.part_of(name) == "language"})
        raise ValueError(f"lora.targets: {lora.targets!r} matches no linear layer; there are {', '.join(last)}")
    if lora.also_train:
        options["modules_to_save"] = [name for wanted in lora.also_train for name in _whole(core, wanted, family)]
    with warnings.catch_warnings():  # peft reads a property that newer transformers versions renamed
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        with _without_model_type(core):
            model = get_peft_model(core, LoraConfig(r=lora.rank, **options))  # type: ignore[arg-type]
    if lora.dora:
        _check_dora(core, lora)
        from fastrl.models.dora import keep_scales

        keep_scales(core)
    use_stacked(core)
    return model


def _check_dora(core: nn.Module, lora: Lora) -> None:
    """Raise ``ValueError`` if DoRA is applied to a layer that is not linear."""
    adapted = [(name, module) for name, module in core.named_modules() if hasattr(module, "get_base_layer")]
    odd = [name for name, module in adapted if not isinstance(module.get_base_layer(), nn.Linear)]  # type: ignore[operator]
    if odd:
        raise ValueError(f"lora.dora: only for linear layers, but lora.targets {lora.targets!r} matches {odd[0]}")


@contextmanager
def _without_model_type(core: Any) -> Iterator[None]:
    """Hide ``config.model_type`` from peft, which would otherwise move the targets of some mixtures of experts from
    linear layers to the experts' fused weights and skip layers without experts."""
    own = vars(core.config)
    before = {key: own[key] for key in ("model_type",) if key in own}
    core.config.model_type = ""
    try:
        yield
    finally:
        del core.config.model_type
        own.update(before)


def _chosen(core: nn.Module, targets: Iterable[str], family: Family) -> str:
    """A regular expression over full names: text layers by the last part of their names, parts by all their linears."""
    names = [target for target in targets if target not in PARTS]
    text, head = re.escape(family.part_names["language"][0]), family.parts(core).head
    patterns = [rf".*{text}\..*\.({'|'.join(names)})"] if names else []
    for part in (target for target in targets if target in PARTS):
        within = [n for n, m in core.named_modules() if isinstance(m, nn.Linear) and family.part_of(n) == part]
        patterns += [re.escape(name) for name in within if core.get_submodule(name) is not head]
    return "|".join(patterns)


def _whole(core: nn.Module, wanted: str, family: Family) -> list[str]:
    """Names of the modules that together make up the part ``wanted``, or the module of that name."""
    modules = dict(core.named_modules())
    if wanted not in PARTS:
        if not any(f".{name}".endswith(f".{wanted}") for name in modules):
            near = difflib.get_close_matches(wanted, [*PARTS, *modules], n=3, cutoff=0.4)
            raise ValueError(f"lora.also_train: no module is called {wanted!r}; near: {', '.join(near) or 'none'}")
        return [wanted]
    found: list[str] = []
    for name, module in modules.items():  # outer modules come before those within them
        inside = [f"{name}.{inner}" for inner, _ in module.named_modules() if inner]
        pure = family.part_of(name) == wanted and all(family.part_of(inner) == wanted for inner in inside)
        held = any(name.startswith(f"{outer}.") for outer in found)
        if pure and not held and not isinstance(module, nn.ModuleList | nn.ModuleDict) and list(module.parameters()):
            found.append(name)
    return found


def freeze(core: nn.Module, patterns: Iterable[str], alias: Callable[[str], str]) -> list[str]:
    """Turn off the gradient of every parameter that matches a pattern, and return their names.

    A pattern is a part (``vision``, ``projector``, ``language``) or a module within one (``vision.blocks.0``), a glob
    over full parameter names (``model.visual.*``), or consecutive components of such a name (``layers.0``); ``alias``:
    see ``fastrl.models.families.Family.alias``.

    Raises:
        ValueError: a pattern matches nothing; the message lists similar names.
    """
    named = dict(core.named_parameters())
    frozen: list[str] = []
    for pattern in patterns:
        found = [name for name in named if matches(pattern, name, alias)]
        if not found:
            parts = sorted({part for name in named for part in (*PARTS, *name.split(".")) if not part.isdigit()})
            near = difflib.get_close_matches(pattern, [*parts, *named], n=3, cutoff=0.4)
            raise ValueError(f"freeze: {pattern!r} matches no parameter; near: {', '.join(near) or ', '.join(parts)}")
        for name in found:
            named[name].requires_grad_(False)
        frozen += found
    return sorted(set(frozen))


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights and buffers that ``state_dict`` gives, without its hooks: with sharded weights, those would shard
    again what was gathered."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        kept = {name: b for name, b in module._buffers.items() if name not in module._non_persistent_buffers_set}
        for name, value in (*module._parameters.items(), *kept.items()):
            if value is not None:
                found[f"{path}.{name}" if path else name] = value.detach()
    return found


def merged_state_dict(core: nn.Module) -> dict[str, Any]:
    """The state of ``core`` with adapters merged into the weights, under the names from before they were attached.

    For a module trained in full, peft keeps the initial and the trained weights; the trained ones are returned. 4-bit
    weights are returned in their compute dtype.
    """
    modules = dict(core.named_modules())
    state = {}
    for name, value in whole_state(core).items():
        owner, _, leaf = name.rpartition(".")
        outer = owner.removesuffix(".base_layer")
        if ".lora_" in name or ".original_module." in name or is_quantized(modules.get(name.split(".weight.")[0])):
            continue  # the last: scales of a 4-bit weight
        if leaf == "weight" and outer != owner and hasattr(modules[outer], "get_delta_weight"):
            value = merged_weight(modules[outer])
        elif leaf == "weight":
            value = dequantized(modules[owner]) if is_quantized(modules[owner]) else value
        name = re.sub(r"\.modules_to_save\.[^.]+\.", ".", name)
        state[name.replace(".base_layer.", ".")] = value
    return state


def merged_weight(module: Any) -> Tensor:
    """The weight of an adapted layer: W + ΔW or, with DoRA, m (W + ΔW) / ‖W + ΔW‖, the norm of each output's weights.

    Computed by :func:`merged_sum`, returned in the dtype of W.
    """
    base = dequantized(module.get_base_layer())
    return merged_sum(module, base).to(base.dtype)


def merged_sum(module: Any, base: Tensor) -> Tensor:
    """:func:`merged_weight` before it is rounded, for ``base`` as W: in float32, or float64 with such weights."""
    base = base.detach()
    merged = base.to(torch.promote_types(base.dtype, torch.float32))
    for adapter in module.active_adapters:
        merged = merged + module.get_delta_weight(adapter).detach().to(merged.dtype)
        if adapter in module.lora_magnitude_vector:
            magnitude = module.lora_magnitude_vector[adapter].weight.detach().to(merged.dtype)
            merged = merged * (magnitude.view(-1, 1) / merged.norm(dim=1, keepdim=True))
    return merged
