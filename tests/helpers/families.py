"""Tiny random folders of every model family, made from configs alone: one entry each, nothing is downloaded.

A family's entry says how to build its tokenizer, config, image processor and released processor. ``build_family``
writes an ordinary Hugging Face folder that ``load_policy`` loads; ``oracle`` is transformers' own model and processor
of that folder. A new family is one more entry of ``BUILDS``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
CHATML = (
    "{{% for m in messages %}}{{% if loop.first and m.role != 'system' %}}<|im_start|>system\nYou are a helpful "
    "assistant.<|im_end|>\n{{% endif %}}<|im_start|>{{{{ m.role }}}}\n{{% if m.content is string %}}{{{{ m.content }}}}"
    "{{% else %}}{{% for part in m.content %}}{{% if part.type == 'image' %}}{image}"
    "{{% else %}}{{{{ part.text }}}}{{% endif %}}{{% endfor %}}{{% endif %}}<|im_end|>\n{{% endfor %}}"
    "{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% endif %}}"
)
VICUNA = (  # images first, and no end of turn, as in the released templates
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.role.upper() + ': ' }}{% endif %}"
    "{% for part in m.content if part.type == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in m.content if part.type == 'text' %}{{ part.text + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' }}"
    "{% for part in m.content if part.type == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}{{ ' [/INST]' }}"
    "{% else %}{% for part in m.content %}{{ ' ' + part.text + '</s> ' }}{% endfor %}{% endif %}{% endfor %}"
)

THINKING = (  # strips every content; writes an empty thought, or begins one, and drops those of earlier turns
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% set text %}{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endset %}{% set text = text | trim %}"
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% set text = text.split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.index0 > ns.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}{{ text }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and "
    "enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% else %}{{ '<think>\n' }}{% endif %}{% endif %}"
)


def byte_tokenizer(special: Sequence[str], template: str, *, eos: str, pad: str, bos: str | None = None) -> Any:
    """Byte-level, with no merges: 256 bytes and special tokens. With ``bos``, texts begin with it, as Llama's do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {byte: n for n, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, pad_token=pad, bos_token=bos, clean_up_tokenization_spaces=False
    )
    fast.chat_template = template
    return fast


def qwen_tokenizer() -> Any:
    template = CHATML.format(image="<|vision_start|><|image_pad|><|vision_end|>")
    return byte_tokenizer(SPECIAL, template, eos="<|im_end|>", pad="<|endoftext|>")


def thinking_tokenizer() -> Any:
    return byte_tokenizer((*SPECIAL, "<think>", "</think>"), THINKING, eos="<|im_end|>", pad="<|endoftext|>")


def llama_tokenizer(template: str = VICUNA) -> Any:
    special = ("<unk>", "<s>", "</s>", "<image>", "<video>", "<pad>")
    return byte_tokenizer(special, template, eos="</s>", pad="<pad>", bos="<s>")


def onevision_tokenizer() -> Any:
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
    return byte_tokenizer(special, CHATML.format(image="<image>"), eos="<|im_end|>", pad="<|endoftext|>")


