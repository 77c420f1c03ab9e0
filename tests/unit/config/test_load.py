"""Layers, origins, YAML scalars and messages of the configuration."""

import pytest
import yaml

from diffexpo.bounded.yaml_texts import parse_yaml
from diffexpo.config import config_to_yaml, find_recipe, list_recipes, load_config, read_resolved
from diffexpo.config.load import leaves
from diffexpo.config.methods.diffusion_dpo import DiffusionDpoConfig
from diffexpo.config.methods.expo import ExpoConfig
from diffexpo.config.methods.mapo import MapoConfig
from diffexpo.errors import ConfigError, MissingError

NONE: dict[str, str] = {}


def refuse(*overrides, environment=NONE, recipes=()):
    with pytest.raises(ConfigError) as caught:
        load_config(recipes, overrides, environment)
    return str(caught.value)


def write(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_layers_merge_left_to_right_and_every_value_knows_its_origin(tmp_path):
    one = write(
        tmp_path, "one.yaml", "seed: 1\ntraining: {steps: 10, batch_size: 8}\nalgorithm: {beta: 100}\n"
    )
    two = write(tmp_path, "two.yaml", "training: {steps: 20}\n")
    environment = {"DIFFEXPO_ALGORITHM__BETA": "200", "DIFFEXPO_SEED": "2", "PATH": "x"}
    loaded = load_config([one, two], ["seed=3"], environment)
    assert (loaded.config.seed, loaded.config.training.steps, loaded.config.training.batch_size) == (3, 20, 8)
    assert loaded.config.algorithm.beta == 200.0
    assert loaded.sources["seed"] == "--set seed=3"
    assert loaded.sources["algorithm.beta"] == "DIFFEXPO_ALGORITHM__BETA"
    assert loaded.sources["training.steps"] == str(two)
    assert loaded.sources["training.batch_size"] == str(one)
    assert loaded.sources["training.weight_decay"] == "default"


def test_every_leaf_of_every_recipe_has_an_origin():
    for recipe in list_recipes():
        loaded = load_config([recipe.name], [], NONE)
        assert set(loaded.sources) == {path for path, _ in leaves(loaded.config.model_dump(mode="json"))}


def test_the_process_environment_is_read_and_a_resumed_run_ignores_it(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFEXPO_TRAINING__STEPS", "7")
    assert load_config([]).config.training.steps == 7
    saved = write(tmp_path, "config.yaml", config_to_yaml(load_config([], [], NONE).config))
    assert read_resolved(saved).config.training.steps == 2000


@pytest.mark.parametrize("recipe", [recipe.name for recipe in list_recipes()])
def test_a_resolved_configuration_reads_back_equal(recipe, tmp_path):
    loaded = load_config([recipe], [], NONE)
    text = config_to_yaml(loaded.config)
    assert read_resolved(write(tmp_path, "config.yaml", text)).config == loaded.config
    assert yaml.safe_load(text) == parse_yaml(text, "test")


@pytest.mark.parametrize(
    ("text", "value"), [("1e-5", 1e-5), ("5E-6", 5e-6), ("-1.5e3", -1500.0), (".5", 0.5), ("3", 3)]
)
def test_numbers_are_numbers(text, value):
    parsed = parse_yaml(text, "test")
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize("word", ["off", "no", "yes", "on", "1e", "e5", "1.2.3"])
def test_words_stay_words(word):
    assert parse_yaml(word, "test") == word


def test_a_learning_rate_without_a_point_is_a_float_from_every_layer(tmp_path):
    path = write(tmp_path, "a.yaml", "training: {learning_rate: 1e-5}\n")
    assert load_config([path], [], NONE).config.training.learning_rate == 1e-5
    assert load_config([], ["training.learning_rate=2e-5"], NONE).config.training.learning_rate == 2e-5
    assert (
        load_config([], [], {"DIFFEXPO_TRAINING__LEARNING_RATE": "3e-5"}).config.training.learning_rate
        == 3e-5
    )


def test_off_and_no_reach_the_settings_that_use_them():
    loaded = load_config([], ["explore.negatives.schedule=off", "training.mixed_precision=no"], NONE)
    assert loaded.config.explore.negatives.schedule == "off"
    assert loaded.config.training.mixed_precision == "no"


def test_lists_are_replaced_whole_or_by_element():
    judges = "evaluation.judges=[{name: a, type: clip, path: x}, {name: b, type: jpeg_compressibility}]"
    loaded = load_config([], [judges, "evaluation.judges.1.weight=-2", "evaluation.judges.0.path=y"], NONE)
    first, second = loaded.config.evaluation.judges
    assert (first.path, second.weight) == ("y", -2.0)
    assert loaded.sources["evaluation.judges.1.weight"] == "--set evaluation.judges.1.weight=-2"
    assert loaded.sources["evaluation.judges.1.name"] == f"--set {judges}"
    assert load_config([], ["rewards.0.weight=3"], NONE).config.rewards[0].path == "emoji:judge_train"
    assert load_config([], ["tuning.lora.target_modules=[to_q]"], NONE).config.tuning.lora.target_modules == (
        "to_q",
    )


def test_a_layer_that_changes_the_method_keeps_what_means_the_same(tmp_path):
    recipe = write(tmp_path, "a.yaml", "algorithm: {type: expo, beta: 100, alpha: 0.3, kind: hinge}\n")
    loaded = load_config([recipe], ["algorithm.type=diffusion_dpo"], NONE)
    assert loaded.config.algorithm == DiffusionDpoConfig(beta=100.0, kind="hinge")
    assert loaded.sources["algorithm.beta"] == str(recipe)
    assert loaded.sources["algorithm.type"] == "--set algorithm.type=diffusion_dpo"
    assert loaded.sources["algorithm.sft_weight"] == "default"
    assert loaded.notes == (
        f"algorithm.alpha = 0.3 (from {recipe}) was set for expo and is no setting of diffusion_dpo: it is not used",
    )


def test_a_method_changed_and_changed_back_starts_from_what_survived(tmp_path):
    one = write(tmp_path, "one.yaml", "algorithm: {beta: 100, alpha: 0.3}\n")
    two = write(tmp_path, "two.yaml", "algorithm: {type: diffusion_dpo, kind: ipo}\n")
    three = write(tmp_path, "three.yaml", "algorithm: {type: expo}\n")
    loaded = load_config([one, two, three], ["algorithm.contrast_fraction=0.5"], NONE)
    assert loaded.config.algorithm == ExpoConfig(beta=100.0, kind="ipo", contrast_fraction=0.5)
    assert len(loaded.notes) == 1 and "alpha" in loaded.notes[0]


def test_recipes_that_each_choose_a_method_leave_the_last_one_and_its_defaults(tmp_path):
    first = "algorithm: {type: improvement_dpo, improver: {steps: 5}}\nexplore: {agents: 1}\n"
    one = write(tmp_path, "one.yaml", first)
    two = write(tmp_path, "two.yaml", "algorithm: {type: mapo}\n")
    loaded = load_config([one, two], [], NONE)
    assert loaded.config.algorithm == MapoConfig()
    (note,) = loaded.notes
    assert note.startswith("algorithm.improver = {") and "'steps': 5" in note
    assert f"(from {one}) was set for improvement_dpo and is no setting of mapo" in note
    assert load_config([write(tmp_path, "three.yaml", "algorithm: {type: spo}\n"), two], [], NONE).notes == ()


def test_the_same_method_named_again_changes_nothing(tmp_path):
    recipe = write(tmp_path, "a.yaml", "algorithm: {beta: 100, alpha: 0.3}\n")
    loaded = load_config([recipe], ["algorithm.type=expo"], NONE)
    assert loaded.config.algorithm == ExpoConfig(beta=100.0, alpha=0.3) and loaded.notes == ()


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm.type=diffusion_dpo", "algorithm.alpha=0.1"],
        ["algorithm.alpha=0.1", "algorithm.type=diffusion_dpo"],
        ["algorithm={type: diffusion_dpo, alpha: 0.1}"],
    ],
)
def test_a_setting_of_another_method_in_the_same_layer_is_refused(overrides):
    message = refuse(*overrides)
    assert "algorithm.alpha is not a setting of diffusion_dpo (from --set algorithm" in message
    assert "it belongs to expo" in message


