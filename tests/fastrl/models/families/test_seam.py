"""Everything specific to a family is in its file; a family registered from outside the package works like one
inside."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from fastrl.answers import style_of, styles
from fastrl.answers.styles import END_OF_TURN, STYLES
from fastrl.batch import Completion, PromptGroup, pack_row
from fastrl.engine.base import parameter_groups
from fastrl.engine.names import matches
from fastrl.evaluate.run import run_evaluation
from fastrl.models import load_policy
from fastrl.models.families import FAMILIES, PARTS, Family, VisionFeatures, families, family_of, register
from fastrl.models.families.qwen2_vl import Qwen2_5VL
from fastrl.plan import gpu_named, make_plan
from fastrl.recipe import OptimRecipe, load_recipe
from fastrl.rewards import reward_for
from fastrl.rollout import Generator, Sampling
from fastrl.trainer import train
from tests.helpers.counting import Cost, cost
from tests.helpers.families import build_family
from tests.helpers.rollouts import make_records as make_prompts
from tests.helpers.training import make_recipe, make_records, steady_rows

PACKAGE = Path(__file__).parents[4] / "fastrl"
NAMES = {"visual", "language_model", "merge_size", "spatial_merge_size", "image_grid_thw", "grid_thw", "grid"}


def sources() -> Iterator[tuple[Path, ast.Module]]:
    """Every module of the package outside ``families/``."""
    for file in sorted(PACKAGE.rglob("*.py")):
        if file.parent != PACKAGE / "models" / "families":
            yield file, ast.parse(file.read_text(encoding="utf-8"))


def texts(tree: ast.Module) -> Iterator[ast.Constant]:
    """Every string but docstrings."""
    documents = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr):
                documents.add(id(first.value))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents:
            yield node


def found_names(tree: ast.Module) -> list[str]:
    """Accesses of a family's names: as attributes, as keys, as names of attributes, as keywords."""
    attributes = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    keywords = [str(node.arg) for node in ast.walk(tree) if isinstance(node, ast.keyword)]
    keys = [part for node in texts(tree) for part in str(node.value).split(".")]
    return [name for name in (*attributes, *keywords, *keys) if name in NAMES]


def test_no_attribute_or_config_access_of_a_family_outside_its_file() -> None:
    assert {str(file): found for file, tree in sources() if (found := found_names(tree))} == {}


def test_no_control_token_and_no_choice_of_a_style_outside_a_familys_file() -> None:
    """Only ``answers`` contains tokens: those of answer styles, and end-of-turn tokens to remove from given texts."""
    tokens = {token for family in families().values() for token in (*family.control_tokens, family.end_of_turn)}
    for file, tree in sources():
        if file.parent == PACKAGE / "answers":
            continue
        for node in texts(tree):
            held = [token for token in tokens - {"<image>", "<video>"} if token in str(node.value)]
            assert not held, f"{file}:{node.lineno}: {held}"  # "<image>" is also how data formats mark a picture
            known = {*STYLES, *families()} - {"internvl", "llava_next", "molmo", "gemma", "glm", "paligemma"}
            if file.parent != PACKAGE / "rewards":  # by which a frame names its first style
                assert node.value not in known, f"{file}:{node.lineno}: {node.value}"


def test_the_scan_notices_each_kind_of_access() -> None:
    for line in ("core.model.visual", "c['vision_config']['spatial_merge_size']", "tower(x, grid_thw=g)", "i.grid",
                 "getattr(c, 'merge_size')", "core.get_submodule('model.language_model')"):  # fmt: skip
        assert found_names(ast.parse(line)), line
    assert not found_names(ast.parse('"""About the grid."""\nsides = grid = 3'))


def test_answers_know_the_style_and_the_end_of_every_family() -> None:
    for model_type, family in families().items():
        assert style_of(model_type).name == family.style
        assert family.end_of_turn in END_OF_TURN