def text_sizes(tokenizer: Any, **changes: Any) -> dict[str, Any]:
    """Hidden 64, two layers with grouped heads."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **changes,
    }


def qwen_config(model_type: str) -> Callable[..., Any]:
    """Vision depth 3 with windowed and full blocks (Qwen2.5), 2 (Qwen2), or 3 with deep features of two (Qwen3)."""

    def config(tokenizer: Any, **text: Any) -> Any:
        from transformers import AutoConfig

        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
        sizes = text_sizes(tokenizer, bos_token_id=None, rope_parameters=rope)
        del sizes["pad_token_id"]
        vision: dict[str, Any] = {"depth": 3, "num_heads": 2, "spatial_merge_size": 2, "temporal_patch_size": 2}
        vision |= {"hidden_size": 32, "intermediate_size": 48, "patch_size": 14}
        tied = model_type == "qwen2_5_vl"
        if model_type == "qwen2_5_vl":
            vision |= {"window_size": 56, "fullatt_block_indexes": [1]}
        elif model_type == "qwen2_vl":
            del vision["intermediate_size"]
            vision |= {"depth": 2, "embed_dim": 32, "mlp_ratio": 2}
        else:
            rope |= {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
            sizes |= {"head_dim": 16, "num_hidden_layers": 3}  # what is added after the second layer must reach a third
            vision |= {"patch_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
            if model_type in ("qwen3_vl_moe", "qwen3_5_moe"):
                sizes |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
            if model_type.startswith("qwen3_5"):
                del vision["deepstack_visual_indexes"]
                rope |= {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
                sizes |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
                sizes |= {"linear_value_head_dim": 12, "full_attention_interval": 2}
                if model_type == "qwen3_5_moe":
                    sizes["shared_expert_intermediate_size"] = 32
        sizes |= text
        vision["hidden_size" if model_type == "qwen2_vl" else "out_hidden_size"] = sizes["hidden_size"]
        names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
        ids = {f"{k}_token_id": tokenizer.convert_tokens_to_ids(f"<|{v}|>") for k, v in names.items()}
        return AutoConfig.for_model(
            model_type, text_config=sizes, vision_config=vision, tie_word_embeddings=tied, **ids
        )

    return config


def llava_config(model_type: str, text_type: str, vision: dict[str, Any], **own: Any) -> Callable[..., Any]:
    """A tower of squares of 56 pixels, 16 patches."""

    def config(tokenizer: Any, **text: Any) -> Any:
        from transformers import AutoConfig

        whole = {"sliding_window": None} if text_type == "mistral" else {}  # as in the released folders
        sizes = {"model_type": text_type, **text_sizes(tokenizer), **whole, **text}
        tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
        tower |= {"image_size": 56, "patch_size": 14, **vision}
        token = tokenizer.convert_tokens_to_ids("<image>")
        return AutoConfig.for_model(
            model_type, text_config=sizes, vision_config=tower, image_token_index=token, image_token_id=token, **own
        )

    return config


CLIP = {"model_type": "clip_vision_model", "projection_dim": 32}
SIGLIP = {"model_type": "siglip_vision_model", "vision_use_head": False}
PINPOINTS = [[56, 112], [112, 56], [112, 112], [56, 168]]


def qwen_image_processor(patch: int) -> Callable[[], Any]:
    def make() -> Any:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as Processor

        unit = 2 * patch
        size = {"shortest_edge": (2 * unit) ** 2, "longest_edge": (4 * unit) ** 2}
        made = Processor(patch_size=patch)
        made.size = size
        if patch == 16:
            made.image_mean = made.image_std = [0.5, 0.5, 0.5]
        return made

    return make


def clip_image_processor() -> Any:
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil as Processor

    crop = {"height": 56, "width": 56}
    return Processor(size={"shortest_edge": 56}, crop_size=crop, do_pad=True, do_center_crop=True)


def tile_image_processor(name: str) -> Callable[[], Any]:
    def make() -> Any:
        if name == "llava_onevision":
            from transformers.models.llava_onevision import image_processing_pil_llava_onevision as module

            square = {"height": 56, "width": 56}
            return module.LlavaOnevisionImageProcessorPil(size=square, image_grid_pinpoints=PINPOINTS)
        from transformers.models.llava_next.image_processing_pil_llava_next import (
            LlavaNextImageProcessorPil as Processor,
        )

        return Processor(
            size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=PINPOINTS
        )

    return make


def still(processor: Any, images: Any, tokenizer: Any, **options: Any) -> Any:
    """A released processor without its video part, which needs torchvision."""

    class Still(processor):
        def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
            super().__init__(image_processor, tokenizer, None, chat_template=chat_template, **options)

    return Still(images, tokenizer)


def qwen_processor(images: Any, tokenizer: Any) -> Any:
    from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor

    return still(Qwen2VLProcessor, images, tokenizer)


def llava_processor(images: Any, tokenizer: Any) -> Any:
    from transformers import LlavaProcessor

    return LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def next_processor(images: Any, tokenizer: Any) -> Any:
    from transformers import LlavaNextProcessor

    return LlavaNextProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def onevision_processor(images: Any, tokenizer: Any) -> Any:
    from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

    options = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
    return still(LlavaOnevisionProcessor, images, tokenizer, **options)


# InternVL, GLM and SmolVLM

GLM = (
    "[gMASK]<sop>\n{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}{% if part.type == 'image' %}"
    "{{ '<|begin_of_image|><|image|><|end_of_image|>' }}{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
SMOL = (  # looks at the first part, as the released template does
    "<|im_start|>{% for m in messages %}{{ m.role | capitalize }}"
    "{% if m.content[0].type == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in m.content %}{% if part.type == 'image' %}{{ '<image>' }}{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
GLM_TOKENS = (
    *("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|image|>", "<|video|>"),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
    *("<|begin_of_box|>", "<|end_of_box|>"),
)


def intern_tokenizer() -> Any:
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
    return byte_tokenizer(special, CHATML.format(image="<IMG_CONTEXT>\n"), eos="<|im_end|>", pad="<|endoftext|>")


def intern_config(tokenizer: Any, **text: Any) -> Any:
    """Tiles of 28 pixels, four tokens each; a Qwen3 text model, as InternVL3.5's."""
    from transformers import InternVLConfig

    sizes = {"model_type": "qwen3", "head_dim": 16, **text_sizes(tokenizer), **text}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": [28, 28], "patch_size": [7, 7]}
    token = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    return InternVLConfig(text_config=sizes, vision_config=vision, image_token_id=token, image_seq_length=4)