def test_environment_and_flags_are_layers_of_their_own():
    loaded = load_config([], ["algorithm.type=diffusion_dpo"], {"DIFFEXPO_ALGORITHM__ALPHA": "0.1"})
    assert "DIFFEXPO_ALGORITHM__ALPHA" in loaded.notes[0]


def test_a_method_that_does_not_exist_names_the_nearest(tmp_path):
    message = refuse("algorithm.type=diffusion_dp")
    assert message.startswith("algorithm.type = 'diffusion_dp' (from --set algorithm.type=diffusion_dp)")
    assert "expected one of expo, diffusion_dpo" in message and message.endswith(
        "Did you mean diffusion_dpo?"
    )
    assert "algorithm.type = null" in refuse("algorithm.type=null")
    for value in ("5", "null", "[1]"):
        assert "a group of settings (type, " in refuse(f"algorithm={value}")


def test_elements_of_a_list_of_numbers_are_checked_and_have_the_list_s_origin():
    text = "algorithm.timestep_range.1 = 1.2 (from --set algorithm.timestep_range=[0.5, 1.2]): expected a list of 2"
    assert refuse("algorithm.timestep_range=[0.5, 1.2]").startswith(text)
    assert "a list of 2; each element a number" in refuse("algorithm.timestep_range=[0.5]")
    assert "a list of 2; each element a number" in refuse("algorithm.timestep_range=[0, 0.5, 1]")
    loaded = load_config([], ["algorithm.timestep_range.1=0.5", "algorithm.type=diffusion_dpo"], NONE)
    assert loaded.config.algorithm.timestep_range == (0.0, 0.5)
    assert loaded.sources["algorithm.timestep_range"] == "--set algorithm.timestep_range.1=0.5"


