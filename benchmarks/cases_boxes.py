"""Boxes: assignment, the DETR matcher, detection reward, pairwise GIoU.

Peers: a SciPy loop with the copies it needs, transformers' matcher, SciPy with torchvision-style box code as rule
rewards are usually written, and ``torch_linear_assignment`` where it is installed.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from benchmarks.case import Case, Inputs, Run, installed
from fastrl_kernels.detection_reward import detection_reward
from fastrl_kernels.integrations.detr import HungarianMatcher
from fastrl_kernels.linear_assignment import linear_assignment
from fastrl_kernels.pairwise_iou import pairwise_iou


def cases(size: str) -> list[Case]:
    """All cases of this file at one of ``SIZES``."""
    square, wide = {
        "tiny": ((3, 5, 5), (2, 9, 4)),
        "cpu": ((512, 32, 32), (16, 300, 20)),
        "gpu": ((208, 300, 300), (208, 300, 100)),
    }[size]
    small = {"tiny": (2, 4, 4), "cpu": (64, 100, 100), "gpu": (256, 32, 32)}[size]
    return [
        _assignment_case("uniform", square),
        _assignment_case("uniform wide", wide),
        _assignment_case("uniform small" if size == "gpu" else "uniform large", small),
        _assignment_case("box costs", wide, boxes=True),
        _matcher_case(size),
        _reward_case(size),
        _iou_case(size),
    ]


def host_rounds(problems: int) -> int | None:
    """Few rounds if a peer solves many problems one by one on the host, which takes seconds per call."""
    return 7 if problems > 32 and torch.cuda.is_available() else None


def random_boxes(*shape: int, device: torch.device) -> Tensor:
    """Boxes in a 700 x 700 pixel image, ``[..., 4]`` corners."""
    boxes = torch.rand(*shape, 4, device=device) * 500
    boxes[..., 2:] = boxes[..., :2] + 10 + boxes[..., 2:] * 0.4
    return boxes


def _assignment_case(name: str, shape: tuple[int, int, int], *, boxes: bool = False) -> Case:
    problems, n, m = shape

    def make(device: torch.device) -> Inputs:
        if not boxes:
            return {"cost": torch.rand(shape, device=device)}
        a, b = random_boxes(problems, n, device=device), random_boxes(problems, m, device=device)
        return {"cost": torch.cdist(a / 500, b / 500, p=1) - pairwise_iou(a, b)}  # as in matchers: few conflicts

    def ours(x: Inputs) -> tuple[Tensor, ...]:
        return (linear_assignment(x["cost"]).total,)

    def scipy_loop(x: Inputs) -> tuple[Tensor, ...]:
        costs = x["cost"].cpu().numpy()
        return (torch.tensor([c[linear_sum_assignment(c)].sum() for c in costs], device=x["cost"].device),)

    def batch_peer(x: Inputs) -> tuple[Tensor, ...]:
        from torch_linear_assignment import batch_linear_assignment  # pyright: ignore[reportMissingImports]

        match = batch_linear_assignment(x["cost"])
        picked = x["cost"].gather(2, match.clamp(min=0)[:, :, None])[:, :, 0]
        return (torch.where(match >= 0, picked, 0.0).sum(1),)

    there: Run | None = batch_peer if installed("torch_linear_assignment", gpu=True) else None
    return Case(
        name=f"linear_assignment/{name} {problems}x{n}x{m}", op="linear_assignment",
        shape={"problems": problems, "rows": n, "columns": m}, make=make, ours=ours,
        peers={"scipy": scipy_loop, "torch_linear_assignment": there}, bytes=4.0 * problems * n * m,
        rounds=host_rounds(problems),
    )  # fmt: skip


def _matcher_case(size: str) -> Case:
    """The whole matcher, costs included."""
    images, queries, truths, classes = {"tiny": (2, 8, 3, 5), "cpu": (16, 300, 20, 91), "gpu": (64, 300, 20, 91)}[size]

    def make(device: torch.device) -> Inputs:
        def boxes(*shape: int) -> Tensor:
            return torch.rand(*shape, 4, device=device) * 0.5 + 0.1

        labels = torch.randint(0, classes, (images, truths), device=device)
        return {
            "outputs": {
                "logits": torch.randn(images, queries, classes, device=device),
                "pred_boxes": boxes(images, queries),
            },
            "targets": [{"class_labels": labels[b], "boxes": boxes(truths)} for b in range(images)],
        }

    matcher = HungarianMatcher(1, 5, 2)

    def ours(x: Inputs) -> tuple[Tensor, ...]:
        return _joined(matcher(x["outputs"], x["targets"]))

    def theirs(x: Inputs) -> tuple[Tensor, ...]:
        from transformers.loss.loss_for_object_detection import HungarianMatcher as Theirs

        device = x["outputs"]["logits"].device
        return tuple(i.to(device) for i in _joined(Theirs(1, 5, 2)(x["outputs"], x["targets"])))

    return Case(
        name="detr matcher/with costs", op="linear_assignment+pairwise_iou",
        shape={"images": images, "queries": queries, "truths": truths, "classes": classes}, make=make, ours=ours,
        peers={"transformers": theirs}, bytes=4.0 * images * queries * (classes + 4), rounds=host_rounds(images),
    )  # fmt: skip


def _joined(matches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat([pair[side] for pair in matches]).double() for side in (0, 1))


def torchvision_iou(a: Tensor, b: Tensor) -> Tensor:
    """Pairwise IoU with broadcast temporaries, as torchvision writes it."""
    area_a = (a[:, 2] - a[:, 0]) * (a[:, 3] - a[:, 1])
    area_b = (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
    low, high = torch.max(a[:, None, :2], b[:, :2]), torch.min(a[:, None, 2:], b[:, 2:])
    side = (high - low).clamp(min=0)
    inter = side[..., 0] * side[..., 1]
    return inter / (area_a[:, None] + area_b - inter)


def usual_reward(x: Inputs, threshold: float = 0.5) -> tuple[Tensor, ...]:
    """Detection reward answer by answer: IoU table, SciPy's matching, then location, label, P, R, F1, missing."""
    out = []
    for b, (n, m) in enumerate(zip(x["n_pred"].tolist(), x["n_gt"].tolist(), strict=True)):
        table = torchvision_iou(x["pred"][b, :n], x["gt"][b, :m]).cpu()
        rows, cols = linear_sum_assignment(table.numpy(), maximize=True)
        quality = table[rows, cols]
        matched = quality > 0
        same = (x["pred_label"][b].cpu()[rows] == x["gt_label"][b].cpu()[cols]) & matched
        hits, count = int((quality >= threshold).sum()), max(int(matched.sum()), 1)
        location = float(quality[matched].sum()) / count
        out.append((location, int(same.sum()) / count, hits / n, hits / m, 2 * hits / (n + m), (hits - m) / m))
    return tuple(torch.tensor(out, device=x["pred"].device).unbind(1))


