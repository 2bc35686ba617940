"""Loading of SAEs: what SAELens computes, or a refusal in one message."""

import dataclasses
import json
import tomllib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from packaging.requirements import Requirement
from sae_lens import SAE, TemporalSAE, TemporalSAEConfig
from sae_lens.loading import pretrained_sae_loaders
from sae_lens.loading.pretrained_sae_loaders import LLM_METADATA_KEYS
from sae_lens.registry import SAE_CLASS_REGISTRY, get_sae_class
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sae_lora.common.errors import ConfigError, UserError
from sae_lora.config.enums import DType, Reads, SAEFamily
from sae_lora.config.schema import SAEChoice, SAEConfig
from sae_lora.models.dimensions import Dimensions
from sae_lora.saes import probe
from sae_lora.saes.formats import converters
from sae_lora.saes.formats.folder import UNUSED_FACTOR
from sae_lora.saes.formats.weights import FACTORS
from sae_lora.saes.loading import LoadedSAE, load
from sae_lora.saes.metadata import KEYS, read_folder
from sae_lora.saes.places import TRANSCODERS, hooks_of
from sae_lora.splice.hooks import decoded
from tests.support.coders import topk_sae

D_IN, D_SAE = 16, 32
HOOK = "blocks.2.hook_resid_post"
MODEL = Dimensions(d_model=D_IN, n_blocks=4, d_vocab=1, max_context=None)
CONFIG = SAEConfig(family=SAEFamily.disk, dtype=DType.float32)
_VALUES: dict[str, dict[str, Any]] = {
    "topk": {"k": 4},
    "abstopk": {"k": 4},
    "temporal": {"n_heads": 2, "bottleneck_factor": 2, "kval_topk": 4},
    "matching_pursuit": {"max_iterations": 4},
}
USABLE = ("standard", "gated", "jumprelu", "topk", "abstopk", "matching_pursuit")
X = 3 * torch.randn(2, 5, D_IN, generator=torch.Generator().manual_seed(1)) + 1


def write(folder: Path, architecture: str = "standard", **values: Any) -> SAE[Any]:
    """Write a random SAE of SAELens's class; return it as SAELens loads it."""
    torch.manual_seed(0)
    kind, config_kind = get_sae_class(architecture)
    if "transcoder" in architecture:
        values = {"d_out": D_IN, "apply_b_dec_to_input": False} | values
    hooks = {"hook_name": HOOK}
    if architecture in TRANSCODERS:
        hooks = hooks_of(2, Reads.mlp_in)
    metadata = SAEMetadata(**hooks)
    values = _VALUES.get(architecture, {}) | values
    sae = kind(config_kind(d_in=D_IN, d_sae=D_SAE, metadata=metadata, **values))
    for weight in sae.parameters():
        weight.data.normal_(std=0.3)
    sae.save_model(folder)
    return SAE.load_from_disk(folder)


def loaded(folder: Path, config: SAEConfig = CONFIG) -> LoadedSAE:
    """The SAE of a folder, as a run loads it."""
    return load(config, read_folder(str(folder), None, None, MODEL), MODEL, torch.device("cpu"))


def change(folder: Path, **values: Any) -> None:
    """Change values of the folder's config; those of `metadata` are added to it."""
    file = folder / "cfg.json"
    config = json.loads(file.read_text())
    config["metadata"] |= values.pop("metadata", {})
    file.write_text(json.dumps(config | values))


@torch.no_grad()
def check_equal(folder: Path, expected: Tensor) -> None:
    """Assert that the loaded SAE reconstructs exactly this, as often as it is asked."""
    sae = loaded(folder).sae
    latents = sae.encode(X)
    for _ in range(2):
        assert torch.equal(decoded(sae, latents, X), expected)


def test_every_architecture_of_saelens_is_used_as_it_is_or_refused(tmp_path: Path) -> None:
    assert set(USABLE) < set(SAE_CLASS_REGISTRY)
    for architecture in SAE_CLASS_REGISTRY:
        expected = write(tmp_path / architecture, architecture)
        if architecture in (*USABLE, *TRANSCODERS):
            with torch.no_grad():
                check_equal(tmp_path / architecture, expected(X))
        else:
            with pytest.raises(ConfigError, match="no SAE or transcoder of single tokens"):
                loaded(tmp_path / architecture)


