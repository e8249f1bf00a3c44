"""Kernels for RL post-training of perception MLLMs: Triton on a GPU, eager torch or C++ with the same results on a CPU.

``from fastrl_kernels import *`` imports the library's functions and result types; the eager twins are in
``fastrl_kernels.reference``.
"""

from fastrl_kernels.bias_activation import bias_activation
from fastrl_kernels.cross_entropy import cross_entropy, linear_cross_entropy
from fastrl_kernels.decode_attention import decode_attention
from fastrl_kernels.decode_layer import add_rms_norm, rope_append
from fastrl_kernels.detection_reward import DetectionReward, detection_reward
from fastrl_kernels.gated import gelu_mul, silu_mul
from fastrl_kernels.group_advantage import GroupAdvantage, group_advantage
from fastrl_kernels.linear_assignment import Assignment, linear_assignment
from fastrl_kernels.linear_logprob import LogProb, linear_logprob
from fastrl_kernels.linear_policy_loss import LinearPolicyLoss, linear_policy_loss
from fastrl_kernels.listwise_loss import listwise_loss
from fastrl_kernels.lora import lora_update
from fastrl_kernels.pairwise_iou import pairwise_iou
from fastrl_kernels.policy_loss import PolicyLoss, policy_loss
from fastrl_kernels.prefix_attention import prefix_attention
from fastrl_kernels.rms_norm import ResidualNorm, residual_rms_norm, rms_norm
from fastrl_kernels.rope import Rotated, RotatedSplit, qkv_rope, rope
from fastrl_kernels.token_logprob import token_logprob
from fastrl_kernels.token_weights import token_weights
from fastrl_kernels.unlikelihood_loss import unlikelihood_loss

__all__ = [
    "Assignment",
    "DetectionReward",
    "GroupAdvantage",
    "LinearPolicyLoss",
    "LogProb",
    "PolicyLoss",
    "ResidualNorm",
    "Rotated",
    "RotatedSplit",
    "add_rms_norm",
    "bias_activation",
    "cross_entropy",
    "decode_attention",
    "detection_reward",
    "gelu_mul",
    "group_advantage",
    "linear_assignment",
    "linear_cross_entropy",
    "linear_logprob",
    "linear_policy_loss",
    "listwise_loss",
    "lora_update",
    "pairwise_iou",
    "policy_loss",
    "prefix_attention",
    "qkv_rope",
    "residual_rms_norm",
    "rms_norm",
    "rope",
    "rope_append",
    "silu_mul",
    "token_logprob",
    "token_weights",
    "unlikelihood_loss",
]
