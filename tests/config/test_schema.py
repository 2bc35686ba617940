"""The schema: every config file composes, impossible values are refused, and hashes follow results."""

from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from sae_lora.common.errors import ConfigError
from sae_lora.config.execution import EvaluationConfig
from sae_lora.config.identity import identity, readable_name
from sae_lora.config.lora_targets import matches, target_words
from sae_lora.config.mistakes.explain import explanation
from sae_lora.config.schema import Config
from sae_lora.config.serialize import as_dict, keys, load, typed
from sae_lora.config.validate import check, latents
from tests.support.composing import CONF, composed, with_values

GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir())
FILES = sorted(path.relative_to(CONF) for path in CONF.rglob("*.yaml"))
NEEDS = {
    "model/hf": ["model.name=org/name"],
    "sae/disk": ["sae.path=x"],
    "sae/registry": ["sae.release=x"],
    "sae/new": ["method=sae"],
    "layer/groups": ["method=sae"],
    "data/hf": ["data.name=org/name"],
    "data/text_files": ["data.files=x"],
}
"""Overrides that a user must add to an option."""


def test_the_groups_are_the_interface() -> None:
    groups = {"model", "sae", "method", "lora", "layer", "data", "train", "launcher", "evaluation"}
    assert set(GROUPS) == groups | {"tracking", "experiment", "variant"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", [file for file in FILES if file.parent.name not in ("", "experiment")], ids=str
)
def test_every_file_of_a_group_composes(file: Path) -> None:
    choice = file.with_suffix("").as_posix()
    group, _, name = choice.partition("/")
    config = composed(f"{group}={name}", *NEEDS.get(choice, []))
    assert isinstance(config, Config)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_file_begins_with_the_command_that_uses_it(file: Path) -> None:
    lines = (CONF / file).read_text().splitlines()
    first = lines[1] if lines[0] == "# @package _global_" else lines[0]
    assert first.startswith("# python launch.py")
    if file.parent != Path():
        group, _, name = file.with_suffix("").as_posix().partition("/")
        assert f"{group}={name}" in first or f"{group}.index" in first


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(CONF.glob("experiment/*.yaml")), ids=lambda path: path.stem)
def test_every_value_of_every_experiment_composes(file: Path) -> None:
    params = yaml.safe_load(file.read_text()).get("hydra", {}).get("sweeper", {}).get("params", {})
    assert params
    swept = [[f"{key}={value}" for value in str(values).split(",")] for key, values in params.items()]
    for number in range(max(map(len, swept))):  # every value of every key occurs at least once
        composed(f"experiment={file.stem}", *(values[number % len(values)] for values in swept))