@pytest.mark.parametrize("normalisation", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("architecture", USABLE)
@pytest.mark.case("B2")
def test_an_sae_that_normalises_tokens(tmp_path: Path, architecture: str, normalisation: str) -> None:
    expected = write(tmp_path, architecture, normalize_activations=normalisation)
    with torch.no_grad():
        check_equal(tmp_path, expected(X))


@pytest.mark.parametrize("architecture", USABLE)
@pytest.mark.case("A4")
def test_a_factor_of_the_input_is_folded_where_it_is_known(tmp_path: Path, architecture: str) -> None:
    """A training checkpoint of SAELens has the factor beside the weights."""
    write(tmp_path, architecture, normalize_activations="expected_average_only_in")
    with pytest.raises(ConfigError, match="expected_average_only_in") as error:
        loaded(tmp_path)
    assert error.value.field == "sae.path"
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 2.0}))
    first = read_folder(str(tmp_path), None, None, MODEL)
    plain = SAE.load_from_disk(tmp_path)
    with torch.no_grad():
        recon = loaded(tmp_path).sae.decode(loaded(tmp_path).sae.encode(X))
        torch.testing.assert_close(recon, plain(2.0 * X) / 2.0)
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 4.0}))
    assert read_folder(str(tmp_path), None, None, MODEL).sha256 != first.sha256


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"normalize_activations": True, "metadata": {"sae_lens_version": "3.0"}}, "expected_average"),
        ({"normalize_activations": "covariance_whitening"}, "covariance_whitening"),
        ({"normalize_activations": "rms_norm"}, "rms_norm"),
        ({"architecture": "batchtopk"}, "architecture: batchtopk"),
        ({"architecture": "temporal"}, "architecture: temporal"),
        ({"reshape_activations": "hook_z"}, "reshape_activations: hook_z"),
        ({"metadata": {"hook_head_index": 0}}, "hook_head_index: 0"),
        ({"hook_point_head_index": 3}, "hook_head_index: 3"),
        ({"activation_fn_str": "tanh-relu"}, "activation_fn: tanh-relu"),
        (
            {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4, "signed": True}},
            "signed: true",
        ),
        ({"activation_fn_str": "topk"}, "gives no k"),
        ({"architecture": "topk", "k": 33}, "k: 33"),
        ({"architecture": "topk"}, "gives no k"),
        ({"architecture": "topk", "k": 4.0}, "k: 4.0"),
        ({"d_in": "16"}, "d_in: '16'"),
        ({"activation_fn_kwargs": "none"}, "activation_fn_kwargs: 'none'"),
        ({"metadata": {"group_blocks": 2}}, "group_blocks: 2"),
        ({"metadata": {"exclude_first_position": "false"}}, "exclude_first_position: 'false'"),
        ({"metadata": {"hook_name": 2}}, "hook_name: 2"),
        ({"residual_threshold": float("nan")}, "residual_threshold: nan"),
        ({"apply_b_dec_to_input": "false"}, "apply_b_dec_to_input: 'false'"),
        ({"k": 4}, "architecture: standard, but k: 4"),
        ({"architecture": None, "k": 4}, "gives no architecture, but k: 4"),
        ({"architecture": "topk", "k": -3}, "k: -3"),
        ({"residual_threshold": -1}, "residual_threshold: -1"),
        ({"max_iterations": 0}, "max_iterations: 0"),
        ({"d_in": 0}, "d_in: 0"),
        ({"metadata": {"sae_lens_version": 6}}, "sae_lens_version: 6"),
        ({"metadata": {"sae_lens_version": "new"}}, "sae_lens_version: new"),
    ],
)
def test_unknown_values_of_known_keys_are_refused_by_the_plan(
    tmp_path: Path, values: dict[str, Any], words: str
) -> None:
    write(tmp_path)
    change(tmp_path, **values)
    with pytest.raises(ConfigError, match=words) as error:
        read_folder(str(tmp_path), None, None, MODEL)
    assert error.value.field == "sae.path"