def intern_image_processor() -> Any:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil as Processor

    return Processor(size={"height": 28, "width": 28}, max_patches=4)


def intern_processor(images: Any, tokenizer: Any) -> Any:
    from transformers.models.internvl.processing_internvl import InternVLProcessor

    names = {"start_image": "<img>", "end_image": "</img>", "context_image": "<IMG_CONTEXT>", "video": "<video>"}
    for name, token in names.items():  # as the released tokenizer names them
        setattr(tokenizer, f"{name}_token", token)
        setattr(tokenizer, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
    return still(InternVLProcessor, images, tokenizer, image_seq_length=4)


def glm_tokenizer() -> Any:
    return byte_tokenizer(GLM_TOKENS, GLM, eos="<|endoftext|>", pad="<|endoftext|>")


def glm_config(model_type: str) -> Callable[..., Any]:
    def config(tokenizer: Any, **text: Any) -> Any:
        from transformers import AutoConfig

        partial = 1.0 if model_type == "glm4v" else 0.5
        section = [2, 3, 3] if partial == 1.0 else [1, 1, 2]
        rope = {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": partial,
            "mrope_section": section,
        }
        sizes = text_sizes(tokenizer, rope_parameters=rope)
        if model_type == "glm4v_moe":
            sizes |= {
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "n_shared_experts": 1,
                "moe_intermediate_size": 48,
            }
            sizes |= {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
        sizes |= text
        vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 14}
        vision |= {"spatial_merge_size": 2, "temporal_patch_size": 2, "image_size": 112, "attention_bias": False}
        vision["out_hidden_size"] = sizes["hidden_size"]
        names = {"image": "image", "video": "video", "image_start": "begin_of_image", "image_end": "end_of_image"}
        names |= {"video_start": "begin_of_video", "video_end": "end_of_video"}
        ids = {f"{k}_token_id": tokenizer.convert_tokens_to_ids(f"<|{v}|>") for k, v in names.items()}
        return AutoConfig.for_model(model_type, text_config=sizes, vision_config=vision, **ids)

    return config


def glm_image_processor(name: str) -> Callable[[], Any]:
    def make() -> Any:
        size = {"shortest_edge": 2 * 56 * 56, "longest_edge": 2 * 112 * 112}
        if name == "glm46v":
            from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil

            return Glm46VImageProcessorPil(size=size)
        from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

        return Glm4vImageProcessorPil(size=size)

    return make


def glm_processor(images: Any, tokenizer: Any) -> Any:
    from transformers.models.glm4v.processing_glm4v import Glm4vProcessor

    return still(Glm4vProcessor, images, tokenizer)


def smol_tokenizer() -> Any:
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    marks = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", *marks, *tiles)
    return byte_tokenizer(special, SMOL, eos="<end_of_utterance>", pad="<|endoftext|>")


def smol_config(tokenizer: Any, **text: Any) -> Any:
    """Tiles of 28 pixels, four tokens each."""
    from transformers import SmolVLMConfig

    sizes = {"model_type": "llama", **text_sizes(tokenizer), **text}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 7}
    token = tokenizer.convert_tokens_to_ids("<image>")
    return SmolVLMConfig(text_config=sizes, vision_config=vision, image_token_id=token, scale_factor=2)