@pytest.mark.parametrize(
    ("override", "field", "nearest"),
    [
        ("lora.rank=0", "lora.rank", 1),
        ("lora.rank=-4", "lora.rank", 1),
        ("lora.alpha=-1", "lora.alpha", None),
        ("lora.alpha=2s", "lora.alpha", None),
        ("lora.alpha=0r", "lora.alpha", None),
        ("lora.alpha=null", "lora.alpha", None),
        ("lora.dropout=1.5", "lora.dropout", 0.9),
        ("lora.dropout=-0.1", "lora.dropout", 0),
        ("lora.targets=mpl", "lora.targets", "mlp"),
        ("lora.targets=[q,gat]", "lora.targets", "[q,gate]"),
        ("lora.targets=[]", "lora.targets", "all"),
        ("lora.targets=[o,gat,self_attn.*]", "lora.targets", "[o,gate,self_attn.*]"),
        ("lora.targets=a_/b", "lora.targets", None),
        ("lora.blocks=aftr", "lora.blocks", "after"),
        ("lora.blocks=[]", "lora.blocks", None),
        ("lora.blocks=null", "lora.blocks", None),
        ("layer.index=-1", "layer.index", 0),
        ("layer.index=[1,1]", "layer.index", [1]),
        ("layer.index=first", "layer.index", None),
        ("layer.index=1.5", "layer.index", None),
        ("layer.every=0", "layer.every", 1),
        ("layer.every=2 layer.index=3", "layer.every", "null"),
        ("layer.every=2 layer.first=-1", "layer.first", 0),
        ("layer.first=2", "layer.first", "null"),
        ("sae.width=16kk", "sae.width", None),
        ("sae.width=-5", "sae.width", None),
        ("sae.l0=0", "sae.l0", None),
        ("sae.path=x", "sae.path", "null"),
        ("sae.id=x", "sae.width", "null"),
        ("sae=registry", "sae.release", None),
        ("sae=disk", "sae.path", None),
        ("data.context_length=4", "data.context_length", 8),
        ("data.validation_tokens=0", "data.validation_tokens", 1),
        ("data.validation_tokens=100", "data.validation_tokens", 128),
        ("data.validation_share=0", "data.validation_share", 0.001),
        ("data.validation_share=1", "data.validation_share", 0.9),
        ("data.validation_share=-0.1", "data.validation_share", 0.001),
        ("train.seed=5000000000", "train.seed", 2**32 - 1),
        ("data.seed=-1", "data.seed", 0),
        ("data=hf", "data.name", None),
        ("data=text_files", "data.files", None),
        ("train.train_tokens=0", "train.train_tokens", 1),
        ("train.train_tokens=100", "train.train_tokens", 512),
        ("train.batch_size=0", "train.batch_size", 1),
        ("train.lr=0", "train.lr", None),
        ("train.lr=nan", "train.lr", None),
        ("train.lr=inf", "train.lr", None),
        ("train.warmup_share=2", "train.warmup_share", 1.0),
        ("train.loraplus_ratio=0", "train.loraplus_ratio", None),
        ("train.weight_decay=-1", "train.weight_decay", 0),
        ("train.grad_clip=0", "train.grad_clip", "null"),
        ("train.checkpoint_every_min=0", "train.checkpoint_every_min", "null"),
        ("train.eval_every_tokens=0", "train.eval_every_tokens", 1),
        ("train.seed=-3", "train.seed", 0),
        ("evaluation.task_limit=0", "evaluation.task_limit", 1),
        ("evaluation.few_shot=-1", "evaluation.few_shot", 0),
        ("evaluation.task_batch_size=0", "evaluation.task_batch_size", 1),
        ("tracking.finish_timeout_s=0", "tracking.finish_timeout_s", None),
        ("model.name=''", "model.name", "tiny"),
        ("sweep=''", "sweep", "main"),
        ("sweep=a/b", "sweep", "a_b"),
    ],
)
def test_impossible_values(override: str, field: str, nearest: object) -> None:
    overrides = override.split()
    sets_group = any(value.partition("=")[0] in GROUPS for value in overrides)
    with pytest.raises(ConfigError) as error:
        (composed if sets_group else with_values)(*overrides)
    assert error.value.field == field
    assert error.value.nearest == nearest
    assert str(error.value).startswith(f"{field} = ")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lora.rnk=3", ["no key lora.rnk", "nearest valid: lora.rank"]),
        ("rank=3", ["no key rank", "nearest valid: lora.rank"]),
        ("lora.rank=many", ["lora.rank = 'many'", "a whole number"]),
        ("lora.rank=3.5", ["lora.rank = '3.5'", "nearest valid: lora.rank=4"]),
        ("train.lr=fast", ["train.lr = 'fast'", "a number"]),
        ("data.repeat=maybe", ["data.repeat = 'maybe'", "true or false"]),
        ("train.schedule=lineer", ["train.schedule = 'lineer'", "nearest valid: train.schedule=linear"]),
        ("train.dtype=float16", ["train.dtype = 'float16'", "float32, bfloat16"]),
        ("layer.hook=mlp", ["layer.hook = 'mlp'", "or null", "nearest valid: layer.hook=mlp_out"]),
        ("layer.every=often", ["layer.every = 'often'", "a whole number or null"]),
        ("sae=gema_scope", ["sae = 'gema_scope'", "nearest valid: sae=gemma_scope"]),
        ("model=gpt_2", ["model = 'gpt_2'", "nearest valid: model=gpt2"]),
        ("lora=[", ["lora=[", "cannot be read"]),
    ],
)
def test_errors_of_hydra_are_explained(override: str, words: list[str]) -> None:
    with pytest.raises(Exception) as error:
        composed(override)
    explained = explanation(error.value)
    assert all(word in explained for word in words), explained
    assert "HYDRA_FULL_ERROR" not in explained


@pytest.mark.parametrize("override", ["+foo=1", "+lora.foo=1", "+train.deep.foo=1"])
def test_added_keys_are_refused(override: str) -> None:
    with pytest.raises(Exception) as error:
        composed(override)
    assert "foo" in explanation(error.value) or "deep" in explanation(error.value)


def test_every_field_is_documented() -> None:
    """Each dataclass field has a docstring on the next line."""
    package = CONF.parent / "sae_lora"
    files = package / "config" / "schema.py", package / "config" / "execution.py"
    lines = [line for file in files for line in file.read_text().splitlines()]
    for name in {key.rsplit(".", 1)[-1] for key in keys() if "." in key}:
        fields = [n for n, line in enumerate(lines) if line.startswith(f"    {name}: ")]
        assert fields, name
        assert all('"""' in lines[n + 1] for n in fields), name


def test_yaml_round_trip() -> None:
    config = composed("lora.blocks=[1,2]", "layer.index=[2,3]", "lora.targets=[q,up]")
    assert load(OmegaConf.to_yaml(as_dict(config))) == config


@pytest.mark.parametrize(
    "override",
    [
        "tracking=disabled",
        "sweep=other",
        "output_dir=/elsewhere",
        "train.device=cpu",
        "data.cache_dir=/elsewhere",
        "launcher.retry_failed=true",
        "train.eval_batch_tokens=300",
    ],
)
def test_keys_without_effect_on_results_keep_the_hash(override: str) -> None:
    assert identity(composed(override)) == identity(composed())