def _reward_case(size: str) -> Case:
    answers, n = {"tiny": (3, 4), "cpu": (512, 30), "gpu": (512, 30)}[size]

    def make(device: torch.device) -> Inputs:
        gt, pred = random_boxes(answers, n, device=device), random_boxes(answers, n, device=device)
        found = n * 2 // 3
        pred[:, :found] = gt[:, :found] + 8 * torch.randn(answers, found, 4, device=device)
        count = torch.full((answers,), n, device=device)
        labels = torch.randint(0, 3, (2, answers, n), device=device)
        return {
            "pred": pred, "gt": gt, "n_pred": count, "n_gt": count, "pred_label": labels[0], "gt_label": labels[1],
        }  # fmt: skip

    def ours(x: Inputs) -> tuple[Tensor, ...]:
        return tuple(detection_reward(**x))[2:]

    return Case(
        name="detection_reward/boxes with labels", op="detection_reward", shape={"answers": answers, "boxes": n},
        make=make, ours=ours, peers={"scipy + torchvision-style": usual_reward}, bytes=answers * n * (2 * 24 + 12.0),
        rounds=host_rounds(answers),
    )  # fmt: skip


def _iou_case(size: str) -> Case:
    batch, n, m = {"tiny": (2, 3, 5), "cpu": (16, 100, 300), "gpu": (256, 100, 300)}[size]

    def make(device: torch.device) -> Inputs:
        return {"a": random_boxes(batch, n, device=device), "b": random_boxes(batch, m, device=device)}

    def ours(x: Inputs) -> tuple[Tensor, ...]:
        return (pairwise_iou(x["a"], x["b"], kind="giou"),)

    def eager(x: Inputs) -> tuple[Tensor, ...]:
        a, b = x["a"][:, :, None], x["b"][:, None]
        side = (torch.min(a[..., 2:], b[..., 2:]) - torch.max(a[..., :2], b[..., :2])).clamp(min=0)
        inter = side[..., 0] * side[..., 1]
        area_a, area_b = ((c[..., 2] - c[..., 0]) * (c[..., 3] - c[..., 1]) for c in (a, b))
        union = area_a + area_b - inter
        side = torch.max(a[..., 2:], b[..., 2:]) - torch.min(a[..., :2], b[..., :2])
        hull = side[..., 0] * side[..., 1]
        return (inter / union - (hull - union) / hull,)

    return Case(
        name="pairwise_iou/giou", op="pairwise_iou", shape={"batch": batch, "n": n, "m": m}, make=make, ours=ours,
        peers={"torchvision-style": eager}, bytes=4.0 * batch * (n * m + 4 * (n + m)), graph=True,
    )  # fmt: skip