def smol_image_processor() -> Any:
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil as Processor

    return Processor(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})


class SmolProcessor:
    """The released processor's text and pictures by its own functions, as creating it needs num2words."""

    def __init__(self, images: Any, tokenizer: Any) -> None:
        self.images, self.tokenizer = images, tokenizer

    def __call__(
        self, text: list[str], images: Any = None, return_tensors: str = "pt", **options: Any
    ) -> dict[str, Any]:
        from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

        made: dict[str, Any] = {}
        (rendered,) = text
        if images is not None:
            out = self.images(images, return_row_col_info=True, return_tensors=return_tensors)
            made = {"pixel_values": out["pixel_values"], "pixel_attention_mask": out["pixel_attention_mask"]}
            for row, column in zip(out["rows"][0], out["cols"][0], strict=True):
                tokens = ("<fake_token_around_image>", "<image>", "<global-img>")
                place = get_image_prompt_string(int(row), int(column), 4, *tokens)
                rendered = rendered.replace("<image>", place.replace("<image>", "\0"), 1)
            rendered = rendered.replace("\0", "<image>")
        return made | {"input_ids": self.tokenizer(rendered, return_tensors=return_tensors, **options)["input_ids"]}


@dataclass(frozen=True)
class Build:
    """How to build a family's folder, and what the contract needs to know of the family."""

    tokenizer: Callable[[], Any]
    config: Callable[..., Any]  # (tokenizer, **changes of the text config)
    image_processor: Callable[[], Any]
    processor: Callable[[Any, Any], Any]  # released: (image processor, tokenizer)
    extra_eos: tuple[str, ...] = ()
    tolerance: float = 1e-5  # of log-probs, relative and absolute
    idle: tuple[str, ...] = field(default=())  # parameters that no forward of pictures and text reads, by part of name


_QWEN = {"tokenizer": qwen_tokenizer, "processor": qwen_processor, "extra_eos": ("<|endoftext|>",)}
_THINKING = _QWEN | {"tokenizer": thinking_tokenizer}
_CLIP_IDLE = ("vision_tower.encoder.layers.2.", "post_layernorm", "vision_model.encoder.layers.2.")
BUILDS: dict[str, Build] = {
    "qwen2_vl": Build(config=qwen_config("qwen2_vl"), image_processor=qwen_image_processor(14), **_QWEN),
    "qwen2_5_vl": Build(config=qwen_config("qwen2_5_vl"), image_processor=qwen_image_processor(14), **_QWEN),
    "qwen3_vl": Build(config=qwen_config("qwen3_vl"), image_processor=qwen_image_processor(16), **_QWEN),
    "qwen3_vl_moe": Build(
        config=qwen_config("qwen3_vl_moe"), image_processor=qwen_image_processor(16), tolerance=3e-5, **_QWEN
    ),
    "qwen3_5": Build(config=qwen_config("qwen3_5"), image_processor=qwen_image_processor(16), **_THINKING),
    "qwen3_5_moe": Build(
        config=qwen_config("qwen3_5_moe"), image_processor=qwen_image_processor(16), tolerance=3e-5, **_THINKING
    ),
    "llava": Build(
        llama_tokenizer,
        llava_config("llava", "llama", CLIP, vision_feature_layer=-2, vision_feature_select_strategy="default"),
        clip_image_processor,
        llava_processor,
        idle=_CLIP_IDLE,
    ),
    "llava_next": Build(
        lambda: llama_tokenizer(MISTRAL),
        llava_config("llava_next", "mistral", CLIP, image_grid_pinpoints=PINPOINTS),
        tile_image_processor("llava_next"),
        next_processor,
        idle=_CLIP_IDLE,
    ),
    "llava_next_video": Build(
        llama_tokenizer,
        llava_config("llava_next_video", "llama", CLIP, image_grid_pinpoints=PINPOINTS),
        tile_image_processor("llava_next_video"),
        next_processor,
        idle=_CLIP_IDLE,
    ),
    "llava_onevision": Build(
        onevision_tokenizer,
        llava_config("llava_onevision", "qwen2", SIGLIP, image_grid_pinpoints=PINPOINTS),
        tile_image_processor("llava_onevision"),
        onevision_processor,
        idle=("post_layernorm", "vision_model.head"),
    ),
    "internvl": Build(intern_tokenizer, intern_config, intern_image_processor, intern_processor),
    "glm4v": Build(
        glm_tokenizer, glm_config("glm4v"), glm_image_processor("glm4v"), glm_processor, extra_eos=("<|user|>",)
    ),
    "glm4v_moe": Build(
        glm_tokenizer,
        glm_config("glm4v_moe"),
        glm_image_processor("glm4v"),
        glm_processor,
        extra_eos=("<|user|>",),
        tolerance=3e-5,
    ),
    "glm46v": Build(
        glm_tokenizer, glm_config("glm46v"), glm_image_processor("glm46v"), glm_processor, extra_eos=("<|user|>",)
    ),
    "smolvlm": Build(smol_tokenizer, smol_config, smol_image_processor, SmolProcessor),
}


