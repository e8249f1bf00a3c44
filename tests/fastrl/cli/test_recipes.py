"""``fastrl recipes``: the list, one recipe with all keys, and the meaning of each key."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml

from fastrl.cli.recipes import recipes
from fastrl.config.shipped import shipped_recipes
from fastrl.recipe import build_recipe, load_recipe


def printed(capsys: pytest.CaptureFixture[str], *arguments: object, **options: object) -> str:
    recipes(*arguments, **{"recipe": None, "keys": False, "match": "", "overrides": None, "as_json": False, **options})  # type: ignore[arg-type]
    return capsys.readouterr().out


def test_the_list_has_every_recipe_with_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys).splitlines()
    assert [line.split()[0] for line in lines] == shipped_recipes()
    assert all(len(line.split(maxsplit=1)[1]) > 20 for line in lines)
    assert "Qwen2-VL-2B" in next(line for line in lines if line.startswith("perception-r1-grounding-2b"))
    few = [line.split() for line in printed(capsys, match="counting").splitlines()]
    assert few == [line.split() for line in lines if "counting" in line.split()[0]]
    found = json.loads(printed(capsys, as_json=True))["recipes"]
    assert list(found) == shipped_recipes()


def test_the_list_comes_without_torch() -> None:
    code = (
        "import sys; sys.argv = ['fastrl', 'recipes']\n"
        "from fastrl.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "bad = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "perception-r1-grounding-tiny" in done.stdout


def test_a_recipe_is_shown_with_every_key_and_trains_the_same_run(capsys: pytest.CaptureFixture[str]) -> None:
    shown = printed(capsys, recipe="perception-r1-grounding-tiny", overrides=["optim.lr=0.5"])
    made = load_recipe("perception-r1-grounding-tiny", {"optim.lr": 0.5})
    assert build_recipe(yaml.safe_load(shown)) == made
    assert "timeout: 600.0" in shown  # a default that is not in the file
    assert json.loads(printed(capsys, recipe="perception-r1-grounding-tiny", as_json=True))["optim"]["steps"] == 48


def test_keys_have_default_range_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, keys=True, match="lora.rank")
    assert text.splitlines() == [
        *("model", ""),
        "  model.lora.rank = 16    (a whole number, ≥ 1, ≤ 8192)",
        *("      Rank of each layer's update.", ""),
    ]
    found = json.loads(printed(capsys, keys=True, as_json=True))["keys"]
    listed = [key["path"] for keys in found.values() for key in keys]
    assert {"name", "reward.weights", "data.mix.weight", "method.clip_low", "method.online_every"} <= set(listed)
    shipped = {kind: keys for kind, keys in found.items() if kind != "method: Own"}
    assert all(len(key["meaning"]) >= 10 for keys in shipped.values() for key in keys if key["path"] != "method.own")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"recipe": "perception-r1-grounding-tiny", "keys": True}, "give only one of them"),
        ({"overrides": ["optim.lr=1"]}, "give its name too"),
        ({"recipe": "perception-r1-groundin-tiny"}, "did you mean perception-r1-grounding-tiny"),
    ],
)
def test_what_cannot_be_shown_is_said(
    options: dict[str, object], match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=match):
        printed(capsys, **options)
