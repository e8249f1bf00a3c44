"""A method, a reward and a data format from files outside the package: registered, named in a recipe, trained."""

from __future__ import annotations

import ast
import importlib.util
import json
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

import pytest
import torch

import fastrl
import fastrl.data
import fastrl.methods
import fastrl.rewards
from fastrl.data import DataError, load_data
from fastrl.methods import Method, MethodOptions, PerPO, Prepared
from fastrl.recipe import RecipeError, build_recipe, load_recipe
from fastrl.rewards import GroundingReward, Reward, reward_for
from fastrl.trainer import train

METHOD = '''
"""Best of n: likelihood of the answer with the highest reward."""

from typing import ClassVar, Literal

from fastrl.methods import Method, MethodOptions, Prepared
from fastrl.methods.base import likelihood_loss, set_token_weights
from fastrl.methods.rollouts import RecipeRewards, sample_groups


class BestOptions(MethodOptions):
    kind: Literal["best-of-n"] = "best-of-n"
    push: float = 1.0


class BestOfN(Method):
    Options: ClassVar[type[MethodOptions]] = BestOptions
    samples = True
    least_group = 2

    def prepare(self, records):
        groups = sample_groups(self.context, records)
        reward = RecipeRewards(self.context.reward)
        for group in groups:
            scored = reward.of(group.record.task)
            parts = scored([c.text for c in group.completions], group.record)
            for i, (completion, total) in enumerate(zip(group.completions, scored.total(parts))):
                completion.rewards = {name: values[i] for name, values in parts.items()}
                completion.scalars["reward"] = total
        set_token_weights(groups, aggregate="token", live=_is_best, average=self.context.average)
        self._steps = getattr(self, "_steps", 0) + 1
        return Prepared(groups=groups, sampled=groups, metrics={"best/steps": float(self._steps)})

    def loss(self, logp, entropy, batch):
        return self.options.push * likelihood_loss(logp, batch.per_token["weight"]), {}

    def state(self):
        return {"steps": self._steps}

    def load(self, state):
        self._steps = state["steps"]


def _is_best(group, i):
    rewards = [c.scalars["reward"] for c in group.completions]
    return i == rewards.index(max(rewards))
'''
REWARD = '''
"""Length of an answer, up to a limit."""

from dataclasses import dataclass
from typing import ClassVar

from fastrl.rewards import Reward


@dataclass(frozen=True, kw_only=True)
class LengthReward(Reward):
    parts: ClassVar[tuple[str, ...]] = ("length", "ends")
    limit: int = 10

    def score(self, answers, records):
        return {
            "length": [min(len(a), self.limit) / self.limit for a in answers],
            "ends": [float(a.endswith(".")) for a in answers],
        }
'''
DATA = '''
"""Lines of a text file: a colour and a question."""

from PIL import Image

from fastrl.data import Record
from fastrl.data.records import question


def load(path, query):
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file):
            colour, _, text = line.strip().partition(" ")
            picture = Image.new("RGB", (56, 56), colour)
            messages = question("length", prompt=text + query.get("end", ""))
            yield Record(f"line{number}", "length", (picture,), messages, {})
'''