# Names of parts


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("vision", "model.visual.blocks.0.norm1.weight", True),
        ("vision", "model.visual.merger.mlp.0.weight", False),
        ("projector", "model.visual.merger.mlp.0.weight", True),
        ("projector", "base_model.model.model.visual.merger.modules_to_save.default.mlp.0.weight", True),
        ("language", "lm_head.weight", True),
        ("language.lm_head", "lm_head.weight", True),
        ("language.layers.0", "model.language_model.layers.0.mlp.up_proj.weight", True),
        ("language.layers.0", "model.language_model.layers.01.mlp.up_proj.weight", False),
        ("vision.*", "model.visual.patch_embed.proj.weight", True),
        ("visual", "model.visual.merger.mlp.0.weight", True),
        ("visual.merger", "model.visual.merger.mlp.0.weight", True),
        ("*visual*", "model.visual.blocks.0.norm1.weight", True),
        ("*proj*", "model.visual.merger.mlp.0.weight", False),
        ("*vision*", "model.visual.blocks.0.norm1.weight", False),
        ("model.visual.*", "model.visual.blocks.0.norm1.weight", True),
        ("layers.1", "model.language_model.layers.1.mlp.up_proj.weight", True),
    ],
)
def test_words_for_parts_and_old_patterns(pattern: str, name: str, fits: bool) -> None:
    family = object.__new__(Qwen2_5VL)
    assert matches(pattern, name, family.alias) is fits


def test_groups_freezing_and_adapters_go_by_the_same_words(tmp_path: Path) -> None:
    folder = build_family(tmp_path, "llava")
    lora = {"rank": 2, "targets": ["q_proj", "vision"], "also_train": ["projector"]}
    policy = load_policy(folder, device="cpu", lora=lora, freeze=["language"])
    trained = {n for n, p in policy.core.named_parameters() if p.requires_grad}
    assert {policy.family.part_of(n) for n in trained} == {"vision", "projector"}
    optim = optim_with(match="projector", lr=1e-5)
    rates = {
        name: group["lr"]
        for group in parameter_groups(policy.model, optim, policy.family.alias)
        for name in group["names"]
    }
    assert {rates[n] for n in rates if policy.family.part_of(n) == "projector"} == {1e-5}
    assert {rates[n] for n in rates if policy.family.part_of(n) != "projector"} == {1e-3}
    frozen = optim_with(match="language", lr=1e-5)
    with pytest.raises(ValueError, match=r"optim\.groups\.0\.match: 'language' names no trainable parameter"):
        parameter_groups(policy.model, frozen, policy.family.alias)


def optim_with(**group: Any) -> OptimRecipe:
    return OptimRecipe.model_validate({"steps": 1, "lr": 1e-3, "groups": [group]})


# A family from outside


@pytest.fixture
def told() -> Iterator[None]:
    """The families known to ``answers`` are restored after a test."""
    known, ends = dict(styles._OF_FAMILY), list(END_OF_TURN)
    yield
    styles._OF_FAMILY.clear()
    styles._OF_FAMILY.update(known)
    END_OF_TURN[:] = ends


@pytest.fixture
def toy(told: None, monkeypatch: pytest.MonkeyPatch) -> type[Family]:
    """A third family as a user would write it: its own config and model class, one averaged token for each picture."""
    from transformers import PretrainedConfig, PreTrainedModel, Qwen2Config, Qwen2Model
    from transformers.generation import GenerationMixin

    from fastrl.answers import View
    from fastrl.batch import ImageInput
    from fastrl.models.vision import ImagePreprocessor

    class ToyConfig(PretrainedConfig):
        model_type = "toy_mean"
        sub_configs: ClassVar = {"text_config": Qwen2Config}

        def __init__(self, text_config: Any = None, image_token_id: int = 0, **kwargs: Any) -> None:
            self.text_config = Qwen2Config(**text_config) if isinstance(text_config, dict) else text_config
            self.text_config = self.text_config or Qwen2Config()
            self.image_token_id = image_token_id
            super().__init__(**kwargs)

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.color = nn.Linear(3, 8)

    class Inner(nn.Module):
        def __init__(self, config: ToyConfig) -> None:
            super().__init__()
            self.eye = Tower()
            self.bridge = nn.Linear(8, config.text_config.hidden_size)
            self.text = Qwen2Model(config.text_config)

    class ToyModel(PreTrainedModel, GenerationMixin):
        config_class = ToyConfig
        _tied_weights_keys: ClassVar = {}

        def __init__(self, config: ToyConfig) -> None:
            super().__init__(config)
            self.model = Inner(config)
            self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
            self.post_init()

        def get_input_embeddings(self) -> Any:
            return self.model.text.embed_tokens

        def get_output_embeddings(self) -> Any:
            return self.lm_head

    class MeanPreprocessor(ImagePreprocessor):
        settings = "mean"

        def read(self, picture: Any, key: str, among: int) -> tuple[ImageInput, View]:
            small = torch.tensor(list(picture.resize((2, 2)).getdata())).float() / 255
            return ImageInput(small, (1,), key), View.unresized(*picture.size)

        def save(self, folder: Path) -> None:
            (folder / "preprocessor_config.json").write_text("{}")

    class ToyMean(Family):
        model_type: ClassVar[str] = "toy_mean"
        style: ClassVar[str] = "qwen3"
        end_of_turn: ClassVar[str] = "<|im_end|>"
        control_tokens: ClassVar[tuple[str, ...]] = ("<|im_start|>", "<image>")
        part_names: ClassVar = {
            "language": ("model.text", "lm_head"),
            "vision": ("model.eye",),
            "projector": ("model.bridge",),
        }

        @classmethod
        def model_class(cls) -> Any:
            return ToyModel

        def preprocessor(
            self, folder: Path, *, min_pixels: int | None = None, max_pixels: int | None = None
        ) -> ImagePreprocessor:
            return MeanPreprocessor(None)

        def tokens(self, image: ImageInput) -> int:
            return 1

        def blank(self, pixels: int, *, key: str = "") -> ImageInput:
            return ImageInput(torch.empty(4, 3, device="meta"), (1,), key)

        def features(self, core: Any, images: Any) -> list[VisionFeatures]:
            parts = self.parts(core)
            return [
                VisionFeatures(parts.projector(parts.vision.color(i.pixel_values.to(core.device)).mean(0))[None])
                for i in images
            ]

    monkeypatch.setattr(FAMILIES, "_entries", dict(FAMILIES._entries))
    return register(ToyMean)