@pytest.mark.parametrize("key", ["d_in", "d_sae", "architecture"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    write(tmp_path)
    file = tmp_path / "cfg.json"
    values = json.loads(file.read_text())
    del values[key]
    file.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=rf"its cfg\.json gives no {key}"):
        loaded(tmp_path)


@pytest.mark.case("A5")
def test_what_is_done_is_said_for_every_key_of_saelens() -> None:
    written = set(LLM_METADATA_KEYS) | set(vars(SAEMetadata()))
    for architecture in USABLE:
        written |= {field.name for field in dataclasses.fields(get_sae_class(architecture)[1])}
    nested = {key.partition(".")[0] for key in KEYS}
    assert written - {"metadata"} <= nested


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.case("B5")
def test_a_weight_that_is_no_number_is_named(tmp_path: Path, wrong: float) -> None:
    write(tmp_path, "topk")
    weights = load_file(tmp_path / "sae_weights.safetensors")
    weights["W_dec"][3, 5] = wrong
    save_file(weights, tmp_path / "sae_weights.safetensors")
    with pytest.raises(ConfigError, match="1 of the 512 values of W_dec are NaN or infinite"):
        loaded(tmp_path)


@pytest.mark.parametrize("architecture", USABLE)
def test_metadata_that_is_null_states_nothing(tmp_path: Path, architecture: str) -> None:
    expected = write(tmp_path, architecture)
    file = tmp_path / "cfg.json"
    nothing = {"metadata": None, "device": None, "activation_fn_kwargs": {}}
    file.write_text(json.dumps(json.loads(file.read_text()) | nothing))
    sae = load(CONFIG, read_folder(str(tmp_path), 2, None, MODEL), MODEL, torch.device("cpu")).sae
    with torch.no_grad():
        assert torch.equal(sae.decode(sae.encode(X)), expected(X))


_INTEGERS = (torch.int8, torch.int32, torch.uint8, torch.bool)


@pytest.mark.parametrize("dtype", [*_INTEGERS, torch.complex64, torch.float8_e4m3fn])
def test_the_plan_refuses_weights_that_are_no_floats(tmp_path: Path, dtype: torch.dtype) -> None:
    write(tmp_path)
    file = tmp_path / "sae_weights.safetensors"
    weights = load_file(file)
    for name, weight in weights.items():
        save_file(weights | {name: weight.to(dtype)}, file)
        with pytest.raises(ConfigError, match=f"{name} in .* is stored as ") as error:
            read(tmp_path)
        assert error.value.field == "sae.path"
    for kept in (torch.float64, torch.float16, torch.bfloat16):
        save_file({name: weight.to(kept) for name, weight in weights.items()}, file)
        read(tmp_path)


def test_a_dry_run_reads_the_values_of_small_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "topk", rescale_acts_by_decoder_norm=True)
    probe.check_file(str(tmp_path))
    file = tmp_path / "sae_weights.safetensors"
    weights = load_file(file)
    for value, words in ((float("nan"), "are NaN or infinite"), (0.0, "1 rows of W_dec are zero")):
        weights["W_dec"][3] = value
        save_file(weights, file)
        for check in (lambda: probe.check_file(str(tmp_path)), lambda: loaded(tmp_path)):
            with pytest.raises(ConfigError, match=words):
                check()
    monkeypatch.setattr(probe, "_SMALL", 0)
    probe.check_file(str(tmp_path))


@pytest.mark.parametrize("size", [0, 5, 200, 2000])
@pytest.mark.case("B5")
def test_a_truncated_file_is_named(tmp_path: Path, size: int) -> None:
    write(tmp_path)
    file = tmp_path / "sae_weights.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(UserError, match="damaged or incomplete") as error:
        read(tmp_path)
    assert str(file) in str(error.value)
    assert "Hugging Face" not in str(error.value)


def read(folder: Path) -> SAEChoice:
    """The SAE of a folder, as the plan reads it."""
    return read_folder(str(folder), None, None, MODEL)


@pytest.mark.case("B5")
def test_the_plan_refuses_weights_that_do_not_belong_to_the_config(tmp_path: Path) -> None:
    for architecture in USABLE:
        folder = tmp_path / architecture
        write(folder, architecture)
        read(folder)
        change(folder, d_sae=64)
        with pytest.raises(ConfigError, match=r"in .* has the shape \[") as error:
            read(folder)
        assert error.value.field == "sae.path"
        assert "W_enc [16, 64]" in error.value.allowed or "W_dec [64, 16]" in error.value.allowed
        change(folder, d_sae=D_SAE)
        file = folder / "sae_weights.safetensors"
        weights = load_file(file)
        for name in weights:
            save_file({key: weights[key] for key in weights.keys() - {name}}, file)
            with pytest.raises(ConfigError, match=f"has no {name}"):
                read(folder)
        save_file(weights | {"W_x": torch.ones(2)}, file)
        with pytest.raises(ConfigError, match="holds W_x"):
            read(folder)