def test_an_unknown_key_names_its_file_and_the_closest_setting(tmp_path):
    path = write(tmp_path, "my.yaml", "training:\n  learning_rat: 1e-5\n")
    message = refuse(recipes=[path])
    assert (
        message
        == f"training.learning_rat is not a setting (from {path}). Did you mean training.learning_rate?"
    )
    assert "Did you mean training.learning_rate?" in refuse("learning_rate=1")
    assert "Did you mean explore.iterations?" in refuse("explore.iteration=1")
    assert "YAML needs a space after the colon: {name: own}." in refuse("rewards=[{name:own}]")
    assert "Did you mean algorithm?" in refuse("algorthm.beta=1")
    assert "DIFFEXPO_SEEED" in refuse(environment={"DIFFEXPO_SEEED": "1"})
    assert "Did you mean rewards[].weight?" in refuse("rewards.0.wieght=1") or "rewards.0.weight" in refuse(
        "rewards.0.wieght=1"
    )


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("training.steps=abc", ["training.steps = 'abc'", "an integer >= 1"]),
        ("training.steps=0", ["training.steps = 0", ">= 1"]),
        ("training.steps=1.5", ["training.steps = 1.5", "an integer"]),
        ("training.steps=true", ["training.steps = true", "an integer"]),
        ("algorithm.beta=-1", ["algorithm.beta = -1", "a number > 0"]),
        ("algorithm.beta=.inf", ["algorithm.beta = inf", "finite"]),
        ("algorithm.kind=sigmod", ["one of sigmoid, hinge", "Did you mean sigmoid?"]),
        ("algorithm.beta_explore=foo", ["matched", "literal", "a number > 0"]),
        ("explore.agents=3", ["explore.agents = 3", "one of 1, 2"]),
        ("model.path=5", ["model.path = 5", "text", "quotes"]),
        ("training=5", ["training = 5", "a group of settings", "steps"]),
        ("training.gradient_checkpointing=maybe", ["true or false"]),
        ("name=a b", ["name = 'a b'", "matching"]),
        ("seed.x=1", ["seed.x", "single value"]),
        ("rewards.4.weight=1", ["rewards.4", "length 1"]),
        ("rewards=[{type: clip}]", ["rewards.0.name is not given"]),
        ("seed", ["has no value", "--set group.key=value"]),
        ("seed=[1", ["not valid YAML"]),
    ],
)
def test_a_wrong_value_says_what_where_from_and_what_was_expected(override, parts):
    message = refuse(override)
    for part in [*parts, override.partition("=")[0]]:
        assert part in message


def test_all_problems_are_listed_at_once():
    assert len(refuse("training.steps=abc", "algorithm.beta=x", "nonsense=1").splitlines()) == 3


def test_a_key_that_stands_twice_is_refused(tmp_path):
    message = refuse(recipes=[write(tmp_path, "twice.yaml", "seed: 1\nname: a\nseed: 2\n")])
    assert "'seed' stands twice" in message
    assert "twice.yaml" in message


