"""GRPO for boxes in a plain torch loop, on these kernels alone: sample, reward, advantage, log-probs, loss, step.

The policy is a toy that draws four coordinates for a picture's features; replace it by your own model: the kernels only
need its hidden states [N, H] and the head's weight [V, H]. Runs in seconds on a CPU, and unchanged on a GPU::

    python examples/torch_loop.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastrl_kernels import detection_reward, group_advantage, linear_logprob, policy_loss

GRID, GROUP, STEPS = 16, 32, 200  # coordinates are 0..15; answers per picture
COORDINATES = 4  # x1, y1, x2, y2, a token each


class Policy(nn.Module):
    """Hidden states of the four coordinates of a picture's box, and the head that makes logits of them."""

    def __init__(self, features: int, size: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(features, 4 * size), nn.ReLU(), nn.Linear(4 * size, COORDINATES * size))
        self.head = nn.Linear(size, GRID, bias=False)

    def hidden(self, pictures: Tensor) -> Tensor:
        """[pictures, 4, size]."""
        return self.body(pictures).unflatten(-1, (COORDINATES, -1))


def make_pictures(count: int) -> tuple[Tensor, Tensor]:
    """Boxes [count, 4] with integer coordinates, and features [count, 64] from which they can be predicted."""
    corner, size = torch.randint(0, GRID // 2, (count, 2)), torch.randint(2, GRID // 2, (count, 2))
    boxes = torch.cat([corner, corner + size], 1)
    return nn.functional.one_hot(boxes, GRID).float().flatten(1), boxes.float()


def main() -> tuple[float, float]:
    """Train; returns the mean reward of the first ten steps and of the last ten."""
    torch.manual_seed(0)
    policy = Policy(COORDINATES * GRID)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-3)
    history = []
    for step in range(STEPS):
        pictures, boxes = make_pictures(8)

        with torch.no_grad():  # GROUP answers to every picture
            probabilities = policy.head(policy.hidden(pictures)).softmax(-1)
            tokens = torch.multinomial(probabilities.flatten(0, 1), GROUP, replacement=True)  # [8 * 4, GROUP]
            answers = tokens.view(8, COORDINATES, GROUP).transpose(1, 2)  # [8, GROUP, 4]

        one = torch.ones(8 * GROUP, dtype=torch.int64)  # a predicted and a true box per answer
        truth = boxes.repeat_interleave(GROUP, 0)[:, None]
        reward = detection_reward(answers.flatten(0, 1)[:, None].float(), truth, one, one, threshold=0.0).quality[:, 0]
        advantage = group_advantage(reward, GROUP).advantage

        hidden = policy.hidden(pictures).repeat_interleave(GROUP, 0).flatten(0, 1)  # [8 * GROUP * 4, size]
        logp = linear_logprob(hidden, policy.head.weight, answers.flatten()).logp
        completion = torch.arange(8 * GROUP).repeat_interleave(COORDINATES)
        loss = policy_loss(logp, advantage, completion, aggregate="sequence").loss

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(reward.mean().item())
        if step % 40 == 0:
            print(f"step {step:3}: mean IoU {history[-1]:.3f}")
    first, last = sum(history[:10]) / 10, sum(history[-10:]) / 10
    print(f"mean IoU of the first ten steps {first:.3f}, of the last ten {last:.3f}")
    return first, last


if __name__ == "__main__":
    main()