def build_family(folder: Path, model_type: str, **text: Any) -> Path:
    """Write a random model of a family with its tokenizer and image processor; ``text`` changes its text config."""
    from transformers import AutoModelForImageTextToText

    build = BUILDS[model_type]
    tokenizer = build.tokenizer()
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(build.config(tokenizer, **text))
    with torch.no_grad():  # larger than the default initialisation, so that attention is not close to uniform
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):  # decays near 1: a memory that is forgotten at once could be dropped unseen
                parameter.sub_(4)
            elif parameter.ndim > 1:
                parameter.mul_(4)
            else:  # norms and biases: none stays at one or zero, where a dropped one would not show
                parameter.add_(0.2 * torch.randn_like(parameter))
    ends = (tokenizer.eos_token, *build.extra_eos)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(list(ends))
    model.generation_config.do_sample = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    build.image_processor().save_pretrained(folder)
    return folder


class Oracle:
    """transformers' own model and processor of a folder: what a policy must agree with."""

    def __init__(self, folder: Path, model_type: str) -> None:
        from transformers import AutoModelForImageTextToText, AutoTokenizer

        build = BUILDS[model_type]
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.tokenizer = tokenizer
        self.processor = build.processor(build.image_processor(), tokenizer)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        self.model.eval()

    def inputs(
        self, rendered: str, images: Sequence[Image.Image], answer: Sequence[int] = (), **options: Any
    ) -> dict[str, Any]:
        """The released processor's tensors for a rendered prompt and its pictures, followed by an answer's ids.
        ``options`` go to its tokenizer."""
        given: dict[str, Any] = {"images": [list(images)]} if images else {}
        made = dict(self.processor(text=[rendered], return_tensors="pt", **given, **options))
        more = torch.tensor([list(answer)], dtype=torch.int64)
        made["input_ids"] = torch.cat([made["input_ids"], more], 1)
        made["attention_mask"] = torch.ones_like(made["input_ids"])
        if "mm_token_type_ids" in made:
            made["mm_token_type_ids"] = torch.cat([made["mm_token_type_ids"], torch.zeros_like(more)], 1)
        return made

    def logp(self, rendered: str, images: Sequence[Image.Image], answer: torch.Tensor) -> torch.Tensor:
        """Log-probs [T] of an answer's tokens, by one plain forward."""
        if hasattr(self.model.model, "rope_deltas"):
            self.model.model.rope_deltas = None
        logits = self.model(**self.inputs(rendered, images, answer.tolist()), use_cache=False).logits[0]
        return logits[-len(answer) - 1 : -1].log_softmax(-1).gather(1, answer[:, None])[:, 0]

    def generate(self, rendered: str, images: Sequence[Image.Image], steps: int, suppressed: Sequence[int]) -> Any:
        """New tokens [T] of greedy ``generate``."""
        given = self.inputs(rendered, images)
        out = self.model.generate(**given, max_new_tokens=steps, do_sample=False, suppress_tokens=list(suppressed))
        return out[0, given["input_ids"].shape[1] :]
