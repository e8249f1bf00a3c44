"""What is written for vLLM servers: a tied head also by its own name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastrl.models.load import load_policy
from fastrl.rollout.vllm_weights import HEAD, INDEX, Alone, WeightsFolder, _add_head


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_in_a_file_of_its_own(tied: bool, tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    policy = load_policy(tiny_folder("qwen2_5"), device="cpu")
    head = torch.nn.Parameter(policy.core.get_input_embeddings().weight.detach() + (0 if tied else 1))
    policy.core.get_output_embeddings().weight = policy.core.get_input_embeddings().weight if tied else head
    policy.core.config.tie_word_embeddings = policy.core.config.text_config.tie_word_embeddings = tied
    folder = WeightsFolder(policy, tmp_path, lambda: 3, Alone())
    written = folder.write()
    assert written.updates == 3
    together = load_file(written.path / "model.safetensors")
    assert ("lm_head.weight" in together) != tied
    found = load_file(written.path / HEAD) if tied else together
    assert torch.equal(found["lm_head.weight"], policy.head_weight)
    folder.remove(written)
    assert not list(tmp_path.iterdir())


def test_an_index_of_several_files_gets_the_head(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"a": "model-1.safetensors"}}))
    _add_head(tmp_path, {"lm_head.weight": torch.ones(2)})
    assert json.loads((tmp_path / INDEX).read_text())["weight_map"] == {
        "a": "model-1.safetensors",
        "lm_head.weight": HEAD,
    }