@pytest.fixture(autouse=True)
def own_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is removed after it."""
    for registry in (fastrl.methods.METHODS, fastrl.rewards.REWARDS, fastrl.data.ADAPTERS):
        monkeypatch.setattr(registry, "_entries", dict(registry))


def module_of(path: Path, text: str) -> ModuleType:
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toys(tmp_path: Path) -> Path:
    """A folder outside the package with the three files and some data; all three are registered."""
    fastrl.methods.register(module_of(tmp_path / "best.py", METHOD).BestOfN)
    fastrl.rewards.register("length", module_of(tmp_path / "length.py", REWARD).LengthReward)
    fastrl.data.register("colours", module_of(tmp_path / "colours.py", DATA).load, keys=("end",))
    (tmp_path / "lines.txt").write_text("red What is it?\nblue And this?\ngreen Which?\n", encoding="utf-8")
    return tmp_path


def recipe_text(folder: Path, model: Path) -> str:
    return textwrap.dedent(f"""\
        method: {{kind: best-of-n, push: 0.5}}
        model: {{path: {model}, device: cpu}}
        data: {{spec: "colours:{folder}/lines.txt?end=!", prompts_per_step: 2, workers: 0}}
        rollout: {{group_size: 3, max_new_tokens: 4}}
        reward: {{options: {{limit: 6}}, weights: {{ends: 2}}}}
        optim: {{steps: 2, lr: 1e-3, token_budget: 256}}
        log: {{tensorboard: false}}
        checkpoint: {{every: 1}}
        out: {folder}/run
        """)


def test_two_steps_of_a_toy_method_on_a_toy_reward_and_format(toys: Path, tiny_folder: Callable[[str], Path]) -> None:
    file = toys / "toy.yaml"
    file.write_text(recipe_text(toys, tiny_folder("qwen2_5")), encoding="utf-8")
    recipe = load_recipe(file)
    assert recipe.scores_groups
    assert build_recipe(recipe.model_dump()) == recipe == load_recipe_of(recipe.dump(), toys)
    summary = train(recipe, show=False)
    rows = [json.loads(line) for line in (toys / "run" / "metrics.jsonl").read_text().splitlines()]
    assert summary.steps == 2
    assert [row["best/steps"] for row in rows] == [1.0, 2.0]
    assert all("reward/length" in row and row["grad_norm"] > 0 for row in rows)
    longer = load_recipe(file, ["optim.steps=3"])
    train(longer, show=False, resume=True)
    rows = [json.loads(line) for line in (toys / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["best/steps"] for row in rows] == [1.0, 2.0, 3.0]  # the method's own state was restored


def load_recipe_of(text: str, folder: Path) -> Any:
    (folder / "again.yaml").write_text(text, encoding="utf-8")
    return load_recipe(folder / "again.yaml")


def test_a_recipe_is_valid_only_once_its_method_is_registered(tmp_path: Path) -> None:
    values = {"method": {"kind": "best-of-n"}, "model": {"path": "m"}, "data": {"spec": "a:b"}, "optim": {"steps": 1}}
    with pytest.raises(RecipeError, match=r"method.kind: unknown method 'best-of-n'"):
        build_recipe(values)
    fastrl.methods.register(module_of(tmp_path / "best.py", METHOD).BestOfN)
    assert build_recipe(values).method.kind == "best-of-n"
    with pytest.raises(RecipeError, match=r"method.pushh: unknown key; did you mean method.push\?"):
        build_recipe(values | {"method": {"kind": "best-of-n", "pushh": 1}})
    with pytest.raises(RecipeError, match="at least 2"):
        build_recipe(values | {"rollout": {"group_size": 1}})


def test_a_taken_name_is_refused_and_both_are_named(toys: Path) -> None:
    again = module_of(toys / "other.py", METHOD).BestOfN
    with pytest.raises(
        ValueError, match=r"method 'best-of-n' is already best\.BestOfN and cannot also be other\.BestOfN"
    ):
        fastrl.methods.register(again)
    with pytest.raises(
        ValueError, match=r"'length' is already length\.LengthReward and cannot also be .*GroundingReward"
    ):
        fastrl.rewards.register("length", GroundingReward)
    with pytest.raises(
        ValueError, match=r"'coco' is already fastrl\.data\.coco\.load and cannot also be .*test_registries\.rows"
    ):
        fastrl.data.register("coco", rows)
    fastrl.methods.register(PerPO)  # registering the same class again is allowed
    fastrl.data.register("mine", rows)
    fastrl.data.register("mine", rows)


def rows(path: str, query: dict[str, str]) -> Iterator[Any]:
    yield from [int(path)] if path.isdigit() else ()


def test_what_a_loader_gives_is_checked() -> None:
    fastrl.data.register("mine", rows, keys=("a",))
    for spec, message in [
        ("mine:3", "must be a fastrl.data.Record, got 3"),
        ("mine:x", "holds no rows"),
        ("mine:x?b=1", "unknown option 'b' of mine"),
    ]:
        with pytest.raises(DataError, match=message):
            load_data(spec)
    with pytest.raises(TypeError, match=r"function of \(path, query\)"):
        fastrl.data.register("other", lambda path: [])  # type: ignore[arg-type, misc]
    with pytest.raises(TypeError, match="function of"):
        fastrl.data.register("other", 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not contain any of"):
        fastrl.data.register("a:b", rows)


class ToyOptions(MethodOptions):
    kind: Literal["toy"] = "toy"


class Toy(Method):
    Options: ClassVar[type[MethodOptions]] = ToyOptions

    def prepare(self, records: Any) -> Prepared:
        return Prepared([], [])

    def loss(self, logp: torch.Tensor, entropy: Any, batch: Any) -> Any:
        return logp.sum(), {}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"row_local_los": lambda self: None}, "row_local_los is not part of a Method; did you mean row_local_loss?"),
        ({"stat": lambda self: {}}, "did you mean state?"),
        ({"sample": True}, "did you mean samples?"),
        ({"reads_refrence": classmethod(lambda cls, options: True)}, "did you mean reads_reference?"),
        ({"state": lambda self: {}}, "state and load must be implemented together"),
        ({"loss": lambda self, logp, batch: None}, "loss takes"),
        ({"Options": dict}, "Options must be"),
        ({"Options": MethodOptions}, "kind must be a Literal"),
    ],
)
def test_a_misspelt_hook_is_an_error_at_registration(body: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError) as error:
        fastrl.methods.register(type("Wrong", (Toy,), body))
    assert message in str(error.value)
    assert "toy" not in fastrl.methods.METHODS
    fastrl.methods.register(Toy)
    assert fastrl.methods.METHODS["toy"] is Toy


def test_a_misspelt_fact_of_an_instance_is_an_error_before_it_trains() -> None:
    class Cold(Toy):
        def __init__(self, options: Any, context: Any) -> None:
            super().__init__(options, context)
            self.temperatur = 0.5

    fastrl.methods.register(Cold)
    with pytest.raises(TypeError, match=r"Cold.temperatur is not part of a method; did you mean temperature\?"):
        fastrl.methods.make_method(ToyOptions(), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"scores": lambda self, answers, records: {}}, "did you mean score?"),
        ({"score": lambda self, answers: {}}, "score takes"),
        ({"parts": ()}, "parts must name"),
        ({"__annotations__": {"limit": "int"}, "limit": 3}, "limit"),
        ({"score": Reward.score}, "score is missing"),
    ],
)
def test_a_misspelt_part_of_a_reward_is_an_error_at_registration(body: dict[str, Any], message: str) -> None:
    sound = {"parts": ("a",), "score": lambda self, answers, records: {"a": [1.0] * len(answers)}}
    with pytest.raises(TypeError) as error:
        fastrl.rewards.register("toy", type("Wrong", (Reward,), sound | body))
    assert message in str(error.value)
    right = type("Right", (Reward,), sound)
    assert fastrl.rewards.register("toy", right) is right
    assert reward_for("toy", weights={"a": 2}).total({"a": [1.0]}) == [2.0]
    for wrong in (int, 3):
        with pytest.raises(TypeError, match="must be a subclass of"):
            fastrl.rewards.register("toy2", wrong)  # type: ignore[arg-type]


# Where a module asks whether an object has an attribute, and of whose objects: none is a hook of ours.
PROBED = {
    "registered classes": ("config/contract", "config/registry", "methods/__init__", "models/families/__init__"),
    "users' functions, callbacks and arguments": (
        *("config/usercode", "run/callbacks", "run/arguments", "rewards/functions", "rewards/base", "data/user"),
    ),
    "errors of the YAML reader": ("config/reader",),
    "what an operating system lacks": ("studies/machine",),
    "pictures and arrays in users' rows": (
        *("data/made", "data/pictures", "data/show", "data/truth", "data/validate", "rewards/adapters"),
    ),
    "modules, configs and outputs of transformers, torch, peft, DeepSpeed and the hub": (
        *("engine/deepspeed", "plan/ledger", "models/attention/switch", "models/dora"),
        *("models/decode_layers", "models/export", "models/families/base", "models/families/llava", "models/flops"),
        *("models/families/qwen2_vl", "models/liger", "models/checkpointing", "models/lora", "models/native_layers"),
        *("models/fused", "models/kept", "models/layer_kinds", "models/offload", "models/policy"),
    ),
}


def package_files() -> Iterator[tuple[str, ast.Module]]:
    package = Path(fastrl.__file__).parent
    for path in sorted(package.rglob("*.py")):
        yield str(path.relative_to(package).with_suffix("")), ast.parse(path.read_text(encoding="utf-8"))


def test_no_hook_is_found_by_probing() -> None:
    """Hooks are declared with defaults; ``hasattr`` and ``getattr`` with a default are for foreign objects alone."""
    known = {name for names in PROBED.values() for name in names}
    found = {
        name
        for name, tree in package_files()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) == 3)
    }
    assert found - known == set()


def compares_a_methods_kind(node: ast.AST) -> bool:
    """Whether this is a comparison with ``….method.kind`` or ``options.kind``."""
    sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
    owners = [side.value for side in sides if isinstance(side, ast.Attribute) and side.attr == "kind"]
    return any({getattr(owner, "attr", ""), getattr(owner, "id", "")} & {"method", "options"} for owner in owners)


def test_only_methods_ask_for_their_kind() -> None:
    found = {name for name, tree in package_files() for node in ast.walk(tree) if compares_a_methods_kind(node)}
    assert {name for name in found if not name.startswith("methods/")} == set()
    assert "methods/perpo" in found  # the scan sees such comparisons