@pytest.mark.parametrize("text", ["- 1\n", "a: [\n", "!!python/object/apply:os.system ['true']\n", "5: x\n"])
def test_files_that_are_no_recipe_are_refused(tmp_path, text):
    assert "odd.yaml" in refuse(recipes=[write(tmp_path, "odd.yaml", text)])


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes("name: caf\u00e9\n".encode("latin-1"))
    assert "UTF-8" in refuse(recipes=[path])


def test_recipes_are_found_by_name_and_by_path(tmp_path):
    assert find_recipe("emoji/expo") == find_recipe("emoji/expo.yaml")
    path = write(tmp_path, "mine.yaml", "seed: 1\n")
    assert find_recipe(str(path)) == path


@pytest.mark.parametrize(
    ("name", "near"),
    [("emoji/exop", "emoji/expo"), ("expo", "emoji/expo"), ("emoji/dpo", "emoji/dpo_offline")],
)
def test_a_missing_recipe_names_the_nearest(name, near):
    with pytest.raises(MissingError, match=near):
        find_recipe(name)


def test_embedded_data_does_not_enter_a_model_of_ones_own(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model: {path: /mine/sd15}\nprompts: {source: p.txt}\nevaluation: {prompts: q.txt}\n")
    loaded = load_config([recipe], ["rewards=[{name: j, type: jpeg_compressibility}]"], {})
    names = [value for _, value in leaves(loaded.config.model_dump(mode="json")) if isinstance(value, str)]
    assert not [name for name in names if name.startswith(("emoji:", "scenes:"))]
    assert loaded.config.offline.source is None and loaded.config.explore.negatives.source is None
    # What is named is used, and the embedded model keeps its own data.
    chosen = load_config(
        [recipe], ["rewards=[{name: j, type: jpeg_compressibility}]", "offline.source=emoji:offline"], {}
    )
    assert chosen.config.offline.source == "emoji:offline"
    assert load_config([], [], {}).config.offline.source == "emoji:offline"


def test_rewards_of_a_model_of_ones_own_have_to_be_named_too():
    own = ["model.path=a/b", "prompts.source=p.txt", "evaluation.prompts=q.txt"]
    with pytest.raises(ConfigError, match="rewards holds no reward with role: train.*add one"):
        load_config([], own, {})
    found = load_config(
        [], [*own, "algorithm={type: sft}", "explore.iterations=1", "offline.source=pairs"], {}
    )
    assert found.config.rewards == ()


def test_prompts_of_a_model_of_ones_own_have_to_be_named():
    with pytest.raises(
        ConfigError, match="prompts.source and evaluation.prompts: not given.*model.path = a/b"
    ) as caught:
        load_config([], ["model.path=a/b"], {})
    assert "--set prompts.source=FILE.txt --set evaluation.prompts=FILE.txt" in str(caught.value)
    with pytest.raises(ConfigError, match="^evaluation.prompts: not given"):
        load_config([], ["model.path=scenes:diffusion", "prompts.source=scenes:train"], {})


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ("algorithm.type=dpo", "Did you mean diffusion_dpo or improvement_dpo?"),
        ("algorithm.type=grpo", "Did you mean flow_grpo?"),
        ("algorithm.type=EXPO", "Did you mean expo?"),
        ("tuning.kind=LoRA", "Did you mean lora?"),
    ],
)
def test_names_as_people_write_them_get_a_hint(setting, hint):
    with pytest.raises(ConfigError) as caught:
        load_config([], [setting], {})
    assert hint in str(caught.value)


def test_a_setting_without_set_is_told_where_it_belongs():
    with pytest.raises(MissingError, match="Did you mean --set training.steps=3"):
        load_config(["training.steps=3"], [], {})


def test_elements_of_lists_may_be_written_with_brackets():
    rewards = "rewards=[{name: j, type: jpeg_compressibility}, {name: k, type: jpeg_incompressibility}]"
    found = load_config([], [rewards, "rewards[1].weight=2"], {}).config
    assert [reward.weight for reward in found.rewards] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("text", "line", "caret"),
    [("training:\n  steps: 3\n   batch_size: 4\n", 3, "   batch_size: 4"), ("seed: [1\n", 1, "seed: [1")],
)
def test_broken_yaml_is_told_with_file_line_and_the_line_itself(tmp_path, text, line, caret):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config([path], [], {})
    first, shown, mark = str(caught.value).splitlines()
    assert first.startswith(f"{path} is not valid YAML: line {line}, column ")
    assert shown == f"    {caret}" and mark.strip() == "^"
