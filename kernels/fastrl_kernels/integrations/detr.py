"""Batched matchers for transformers' DETR family: same constructors and results, no copy to the host.

transformers computes the cost of every query with the targets of all images of the batch, copies it to the CPU and
calls ``scipy.optimize.linear_sum_assignment`` for each image. Here costs are computed within each image only, and all
images are matched by one ``linear_assignment``. To use a matcher, put it where the model's loss looks it up::

    import transformers.loss.loss_for_object_detection as detr_loss
    from fastrl_kernels.integrations.detr import HungarianMatcher

    detr_loss.HungarianMatcher = HungarianMatcher

There are two differences: predicted boxes of negative width or height are not refused (that check would synchronise)
but count as empty, and the indices are on the device of the outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fastrl_kernels.linear_assignment import linear_assignment
from fastrl_kernels.pairwise_iou import pairwise_iou


class HungarianMatcher(nn.Module):
    """Replaces ``transformers.loss.loss_for_object_detection.HungarianMatcher`` (DETR, YOLOS, ...).

    Args:
        class_cost, bbox_cost, giou_cost: weights of minus the target's class probability, of the L1 distance of the
            boxes and of minus their GIoU. Not all 0.

    Raises:
        ValueError: all weights are 0.
    """

    def __init__(self, class_cost: float = 1, bbox_cost: float = 1, giou_cost: float = 1) -> None:
        super().__init__()
        if class_cost == 0 and bbox_cost == 0 and giou_cost == 0:
            raise ValueError("class_cost, bbox_cost, giou_cost: at least one must not be 0")
        self.class_cost = class_cost
        self.bbox_cost = bbox_cost
        self.giou_cost = giou_cost

    @torch.no_grad()
    def forward(self, outputs: dict[str, Tensor], targets: list[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Match queries to targets, image by image.

        Args:
            outputs: ``"logits"`` ``[B, Q, classes]`` and ``"pred_boxes"`` ``[B, Q, 4]`` (centre x, centre y, width,
                height).
            targets: per image ``"class_labels"`` ``[T]`` int64 and ``"boxes"`` ``[T, 4]``, of the outputs' device.

        Returns:
            Per image (queries, targets), int64 of length min(Q, T), queries ascending. A query whose cost is NaN or
            infinite is taken only where no other is left.
        """
        logits, boxes = outputs["logits"], outputs["pred_boxes"]
        sizes = [len(target["boxes"]) for target in targets]
        labels = pad_sequence([target["class_labels"] for target in targets], batch_first=True)
        wanted = pad_sequence([target["boxes"] for target in targets], batch_first=True)
        # Counted on the device: a list of sizes would have to be copied there.
        counts = pad_sequence([torch.ones_like(target["class_labels"]) for target in targets], batch_first=True).sum(1)
        gather = labels[:, None, :].expand(-1, logits.shape[1], -1)
        cost = self.class_cost * self._class_cost(logits, gather)
        cost = cost + self.bbox_cost * torch.cdist(boxes, wanted.to(boxes.dtype), p=1)
        overlap = pairwise_iou(_corners(boxes), _corners(wanted.to(boxes.dtype)), kind="giou")
        return _match(cost - self.giou_cost * overlap, counts, sizes)

    def _class_cost(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cost of each query for each target's class: ``[B, Q, T]`` from labels expanded to that shape."""
        return -logits.softmax(-1).gather(2, labels)


class DeformableDetrHungarianMatcher(HungarianMatcher):
    """Replaces ``transformers.loss.loss_deformable_detr.DeformableDetrHungarianMatcher``: focal class cost."""

    alpha = 0.25
    gamma = 2.0

    def _class_cost(self, logits: Tensor, labels: Tensor) -> Tensor:
        prob = logits.sigmoid().gather(2, labels)
        negative = (1 - self.alpha) * prob**self.gamma * -(1 - prob + 1e-8).log()
        positive = self.alpha * (1 - prob) ** self.gamma * -(prob + 1e-8).log()
        return positive - negative


class RTDetrHungarianMatcher(DeformableDetrHungarianMatcher):
    """Replaces ``transformers.loss.loss_rt_detr.RTDetrHungarianMatcher`` (RT-DETR); takes its config.

    D-FINE's loss imports this name; for D-FINE, patch ``transformers.loss.loss_d_fine.RTDetrHungarianMatcher`` too.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config.matcher_class_cost, config.matcher_bbox_cost, config.matcher_giou_cost)
        self.use_focal_loss = config.use_focal_loss
        self.alpha = config.matcher_alpha
        self.gamma = config.matcher_gamma

    def _class_cost(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.use_focal_loss:
            return super()._class_cost(logits, labels)
        return HungarianMatcher._class_cost(self, logits, labels)


class Mask2FormerHungarianMatcher(nn.Module):
    """Replaces ``transformers.models.mask2former.modeling_mask2former.Mask2FormerHungarianMatcher``: masks at points.

    Draws the same points from torch's generator as the original. EoMT, VideoMT and OneFormer use the same cost, but
    their classes have other names.

    Args:
        cost_class, cost_mask, cost_dice: weights of minus the target's class probability, of the masks' binary
            cross-entropy and of their Dice loss. Not all 0.
        num_points: points of an image at which masks are compared.

    Raises:
        ValueError: all weights are 0.
    """

    def __init__(
        self, cost_class: float = 1.0, cost_mask: float = 1.0, cost_dice: float = 1.0, num_points: int = 12544
    ) -> None:
        super().__init__()
        if cost_class == 0 and cost_mask == 0 and cost_dice == 0:
            raise ValueError("cost_class, cost_mask, cost_dice: at least one must not be 0")
        self.cost_class, self.cost_mask, self.cost_dice = cost_class, cost_mask, cost_dice
        self.num_points = num_points

    @torch.no_grad()
    def forward(
        self,
        masks_queries_logits: Tensor,
        class_queries_logits: Tensor,
        mask_labels: list[Tensor],
        class_labels: list[Tensor],
    ) -> list[tuple[Tensor, Tensor]]:
        """Match queries to targets, image by image.

        Args:
            masks_queries_logits: ``[B, Q, h, w]``.
            class_queries_logits: ``[B, Q, classes + 1]``.
            mask_labels: per image ``[T, H, W]`` of zeros and ones, of any dtype and size.
            class_labels: per image ``[T]`` int64.

        Returns:
            Per image (queries, targets), int64 of length min(Q, T), queries ascending.
        """
        images, device, kind = len(mask_labels), masks_queries_logits.device, masks_queries_logits.dtype
        # one by one, like the original
        draws = [torch.rand(1, self.num_points, 2, device=device) for _ in range(images)]
        points = torch.cat(draws).to(kind) if draws else torch.empty(0, self.num_points, 2, device=device, dtype=kind)
        masks = _at_points(masks_queries_logits, points)  # [B, Q, P]
        wanted = pad_sequence(
            [_at_points(m.to(masks)[None], points[b : b + 1])[0] for b, m in enumerate(mask_labels)], batch_first=True
        )  # [B, T, P]
        counts = pad_sequence([torch.ones_like(c) for c in class_labels], batch_first=True).sum(1)
        labels = pad_sequence(list(class_labels), batch_first=True)
        labels = labels[:, None, :].expand(-1, masks.shape[1], -1)
        cost = -self.cost_class * class_queries_logits.softmax(-1).gather(2, labels)
        # cross-entropy of x with y in {0, 1} (or between): softplus(x) - x y
        there, weight = wanted.transpose(1, 2), 1 / self.num_points
        cost = cost + self.cost_mask * (nn.functional.softplus(masks).sum(2, keepdim=True) - masks @ there) * weight
        inside = masks.sigmoid()
        sizes = inside.sum(2)[:, :, None] + wanted.sum(2)[:, None, :]
        cost = cost + self.cost_dice * (1 - (2 * inside @ there + 1) / (sizes + 1))
        return _match(cost, counts, [len(c) for c in class_labels])


def _at_points(masks: Tensor, points: Tensor) -> Tensor:
    """``masks`` [B, M, h, w] interpolated at ``points`` [B, P, 2] in [0, 1]: [B, M, P]."""
    grid = 2 * points[:, None] - 1
    return nn.functional.grid_sample(masks, grid, align_corners=False)[:, :, 0]


def _match(cost: Tensor, counts: Tensor, sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    """(queries, targets) of each image from costs [B, Q, T], of which ``counts`` [B] columns are real."""
    match = linear_assignment(_last_resort(cost, counts), n_cols=counts).match
    queries = (match < 0).to(torch.uint8).argsort(dim=1, stable=True)  # matched queries first, in order
    chosen = match.gather(1, queries)
    taken = [min(size, cost.shape[1]) for size in sizes]
    return [(queries[b, :k], chosen[b, :k]) for b, k in enumerate(taken)]


def _corners(boxes: Tensor) -> Tensor:
    """(centre, size) to corners."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat((centre - half, centre + half), -1)


def _last_resort(cost: Tensor, counts: Tensor) -> Tensor:
    """Replace non-finite costs by one that exceeds any set of finite pairs, on the scale of the finite costs."""
    if cost.shape[2] == 0:
        return cost
    inside = torch.arange(cost.shape[2], device=cost.device) < counts[:, None, None]
    finite = cost.isfinite()
    usable = finite & inside
    top = torch.where(usable, cost, -torch.inf).amax((1, 2), keepdim=True)
    bottom = torch.where(usable, cost, torch.inf).amin((1, 2), keepdim=True)
    spread = torch.where(top >= bottom, top - bottom, 0.0)
    dear = torch.where(top >= bottom, top, 0.0) + spread * min(cost.shape[1:]) + 1
    return torch.where(finite, cost, dear)