def test_keys_with_an_effect_on_results_change_the_hash() -> None:
    overrides = [
        *("lora.rank=3", "lora.alpha=1", "lora.blocks=all", "lora.targets=qv", "train.seed=1"),
        *("train.lr=1e-5", "train.train_tokens=1024", "data.seed=1", "data.context_length=64"),
        *(
            "model.revision=x",
            "sae.keep_special_tokens=true",
            "sae.dtype=bfloat16",
            "train.batch_size=2",
        ),
    ]
    changed = {identity(with_values(override)) for override in overrides}
    assert len(changed | {identity(composed())}) == 14


def test_defaults_of_schema_and_files_agree() -> None:
    """`python launch.py` means the same as the documented defaults."""
    config = composed()
    for group in ("lora", "train"):
        schema, values = getattr(Config(), group), getattr(config, group)
        assert schema == values


def test_the_model_determines_the_default_tasks() -> None:
    """The command line has priority over the model."""
    tiny_tasks, default_tasks = ["tiny_continuation", "tiny_generation"], EvaluationConfig().tasks
    assert composed("evaluation=all").evaluation.tasks == tiny_tasks
    gpt2 = composed("model=gpt2", "sae=identity", "evaluation=all")
    assert gpt2.evaluation.tasks == default_tasks
    assert composed("evaluation.tasks=[piqa]").evaluation.tasks == ["piqa"]


def test_paper_recipe() -> None:
    config = composed("train=paper", "lora=paper", "model=gemma2_2b", "sae=gemma_scope", "data=pile")
    assert config.train.lr == 5e-5
    assert config.train.kl_reduction.name == "sequence_sum"
    assert config.train.schedule.name == "constant"
    assert config.train.dtype.name == "bfloat16"
    assert (config.lora.alpha, config.lora.dropout) == (32, 0.1)


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        ("16k", 16384),
        ("65k", 65536),
        ("131k", 131072),
        ("1m", 1048576),
        ("1024", 1024),
        ("4k", 4096),
        ("524k", 524288),
    ],
)
def test_widths(width: str, expected: int) -> None:
    assert latents(width) == expected


def test_targets_are_names_and_patterns() -> None:
    assert target_words("all") == ["all"]
    assert target_words(["up", "self_attn.*_proj"]) == ["up", "self_attn.*_proj"]
    for pattern in ("self_attn.q_proj", "q_proj", "*q_proj", "attn.*", "self_attn.?_proj"):
        assert matches("self_attn.q_proj", pattern) == (pattern != "attn.*"), pattern
    assert not matches("mlp.gate_proj", "ate_proj")


def test_names_show_patterns_without_characters_that_shells_expand() -> None:
    targets = "lora.targets=[q,self_attn.*_proj]"
    assert readable_name(composed(targets)) == readable_name(composed()).replace(
        "-after", "-after-q+self_attn.x_proj"
    )
    assert identity(composed(targets)) != identity(composed("lora.targets=q"))


def test_readable_names_differ_if_configs_differ() -> None:
    names = {
        readable_name(composed(f"lora.rank={rank}", f"train.seed={seed}"))
        for rank in (1, 2)
        for seed in (0, 1)
    }
    assert len(names) == 4


def test_missing_values_are_reported() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=["model.name=???"])
    with pytest.raises(Exception) as error:
        check(typed(config))
    assert "model.name" in explanation(error.value)


@pytest.mark.parametrize(
    ("overrides", "field", "words"),
    [
        ("layer.every=2 layer.index=3", "layer.every", "layer.index is 3"),
        ("method=e2e sae=identity", "sae.family", "can be trained"),
        ("method=sae sae.width=256 sae.l0=300", "sae.l0", "nearest valid: sae.l0=256"),
        ("method=sae sae.l0=2.5", "sae.l0", "nearest valid: sae.l0=2"),
        ("method=sae method.checkpoints=[1,1]", "method.checkpoints", "each share once"),
        ("method=sae method.checkpoints=[0,2]", "method.checkpoints", "above 0 and up to 1"),
        ("method=lora method.checkpoints=[0.5]", "method.checkpoints", "nothing but SAEs"),
        ("method=lora_sae method.checkpoints=[0.5]", "method.checkpoints", "nothing but SAEs"),
        ("method=lora_sae method.lora_lr=0", "method.lora_lr", "init"),
        ("method=lora_sae method.lora_lr=-1", "method.lora_lr", "0 or above"),
        ("method.lora_lr=1e-3", "method.lora_lr", "lora_sae"),
        ("method=linear_adapter method.rank=0", "method.rank", "nearest valid: method.rank=1"),
        ("method=mezo lora.dropout=0.1", "lora.dropout", "nearest valid: lora.dropout=0"),
        ("method=e2e sae.sparsity_coefficient=2", "sae.sparsity_coefficient", "is sae.l0"),
        (
            "method=sae launcher.gpus_per_node=2",
            "launcher.gpus_per_node",
            "one process trains a new SAE",
        ),
        (
            "method=e2e launcher.processes_per_node=2 train.device=cpu",
            "launcher.processes_per_node",
            "one process trains a new SAE",
        ),
    ],
)
def test_impossible_combinations(overrides: str, field: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        composed(*overrides.split())
    assert error.value.field == field
    assert words in str(error.value)