@pytest.mark.parametrize("name", ["scaling_factor", "finetuning_scaling_factor"])
@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "topk", "abstopk"])
def test_factors_of_latents_are_applied(tmp_path: Path, architecture: str, name: str) -> None:
    """Older versions of SAELens multiply the latents by them in `decode`; today's classes do not."""
    plain = write(tmp_path, architecture)
    file = tmp_path / "sae_weights.safetensors"
    weights, factors = load_file(file), torch.linspace(0.5, 2, D_SAE)
    for key in (True, False, None):  # factors of 1 need no key
        change(tmp_path, finetuning_scaling_factor=key)
        save_file(weights | {name: torch.ones(D_SAE)}, file)
        with torch.no_grad():
            check_equal(tmp_path, plain(X))
        save_file(weights | {name: factors}, file)
        if key:
            read(tmp_path)
            sae = loaded(tmp_path).sae
            with torch.no_grad():
                latents = plain.encode(X)
                assert torch.equal(sae.encode(X), latents)
                torch.testing.assert_close(sae.decode(latents), plain.decode(latents * factors))
        else:
            with pytest.raises(ConfigError, match=r"finetuning_scaling_factor: (false|null)"):
                read(tmp_path)


def test_factors_of_an_sae_of_the_hub_are_applied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(repo_id: str, filename: str, **_: Any) -> str:
        if not (tmp_path / filename).exists():
            raise EntryNotFoundError(filename)
        return str(tmp_path / filename)

    for module in (pretrained_sae_loaders, converters):
        monkeypatch.setattr(module, "hf_hub_download", download)
    plain = write(tmp_path / "sae")
    file, factors = tmp_path / "sae" / "sae_weights.safetensors", torch.linspace(0.5, 2, D_SAE)
    _, weights, _ = converters.load_from_hub("org/saes", "sae", cfg_overrides={"dtype": "float32"})
    assert torch.equal(weights["W_dec"], plain.W_dec)
    save_file(load_file(file) | {"scaling_factor": factors}, file)
    with pytest.raises(ValueError, match="finetuning_scaling_factor: null"):
        converters.load_from_hub("org/saes", "sae")
    save_file({"W_dec": factors.char()}, file)
    with pytest.raises(ValueError, match="W_dec is stored as I8"):
        converters.load_from_hub("org/saes", "sae")
    save_file(dict(plain.state_dict()) | {"scaling_factor": factors}, file)
    change(tmp_path / "sae", finetuning_scaling_factor=True)
    _, weights, _ = converters.load_from_hub("org/saes", "sae")
    torch.testing.assert_close(weights["W_dec"], plain.W_dec * factors[:, None])
    assert weights.keys() == plain.state_dict().keys()


def test_factors_that_numpy_cannot_read_need_the_key_too(tmp_path: Path) -> None:
    write(tmp_path)
    file = tmp_path / "sae_weights.safetensors"
    for name in FACTORS:
        weights = {key: weight for key, weight in load_file(file).items() if key not in FACTORS}
        save_file(weights | {name: torch.full((D_SAE,), 2.0, dtype=torch.bfloat16)}, file)
        with pytest.raises(ConfigError, match="finetuning_scaling_factor: null"):
            loaded(tmp_path)


@pytest.mark.parametrize("shape", [(), (1,), (D_IN,), (D_SAE, 1)])
def test_factors_of_another_shape_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    write(tmp_path)
    change(tmp_path, finetuning_scaling_factor=True)
    file = tmp_path / "sae_weights.safetensors"
    save_file(load_file(file) | {"scaling_factor": torch.full(shape, 2.0)}, file)
    with pytest.raises(ConfigError, match=r"scaling_factor in .* has the shape"):
        read(tmp_path)


def test_factors_that_the_encoder_would_see_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "topk", rescale_acts_by_decoder_norm=True)
    file = tmp_path / "sae_weights.safetensors"
    save_file(load_file(file) | {"scaling_factor": torch.full((D_SAE,), 2.0)}, file)
    change(tmp_path, finetuning_scaling_factor=True)
    with pytest.raises(ConfigError, match="reads the norms of its decoder"):
        read(tmp_path)


