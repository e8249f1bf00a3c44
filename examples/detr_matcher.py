"""A DETR trained by transformers, its matcher replaced: the same loss, without a copy of the costs to the host.

The model is a tiny one with random weights; for your own, only the line that replaces the matcher is needed::

    python examples/detr_matcher.py
"""

from __future__ import annotations

import torch
import transformers.loss.loss_for_object_detection as detr_loss
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

from fastrl_kernels.integrations.detr import HungarianMatcher


def tiny_detr() -> DetrForObjectDetection:
    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 20, "num_labels": 5}
    config = DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone,
        dropout=0.0, **layers, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    model = DetrForObjectDetection(config)
    torch.nn.init.normal_(model.model.query_position_embeddings.weight)  # queries that answer differently
    return model


def main() -> tuple[float, float]:
    """The loss of one batch with transformers' matcher, and with this one."""
    model = tiny_detr()
    pixels = torch.randn(2, 3, 64, 64)
    labels = [{"class_labels": torch.randint(0, 5, (k,)), "boxes": torch.rand(k, 4) * 0.5 + 0.2} for k in (3, 6)]
    before = model(pixel_values=pixels, labels=labels).loss.item()

    detr_loss.HungarianMatcher = HungarianMatcher  # where the model's loss looks for it

    after = model(pixel_values=pixels, labels=labels).loss.item()
    print(f"loss with transformers' matcher {before:.6f}, with the batched one {after:.6f}")
    return before, after


if __name__ == "__main__":
    main()