def toy_folder(folder: Path, family: type[Family]) -> Path:
    from tests.helpers.families import onevision_tokenizer, text_sizes

    tokenizer = onevision_tokenizer()
    token = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    config = family.model_class().config_class(text_config=text_sizes(tokenizer), image_token_id=token)
    model = family.model_class()(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    return folder


def test_a_third_family_from_outside_trains_resumes_rolls_out_and_is_planned(toy: type[Family], tmp_path: Path) -> None:
    folder = toy_folder(tmp_path / "model", toy)
    policy = load_policy(folder, device="cpu")
    assert policy.family.decode_layers(policy.core) is not None, "Llama-like layers take the fast step"
    prompts = [policy.encode(record)[0] for record in make_prompts()]
    assert all(p.positions.shape == (1, len(p.token_ids)) for p in prompts)
    answers = Generator(policy).generate(prompts, Sampling(2, 5), torch.Generator().manual_seed(0))
    batch = pack_row([PromptGroup(p, a) for p, a in zip(prompts, answers, strict=True)])
    with torch.no_grad():
        torch.testing.assert_close(policy.logprob(batch).logp, batch.per_token["sampler_logp"], rtol=0, atol=1e-5)
        blind = policy.logprob(batch, features={i.key: VisionFeatures(torch.zeros(1, 64)) for i in batch.images}).logp
    assert not torch.allclose(blind, batch.per_token["sampler_logp"]), "pictures are seen"
    recipe = make_recipe(folder, tmp_path / "run", model__freeze=["vision"], optim__steps=2)
    summary = train(recipe, records=make_records(), show=False)
    assert summary.model is not None
    assert len(steady_rows(tmp_path / "run")) == 2
    train(
        make_recipe(folder, tmp_path / "run", model__freeze=["vision"], optim__steps=3),
        records=make_records(),
        resume=True,
        show=False,
    )
    assert len(steady_rows(tmp_path / "run")) == 3
    assert load_policy(summary.model, device="cpu").family.model_type == "toy_mean"
    plan = make_plan(
        load_recipe("perception-r1-counting-tiny", [f"model.path={folder}", "model.freeze=[]"]), gpu_named("l4")
    )
    assert plan.workload.image_tokens == 1
    assert plan.model.parameters == sum(p.numel() for p in policy.core.parameters())


def test_rewards_and_evaluations_of_texts_know_a_family_from_outside(toy: type[Family], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown family 'toy_tags'"):
        reward_for("grounding", family="toy_tags")
    register(type("ToyTags", (toy,), {"model_type": "toy_tags", "style": "internvl", "end_of_turn": "<|over|>"}))
    answer = "<ref>cat</ref><box>[[100, 100, 500, 500]]</box>"
    row = {"box": [112, 56, 560, 280], "width": 1120, "height": 560}
    columns = {name: [value] for name, value in row.items()}
    reward = reward_for("grounding", family="toy_tags")
    assert reward(prompts=["Where?"], completions=[answer + "<|over|>"], **columns) == [2.0]  # iou and format
    line = {"id": 1, "image": "a.png", "expression": "cat", "bbox": row["box"], **row}
    (tmp_path / "data.jsonl").write_text(json.dumps(line))
    (tmp_path / "answers.jsonl").write_text(json.dumps({"id": 1, "answer": answer}))
    spec = f"refexp:{tmp_path}/data.jsonl"
    found = run_evaluation("grounding", spec, predictions=tmp_path / "answers.jsonl", family="toy_tags")
    assert (found["mean_iou"], found["frame"]) == (1.0, "thousand")
    with pytest.raises(ValueError, match="unknown answer style 'tags'"):
        register(type("ToyTags2", (toy,), {"model_type": "toy_tags2", "style": "tags"}))
    assert "toy_tags2" not in FAMILIES
    with pytest.raises(ValueError, match="'gemma3' already has style 'gemma', got 'internvl'"):
        register(type("OwnGemma", (toy,), {"model_type": "gemma3", "style": "internvl"}))


def test_a_misspelt_or_missing_hook_is_an_error_when_the_family_is_registered(toy: type[Family]) -> None:
    def named(name: str, **parts: Any) -> Any:
        return type(name, (toy,), {"model_type": name, **parts})

    with pytest.raises(TypeError, match=r"posittions is not part of a Family; did you mean positions\?"):
        register(named("a", posittions=lambda self: None))
    with pytest.raises(TypeError, match=r"tokens takes \(self\), but is called with \(self, image\)"):
        register(named("b", tokens=lambda self: 1))
    with pytest.raises(TypeError, match=r"style is missing.*model_class is missing.*features is missing"):
        register(type("c", (Family,), {"model_type": "c", "end_of_turn": "x"}))
    with pytest.raises(ValueError, match=r"'toy_mean' is already "):
        register(type("Other", (toy,), {}))
    with pytest.raises(TypeError, match="subclass of"):
        register(dict)  # type: ignore[type-var]


def test_an_unknown_family_and_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    with pytest.raises(ValueError, match=r"model type 'nothing' is not supported; supported: .*qwen2_vl"):
        load_policy(tmp_path)
    with pytest.raises(ValueError, match="'nothing'"):
        family_of({"model_type": "nothing"})
    assert PARTS == ("language", "vision", "projector")


# The cost of the seam is zero: counts from before it, with torch 2.13 and transformers 5.23.

BEFORE = {
    ("qwen2_5", False): {
        "rollout": Cost(141494784, 2421, 1050, 14809551),
        "score": Cost(108110592, 1015, 494, 11681204),
        "train": Cost(330796032, 2546, 1384, 53452080),
    },
    ("qwen2_5", True): {"train": Cost(411700224, 3768, 1753, 62703428)},
    ("qwen2", False): {
        "rollout": Cost(139414016, 2252, 951, 14147082),
        "score": Cost(107073024, 790, 371, 10846908),
        "train": Cost(328111104, 1995, 1070, 48088964),
    },
    ("qwen2", True): {"train": Cost(407804928, 2977, 1366, 56593548)},
}


@pytest.mark.skipif(
    not torch.__version__.startswith("2.13") or not __import__("transformers").__version__.startswith("5.23"),
    reason="operators were counted with torch 2.13 and transformers 5.23",
)
@pytest.mark.parametrize(("style", "checkpointing"), list(BEFORE))
def test_a_step_costs_no_more_than_before_there_was_a_seam(
    style: str, checkpointing: bool, tiny_folder: Callable[[str], Path]
) -> None:
    policy = load_policy(tiny_folder(style), device="cpu", gradient_checkpointing=checkpointing)
    prompts = [policy.encode(record)[0] for record in make_prompts()]
    generator = Generator(policy)

    def rollout() -> list[list[Completion]]:
        return generator.generate(prompts, Sampling(3, 6), torch.Generator().manual_seed(1))

    batch = pack_row([PromptGroup(p, a) for p, a in zip(prompts, rollout(), strict=True)])

    def learn() -> Tensor:
        policy.core.zero_grad()
        found = policy.logprob(batch, return_entropy=True)
        loss = found.logp.mean() + found.entropy.mean()  # type: ignore[union-attr]
        loss.backward()
        return loss

    def score() -> None:
        with torch.no_grad():
            policy.logprob(batch)

    learn()
    for name, work in (("rollout", rollout), ("score", score), ("train", learn)):
        if name in BEFORE[style, checkpointing]:
            for got, most in zip(cost(work), BEFORE[style, checkpointing][name], strict=True):
                assert got <= most, (name, cost(work), BEFORE[style, checkpointing][name])
