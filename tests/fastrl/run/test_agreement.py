"""The gap between a server's log-probs and the trainer's: what is accepted, per server and over ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fastrl.batch import Completion, Prompt, PromptGroup, pack_row
from fastrl.config.sections import RolloutRecipe
from fastrl.run.agreement import Agreement, Gap, excess


def rollout(**changes: Any) -> RolloutRecipe:
    return RolloutRecipe(backend="vllm", server="http://a:1", allow_truncated_sampling=True, **changes)  # type: ignore[call-arg]


def compared() -> Agreement:
    return Agreement(rollout(server_gap=0.1), tied=False, adapter=False)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [0.5, 0.2, 0.0, 0.3]),
        ({"top_p": 0.8}, [0.5, 0.2, 0.0, 0.3]),  # at temperature 1 the server's are those before truncation
        ({"temperature": 0.7}, [0.5, 0.2, 0.0, 0.3]),
        ({"temperature": 0.7, "top_p": 0.8}, [0.5, 0.0, 0.0, 0.3 + math.log(0.8)]),
        ({"temperature": 0.7, "top_k": 4}, [0.5, 0.0, 0.0, 0.0]),
    ],
)
def test_truncation_makes_a_server_s_log_probs_larger_by_a_known_amount(
    changes: dict[str, Any], expected: list[float]
) -> None:
    trainer = torch.full((4,), -2.0)
    found = excess(trainer + torch.tensor([-0.5, 0.2, 0.0, 0.3]), trainer, rollout(**changes))
    torch.testing.assert_close(found, torch.tensor(expected))


def batch_of(*answers: tuple[str, list[float]]) -> Any:
    """One group whose answers have these samplers and log-probs."""
    prompt = Prompt(torch.tensor([5, 6]), torch.arange(2)[None])
    made = [
        Completion(torch.full((len(logp),), 7), sampler=sampler, sampler_logp=torch.tensor(logp))
        for sampler, logp in answers
    ]
    return pack_row([PromptGroup(prompt, made)])


def test_each_server_is_judged_by_its_own_tokens() -> None:
    agreement = compared()
    batch = batch_of(("http://a:1", [-1.0, -1.0]), ("", [-9.0]), ("http://b:1", [-1.5]), ("http://a:1", [-1.2]))
    agreement.add(torch.full((5,), -1.0), batch)
    agreement.add(torch.tensor([-1.0, torch.inf, -1.0, -1.0, -1.0]), batch)  # not evaluated
    found = agreement.take()
    assert found["http://a:1"] == pytest.approx(Gap(0.4, 5))
    assert found["http://b:1"] == pytest.approx(Gap(1.0, 2))
    assert agreement.take() == {}
    assert "http://b:1 does not sample" in agreement.fault([found])


def test_ranks_are_added_up_and_the_reason_says_what_was_before() -> None:
    agreement = compared()
    few, many = {"http://a:1": Gap(1.0, 1)}, {"http://a:1": Gap(0.0, 99)}
    assert agreement.fault([few, many]) == ""
    said = agreement.fault([few, few])
    assert "over 2 tokens its log-probs differ from the trainer's by 1 on average" in said
    assert "After an earlier push it was 0.01, so it has probably not taken all or some of the pushed weights" in said
    assert "does it serve the folder model.path" in compared().fault([few])
    assert "does not sample" in compared().fault([{"http://a:1": Gap(math.nan, 3)}])
    tied = Agreement(rollout(), tied=True, adapter=False)
    assert tied.fault([many]) == ""
    assert "ties to its embedding" in tied.fault([few])
    adapter = Agreement(rollout(), tied=True, adapter=True)
    assert adapter.fault([many]) == ""
    assert "not taken the adapter. Start" in adapter.fault([few])
