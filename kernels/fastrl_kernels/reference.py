"""The eager twins in plain torch: the CPU path of most kernels and the reference in tests. All accept float64."""

from fastrl_kernels.bias_activation import bias_activation_reference
from fastrl_kernels.cross_entropy import cross_entropy_reference, linear_cross_entropy_reference
from fastrl_kernels.decode_attention import decode_attention_reference
from fastrl_kernels.decode_layer import add_rms_norm_reference, rope_append_reference
from fastrl_kernels.detection_reward import detection_reward_reference
from fastrl_kernels.gated import gelu_mul_reference, silu_mul_reference
from fastrl_kernels.group_advantage import group_advantage_reference
from fastrl_kernels.linear_assignment import linear_assignment_reference
from fastrl_kernels.linear_logprob import linear_logprob_reference
from fastrl_kernels.linear_policy_loss import linear_policy_loss_reference
from fastrl_kernels.listwise_loss import listwise_loss_reference
from fastrl_kernels.lora import lora_update_reference
from fastrl_kernels.pairwise_iou import pairwise_iou_reference
from fastrl_kernels.policy_loss import policy_loss_reference
from fastrl_kernels.prefix_attention import prefix_attention_reference
from fastrl_kernels.rms_norm import residual_rms_norm_reference, rms_norm_reference
from fastrl_kernels.rope import qkv_rope_reference, rope_reference
from fastrl_kernels.token_logprob import token_logprob_reference
from fastrl_kernels.unlikelihood_loss import unlikelihood_loss_reference

__all__ = [
    "add_rms_norm_reference",
    "bias_activation_reference",
    "cross_entropy_reference",
    "decode_attention_reference",
    "detection_reward_reference",
    "gelu_mul_reference",
    "group_advantage_reference",
    "linear_assignment_reference",
    "linear_cross_entropy_reference",
    "linear_logprob_reference",
    "linear_policy_loss_reference",
    "listwise_loss_reference",
    "lora_update_reference",
    "pairwise_iou_reference",
    "policy_loss_reference",
    "prefix_attention_reference",
    "qkv_rope_reference",
    "residual_rms_norm_reference",
    "rms_norm_reference",
    "rope_append_reference",
    "rope_reference",
    "silu_mul_reference",
    "token_logprob_reference",
    "unlikelihood_loss_reference",
]