@pytest.mark.case("A3")
def test_the_plan_refuses_excluded_tokens_that_are_no_ids_of_the_model(tmp_path: Path) -> None:
    write(tmp_path)
    model = dataclasses.replace(MODEL, d_vocab=100)
    for value in (["<|bos|>"], [[5]], [5.0], [True], 5, "false", {"a": 1}, [-1], [100], [5, 1_000_000]):
        change(tmp_path, metadata={"exclude_special_tokens": value})
        with pytest.raises(ConfigError, match=r"its cfg\.json says exclude_special_tokens") as error:
            read_folder(str(tmp_path), None, None, model)
        assert error.value.field == "sae.path"
    for value, excluded in (([0, 99], (0, 99)), ([], ()), (True, True), (False, False), (None, False)):
        change(tmp_path, metadata={"exclude_special_tokens": value})
        choice = read_folder(str(tmp_path), None, None, model)
        assert load(CONFIG, choice, model, torch.device("cpu")).excluded == excluded


@pytest.mark.case("A4")
def test_a_factor_of_the_input_that_cannot_be_applied_is_refused(tmp_path: Path) -> None:
    write(tmp_path, normalize_activations="expected_average_only_in")
    for factor in (True, float("inf"), float("nan"), 0, -1.0, "2", [2]):
        (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": factor}))
        with pytest.raises(ConfigError, match=r"activation_scaler\.json says scaling_factor"):
            read(tmp_path)
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 3.0}))
    assert UNUSED_FACTOR not in loaded(tmp_path).stated
    change(tmp_path, normalize_activations="none")
    assert loaded(tmp_path).stated[UNUSED_FACTOR] == 3.0


class _Wrong(nn.Module):
    """An SAE that is right but for one of its methods."""

    def __init__(self, **methods: Any) -> None:
        super().__init__()
        self.sae = topk_sae()
        self.encode, self.decode = self.sae.encode, self.sae.decode
        self.forward = self.sae.forward
        for name, function in methods.items():
            vars(self)[name] = partial(function, self.sae)


def _of_batch(sae: Any, x: Tensor) -> Tensor:
    """Latents of a BatchTopK SAE in training: the largest of the batch."""
    latents = sae.encode(x)
    least = latents.flatten().topk(4 * latents[..., 0].numel() // 2).values[-1]
    return latents * (latents >= least)


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        ({"forward": lambda sae, x: sae(x) + x}, "own forward pass"),
        ({"decode": lambda sae, f: sae.decode(f) * torch.rand(1)}, "called again|forward pass"),
        ({"encode": lambda sae, x: sae.encode(x - x.mean(1, keepdim=True))}, "forward|other tokens"),
        ({"encode": _of_batch, "forward": lambda sae, x: sae.decode(_of_batch(sae, x))}, "other tokens"),
        ({"decode": lambda sae, f: sae.decode(f)[..., :9]}, "returns"),
        ({"decode": lambda sae, f: sae.decode(f) / 0}, "NaN or infinity"),
        ({"encode": lambda sae, x: sae.W_enc @ x}, "it fails on activations"),
    ],
)
def test_the_probe_names_what_differs(methods: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        probe.check_coder(_Wrong(**methods), 32, "sae.path", "x")
    probe.check_coder(_Wrong(), 32, "sae.path", "x")


@pytest.mark.case("B1")
def test_the_probe_refuses_an_sae_that_reads_earlier_tokens() -> None:
    torch.manual_seed(0)
    sae = TemporalSAE(TemporalSAEConfig(d_in=D_IN, d_sae=D_SAE, **_VALUES["temporal"]))
    with pytest.raises(ConfigError, match="differs from the SAE's own forward pass"):
        probe.check_coder(sae, D_IN, "sae.path", "x")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 4096])
def test_the_probe_accepts_rounding_and_draws_nothing(width: int, dtype: torch.dtype) -> None:
    sae = topk_sae(k=32, width=width).to(dtype)
    state = torch.random.get_rng_state()
    probe.check_coder(sae, 32, "sae.path", "x")
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.case("B16")
def test_versions_of_saelens_that_cannot_be_imported_are_excluded() -> None:
    """6.50 and 6.51 fail to import with transformer-lens 4."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (requirement,) = (text for text in project["dependencies"] if text.startswith("sae-lens"))
    versions = Requirement(requirement).specifier
    assert versions.contains("6.52.0") and not versions.contains("6.51.0")
