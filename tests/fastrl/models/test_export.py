"""``fastrl export``: the output loads as a standard folder; nothing is uploaded without the option."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastrl.cli.export import export as command
from fastrl.models import Policy, load_policy
from fastrl.models.export import Exported, export, find_source, push
from fastrl.models.lora import merged_state_dict

Folder = Callable[[str], Path]


def adapted(folder: Path, **kind: Any) -> Policy:
    policy = load_policy(folder, device="cpu", lora={"rank": 4, **kind})
    with torch.no_grad():
        for name, parameter in policy.core.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    return policy


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16", "float32"])
def test_a_folder_is_cast_and_otherwise_the_same(tiny_folder: Folder, tmp_path: Path, dtype: str | None) -> None:
    folder = tiny_folder("qwen2_5")
    made = export(folder, tmp_path / "deep" / "out", dtype=dtype)
    assert isinstance(made, Exported)
    assert {path.name for path in made.out.iterdir()} == {path.name for path in folder.iterdir()}
    before, after = weights(folder), weights(made.out)
    wanted = getattr(torch, dtype) if dtype is not None else torch.float32
    assert all(torch.equal(before[name].to(wanted), after[name]) for name in before)
    assert {t.dtype for t in after.values()} == {wanted}
    config = json.loads((made.out / "config.json").read_text())
    assert config["dtype"] == (dtype or "float32")
    policy = load_policy(made.out, device="cpu", dtype=wanted)
    assert policy.dtype == wanted
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_shards_keep_their_index(tiny_folder: Folder, tmp_path: Path) -> None:
    load_policy(tiny_folder("qwen2_5"), device="cpu").core.save_pretrained(tmp_path / "in", max_shard_size="200KB")
    made = export(tmp_path / "in", tmp_path / "out", dtype="bfloat16")
    (index,) = made.out.glob("*.index.json")
    stored = json.loads(index.read_text())
    assert len(set(stored["weight_map"].values())) > 1
    held = weights(made.out)
    assert set(stored["weight_map"]) == set(held)
    assert stored["metadata"]["total_size"] == sum(2 * t.numel() for t in held.values())


@pytest.mark.parametrize("kind", [{}, {"dora": True, "also_train": ["projector"]}], ids=["lora", "dora"])
def test_adapters_are_merged_into_their_base(tiny_folder: Folder, tmp_path: Path, kind: dict[str, Any]) -> None:
    policy = adapted(tiny_folder("qwen2_5"), **kind)
    policy.save_adapter(tmp_path / "adapter")
    made = export(tmp_path / "adapter", tmp_path / "out")
    assert made.merged
    expected, found = merged_state_dict(policy.core), load_policy(made.out, device="cpu").core.state_dict()
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    moved = {**settings, "base_model_name_or_path": "gone/away"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(moved))
    with pytest.raises(FileNotFoundError, match="gone/away"):
        export(tmp_path / "adapter", tmp_path / "other")
    again = export(tmp_path / "adapter", tmp_path / "other", base=tiny_folder("qwen2_5"))
    assert weights(again.out).keys() == weights(made.out).keys()


def test_a_run_is_its_last_or_its_best_checkpoint(tiny_folder: Folder, tmp_path: Path) -> None:
    run, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    (checkpoints / "step-00000004").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no checkpoint yet"):
        export(run, tmp_path / "out")
    (checkpoints / "step-00000004" / "model").symlink_to(tiny_folder("qwen2_5"))
    (run / "model").symlink_to(checkpoints / "step-00000004" / "model")
    assert find_source(run) == tiny_folder("qwen2_5").resolve()
    assert find_source(checkpoints / "step-00000004") == checkpoints / "step-00000004" / "model"
    with pytest.raises(FileNotFoundError, match="no best checkpoint"):
        find_source(run, best=True)
    (checkpoints / "best").symlink_to(checkpoints / "step-00000004")
    assert find_source(run, best=True) == tiny_folder("qwen2_5").resolve()
    assert find_source("tiny:perception").name == "perception"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bf16"}, "did you mean bfloat16"),
        ({"base": "tiny:perception"}, "has none"),
        ({"best": True}, "not the folder of a run"),
        ({"out": "full"}, "not empty"),
        ({"source": "empty"}, "model folder not found|not a model"),
        ({"source": "ia3"}, "only LORA"),
        ({"source": "huge", "dtype": "float16"}, "not finite in float16"),
        ({"source": "broken"}, "cannot be read"),
    ],
)
def test_what_cannot_be_exported_leaves_nothing(
    tiny_folder: Folder, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    for name in ("full", "ia3", "huge", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "ia3" / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    for name in ("huge", "broken"):
        (tmp_path / name / "config.json").write_text("{}")
    save_file({"a": torch.tensor([1e30])}, tmp_path / "huge" / "model.safetensors")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"no")
    before = sorted(tmp_path.rglob("*"))
    given = {"source": tiny_folder("qwen2_5"), "out": "new/out", **options}
    source = given.pop("source")
    source = tmp_path / source if isinstance(source, str) else source
    with pytest.raises((ValueError, OSError), match=message):
        export(source, tmp_path / given.pop("out"), **given)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("change", "said"), [("gone", "lack 1 of the model's: "), ("cut", "do not have the shapes")])
def test_a_model_that_lacks_a_weight_is_not_exported(
    tiny_folder: Folder, tmp_path: Path, change: str, said: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("qwen2_5"), folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "down_proj" in name)
    taken = weights.pop(name)
    if change == "cut":
        weights[name] = taken[:-1].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{folder}: its weights {said}.*down_proj"):
        export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Hub:
    """Replaces the hub's client and records its calls."""

    asked: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012
    refuses = False

    def create_repo(self, repo: str, **options: Any) -> None:
        if self.refuses:
            raise OSError("401: who are you?")
        self.asked.append(("create", {"repo": repo, **options}))

    def upload_folder(self, **options: Any) -> Any:
        files = sorted(path.name for path in Path(options["folder_path"]).iterdir())
        self.asked.append(("upload", {**options, "files": files}))
        return type("Commit", (), {"commit_url": f"https://example.com/{options['repo_id']}/commit/1"})()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    """No request leaves this process, as the client is replaced."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", never)
    monkeypatch.setattr(Hub, "asked", [])
    monkeypatch.setattr(Hub, "refuses", False)
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    return Hub


def run_command(source: Path, out: Path, **options: Any) -> None:
    given = {"dtype": None, "base": None, "best": False, "push": None, "public": False, "as_json": False}
    command(str(source), out, **{**given, **options})


def test_only_push_uploads(
    tiny_folder: Folder, tmp_path: Path, hub: type[Hub], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_folder("qwen2_5")
    run_command(folder, tmp_path / "kept")
    assert hub.asked == []
    run_command(folder, tmp_path / "out", dtype="bfloat16", push="me/my-model", as_json=True)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["pushed"] == "https://example.com/me/my-model/commit/1"
    (created, about), (uploaded, what) = hub.asked
    assert (created, about) == ("create", {"repo": "me/my-model", "private": True, "exist_ok": True})
    assert (uploaded, what["folder_path"]) == ("upload", str(tmp_path / "out"))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(what["files"])


def test_a_refused_upload_keeps_the_folder(tiny_folder: Folder, tmp_path: Path, hub: type[Hub]) -> None:
    hub.refuses = True
    with pytest.raises(ValueError, match=r"upload failed \(OSError: 401.*the model is in"):
        run_command(tiny_folder("qwen2_5"), tmp_path / "out", push="me/my-model")
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("repo", ["my-model", "a/b/c", "https://huggingface.co/a/b", "me/", ""])
def test_a_repository_has_an_owner_and_a_name(tiny_folder: Folder, tmp_path: Path, hub: type[Hub], repo: str) -> None:
    with pytest.raises(ValueError, match="owner/name"):
        run_command(tiny_folder("qwen2_5"), tmp_path / "out", push=repo)
    assert not (tmp_path / "out").exists()  # raised before the work
    with pytest.raises(ValueError, match="owner/name"):
        push(tiny_folder("qwen2_5"), repo)
    with pytest.raises(ValueError, match="--public needs --push"):
        run_command(tiny_folder("qwen2_5"), tmp_path / "out", public=True)
    assert hub.asked == []
