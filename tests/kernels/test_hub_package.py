"""The hub package: loaded from outside ``sys.path``, twice under two versions, beside the installed package."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "kernels"

LOADED = """
import importlib.util, json, pathlib, pkgutil, sys

sys.modules["fastrl_kernels"] = None  # whoever imports the installed package fails
import torch


def load(folder):
    identity = json.loads((folder / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(identity, folder / "__init__.py")
    module = sys.modules[identity] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for info in pkgutil.iter_modules(module.__path__):  # every module, not only what __init__ wants
        __import__(f"{identity}.{info.name}")
    return identity, module


one, two = (load(pathlib.Path(folder)) for folder in sys.argv[1:])
assert one[0] != two[0]
torch.manual_seed(0)
hidden, weight = torch.randn(7, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
target, completion = torch.randint(30, (7,)), torch.tensor([0, 0, 1, 1, 1, 2, 2])
plain = (hidden @ weight.T).log_softmax(-1).gather(1, target[:, None])[:, 0]
for identity, kernels in (one, two):
    out = kernels.linear_logprob(hidden, weight, target)
    torch.testing.assert_close(out.logp, plain)
    loss = kernels.policy_loss(out.logp, torch.tensor([1.0, -1.0, 0.5]), completion).loss
    gradient = torch.autograd.grad(loss, [hidden, weight])
    expected = torch.autograd.grad(-(torch.tensor([1.0, -1.0, 0.5])[completion] * plain).mean(), [hidden, weight],
                                   retain_graph=True)
    torch.testing.assert_close(gradient, expected)
    assert kernels.linear_assignment(torch.eye(3)[None], maximize=True).match.tolist() == [[0, 1, 2]]
    boxes = torch.tensor([[[0.0, 0.0, 2.0, 2.0]]])
    assert kernels.pairwise_iou(boxes, boxes).tolist() == [[[1.0]]]
    assert kernels.reference.policy_loss_reference is not None
    names = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names()
             if name.startswith(identity + "::")}
    assert {"linear_logprob", "linear_logprob_backward", "policy_loss"} <= names, names
assert one[1].linear_logprob is not two[1].linear_logprob
assert not [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastrl::")]
print("loaded twice")
"""


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_hub_package", KERNELS / "make_hub_package.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_versions_share_a_process(maker: ModuleType, tmp_path: Path) -> None:
    folders = [str(maker.make(tmp_path / f"v{version}", version=version)[0]) for version in (1, 2)]
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *folders], cwd=tmp_path, capture_output=True, text=True, env={"PATH": ""}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "loaded twice\n"


def test_the_project_is_what_the_builder_takes(maker: ModuleType, tmp_path: Path) -> None:
    import tomllib

    import fastrl_kernels

    builds = maker.make(tmp_path, version=3, repo_id="someone/theirs")
    general = tomllib.loads((tmp_path / "build.toml").read_text())["general"]
    assert (general["name"], general["version"], general["hub"]["repo-id"]) == ("fastrl-kernels", 3, "someone/theirs")
    source = {path.name for path in (tmp_path / "torch-ext" / "fastrl_kernels").iterdir()}
    assert "linear_logprob.py" in source
    assert "_ops.py" not in source  # the builder writes its own
    for backend, build in zip(general["backends"], builds, strict=True):
        assert build.name == f"torch-{backend}"
        assert {path.name for path in build.iterdir()} == source | {"_ops.py", "metadata.json"}
        metadata = json.loads((build / "metadata.json").read_text())
        assert metadata["backend"] == {"type": backend}
        assert metadata["id"] in (build / "_ops.py").read_text()
    card = (tmp_path / "CARD.md").read_text()
    assert 'get_kernel("someone/theirs", version=3)' in card
    for name in fastrl_kernels.__all__:
        assert name[0].isupper() or f"`{name}`" in card


def test_the_same_sources_give_the_same_build(maker: ModuleType, tmp_path: Path) -> None:
    one, two = (maker.make(tmp_path / name) for name in "ab")
    assert one[0].joinpath("_ops.py").read_text() == two[0].joinpath("_ops.py").read_text()
    (tmp_path / "a" / "build" / "torch-cpu" / "gone.py").write_text("")
    maker.make(tmp_path / "a")
    assert not (tmp_path / "a" / "build" / "torch-cpu" / "gone.py").exists()


@pytest.mark.parametrize(
    "line", ["import fastrl_kernels.token_logprob", 'x = "fastrl::op" + name', 'import_module("fastrl_kernels")']
)
def test_what_would_name_the_installed_package_is_refused(maker: ModuleType, line: str) -> None:
    with pytest.raises(ValueError, match=r"some\.py, line 3: .* names the installed package|expected the line"):
        maker.relative(f'"""Of fastrl_kernels."""\n\n{line}\n', "some.py")


def test_the_hubs_own_loader_takes_it(maker: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("kernels._rust", reason="the kernels library is not installed")
    from kernels import get_local_kernel

    maker.make(tmp_path)
    module = get_local_kernel(tmp_path, backend="cpu")
    assert module.linear_logprob.__module__.startswith("_fastrl_kernels_cpu_")
