"""The shape of a run: one tree of dataclasses with names, types and units.

`conf/` holds the values. Hydra merges them into this schema, which rejects a misspelt key or a wrong
type; `validate.check` then rejects impossible values and combinations. No model is loaded by then.
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from sae_lora.config.enums import (
    Architecture,
    Attention,
    Device,
    DType,
    Hook,
    Initialisation,
    KLComputation,
    Method,
    Reads,
    Reduction,
    SAEFamily,
    Schedule,
    TextSource,
)
from sae_lora.config.execution import EvaluationConfig, LauncherConfig, TrackingConfig, switch


@dataclass
class ModelConfig:
    """The language model. It is frozen, and it is the teacher."""

    name: str = MISSING
    """Hugging Face repository (`org/name`), a local folder, or `tiny` for the embedded model."""
    revision: str | None = None
    """Branch, tag or commit of the repository; null is its default branch."""
    commit: str | None = None
    """Commit of `revision` when the run was planned. The planner writes it."""
    dtype: DType = DType.float32
    """Precision of the loaded weights."""
    attention: Attention = Attention.auto
    """Attention implementation: auto, eager, sdpa, flash_attention_2, flex_attention, blockwise, fused.
    auto takes fused on a GPU if the model's attention is causal, perhaps with windows and soft-capped
    scores, and blockwise for soft-capped scores (Gemma-2) on a CPU. Results differ only by rounding."""
    middle_block: int | None = None
    """Block of the SAE if `layer.index` is null and the SAE's metadata names no block. Null: half of the
    model's blocks; 3 for the embedded model."""
    fit_context: bool = False
    """Shorten `data.context_length` to the longest sequence that the model supports; false: refuse a
    longer one."""

    @property
    def pinned_revision(self) -> str | None:
        """The revision to read: the planned commit, or else `revision`."""
        return self.commit or self.revision


@dataclass
class Adapters:
    """Trained weights in the folder of a finished run. The planner writes these."""

    path: str = MISSING
    """The folder."""
    sha256: str = MISSING
    """SHA-256 of the weights file in it."""


@dataclass
class SAEChoice:
    """One existing SAE. The planner writes these; they are not for the command line."""

    block: int = MISSING
    """The block that the SAE is in."""
    hook: Hook = Hook.resid_post
    """The activation that the SAE replaces: resid_pre, attn_out, mlp_out or resid_post."""
    reads: Reads | None = None
    """The activation that a transcoder reads: mlp_in, mlp_normalized or resid_mid. Null: it is an SAE,
    which reads what it replaces."""
    release: str | None = None
    """Registry release."""
    id: str | None = None
    """Registry id within the release."""
    path: str | None = None
    """Folder of an SAE."""
    commit: str | None = None
    """Commit of the release's repository when the run was planned."""
    sha256: str | None = None
    """SHA-256 of the weights file in that folder. Other weights make another run."""
    width: int | None = None
    """Number of latents, if known before loading."""
    l0: float | None = None
    """Mean number of active latents per token, as published with the SAE."""
    adapter: Adapters | None = None
    """A trained map on the SAE's output."""
    group: list[int] = field(default_factory=list)
    """The blocks that share the SAE, if there are several."""


@dataclass
class SAEConfig:
    """The sparse autoencoder. It is frozen. Everything is loaded through sae-lens."""

    family: SAEFamily = MISSING
    """Source of the SAE: tiny, gemma_scope, llama_scope, transcoder, registry, disk, identity, or new,
    which the run trains."""
    width: str | None = None
    """Number of latents: `16k`, `131k`, `1m` or a number. The nearest existing SAE is used."""
    l0: float | None = None
    """Active latents per token. The nearest existing SAE is used. New SAE: k of topk, batchtopk and
    matryoshka, or the target of jumprelu; standard and gated have none."""
    architecture: Architecture = Architecture.topk
    """Architecture of a new SAE: topk, batchtopk, matryoshka, jumprelu, standard (L1) or gated. Or that
    of a new transcoder, from the input of an MLP to its output: batchtopk_transcoder or transcoder (L1).
    """
    sparsity_coefficient: float | None = None
    """Weight of the sparsity penalty of a new jumprelu, standard or gated SAE; null: sae-lens's
    default."""
    release: str | None = None
    """sae-lens registry release (family `registry`)."""
    id: str | None = None
    """sae-lens registry id within the release (family `registry`)."""
    path: Any = None
    """Folder of an SAE or transcoder (family `disk`), in the format of sae-lens, sparsify or
    dictionary_learning. `{block}` in it is replaced by the block's index. Or a list of folders, each of
    which names its own place, to mix SAEs and transcoders."""
    skip: bool = False
    """True for transcoders with a skip connection, a linear map from their input to their output: family
    `transcoder`, and new transcoders."""
    dtype: DType = DType.float32
    """Precision of the SAE's weights and arithmetic."""
    sparse: bool | None = None
    """Compute decoding and gradients of a TopK, JumpReLU or ReLU SAE from its active latents only. Null:
    true for 16k latents or more, on a GPU for 128k or more. Results differ only by rounding."""
    tf32: bool = True
    """On a GPU, multiply a bfloat16 residual stream with the encoder of a frozen float32 SAE in TF32:
    the residual stream is exact, and the encoder's weights are rounded to 11 bits. False: in float32."""
    keep_special_tokens: bool | None = None
    """Keep the original activation at BOS and EOS. Null: true for new SAEs and Gemma Scope; for other
    SAEs as they were trained (`exclude_special_tokens` of their config, which may list token ids)."""
    keep_first: bool | None = False  # what runs of version 0.1 did; conf/config.yaml sets null
    """Keep the original activation at the first position of each sequence, which models use as an
    attention sink, whatever its token. Null: true for new SAEs, and for SAEs that were trained so."""
    outlier_norm: float | None = None
    """Keep the original activation where its norm is more than this multiple of the median norm in the
    sequence; new SAEs are not trained there. Null: no position is left out for its norm."""
    used: list[SAEChoice] = field(default_factory=list)
    """The SAEs that the request resolved to. The planner writes them."""


@dataclass
class LayerConfig:
    """The place of the SAE in the model."""

    index: Any = None
    """Index of a block, or a list of indices. Null: from the SAE's metadata, or `model.middle_block`."""
    hook: Hook | None = None
    """The activation that the SAE replaces: resid_pre or resid_post (the residual stream before or after
    the block), attn_out or mlp_out (the output of attention or MLP). Null: from the SAE's metadata, or
    resid_post."""
    reads: Reads | None = None
    """The activation that a transcoder reads: mlp_in (the input of the MLP, after its norm),
    mlp_normalized (the same without the norm's weight) or resid_mid (the norm's input). Null: from the
    transcoder's metadata."""
    every: int | None = None
    """Put an SAE at every n-th block that has one, all at once; instead of `index`."""
    first: int | None = None
    """First block of `every`; null: the first block that has an SAE."""
    amad_max: float | None = None
    """method=sae: train one SAE per group of similar blocks, in the fewest groups with an AMAD below
    this. AMAD is the mean over groups of the largest angular distance between two blocks (arXiv
    2410.21508). The last block has no SAE."""
    n_groups: int | None = None
    """method=sae: train one SAE per group of similar blocks, in this number of groups."""
    evenly: bool = False
    """With `n_groups`: groups of neighbouring blocks of equal size, without regard to distances."""


@dataclass
class LoRAConfig:
    """The LoRA adapters, peft's, which are the only trained weights."""

    rank: int = 16
    """Rank r of every adapter."""
    alpha: Any = 6.0
    """Numerator of the scale: an adapter adds (alpha / rank) · B · A, or (alpha / √rank) · B · A if
    rank-stabilised. A number, or a multiple of the rank such as 2r."""
    dropout: float = 0.0
    """Dropout on the adapter's input during training."""
    targets: Any = "all"
    """Adapted matrices: all, attn, mlp, qkv, qv, one of q k v o gate up down, a pattern of paths in a
    block such as self_attn.*_proj, or a list of these. attn stands for everything that mixes positions.
    Routers, convolutions and other weights that are no matrices are left out; the plan lists them."""
    blocks: Any = "after"
    """Adapted blocks: after (those after the first SAE), all, or a list of indices."""
    rank_stabilised: bool = True
    """Scale by alpha / √rank instead of alpha / rank (arXiv 2312.03732)."""
    init: Initialisation = Initialisation.svd
    """Initial A: kaiming (peft's random numbers), or svd (the largest right-singular vectors of the
    matrix, in the same length). B is zero."""
    begun: Adapters | None = None
    """The trained adapters that these begin with, from `init`. The planner writes it."""
    dora: bool = False
    """DoRA: learn the length and the direction of weight columns separately (arXiv 2402.09353)."""
    selection: int | None = None
    """Version of the rule by which `targets` selects matrices; null: version 1 selects the same in this
    model. The planner writes it."""


@dataclass
class MethodConfig:
    """The method: the weights that are trained, and how."""

    kind: Method = Method.lora
    """Trained weights: lora, mezo (LoRA by forward passes only), linear_adapter or mlp_adapter (on the
    SAE's output), sae_finetune, lora_sae (LoRA and the SAE at once), e2e (an SAE, end to end) or sae (an
    SAE, to reconstruct)."""
    rank: int | None = None
    """linear_adapter: rank of the map; mlp_adapter: hidden width; null: the model's width. sae_finetune:
    rank of LoRA on the SAE's encoder and decoder; null: train all SAE weights."""
    mse: bool = True
    """sae_finetune, lora_sae: train the SAE with KL and reconstruction error, balanced (arXiv
    2503.17272); false: KL only."""
    lora_lr: float | None = None
    """lora_sae: learning rate of the adapters, if it is not that of the SAE, `train.lr`. 0: the adapters
    stay as in the run that `init` names, and only the SAE is trained."""
    epsilon: float = 1e-3
    """mezo: length of the step along a random direction to measure the loss."""
    dead_after_tokens: int = 100_000
    """sae_finetune, lora_sae, e2e, sae: a latent that is inactive for this many tokens counts as dead.
    The auxiliary loss of the architecture, if any, revives it."""
    buffer_tokens: int = 65_536
    """sae: number of tokens whose activations are buffered and shuffled."""
    checkpoints: list[float] = field(default_factory=list)
    """sae, e2e, sae_finetune: save the SAE after these shares of the training tokens, such as
    [0.1,0.5]."""


@dataclass
class DataConfig:
    """The text, and how it is cut into sequences."""

    source: TextSource = MISSING
    """Source of the text: stdlib (the Python standard library), text_files or hub."""
    name: str | None = None
    """Hugging Face data set (`org/name`), for source hub."""
    subset: str | None = None
    """Configuration of the data set, if it has several."""
    split: str = "train"
    """Split of the data set."""
    revision: str | None = None
    """Branch, tag or commit of the data set."""
    version: str | None = None
    """Commit of the data set, or hash of the text, when the run was planned. The planner writes it."""
    column: str = "text"
    """The column that holds the text."""
    streaming: bool = True
    """Read the data set as a stream instead of downloading it whole."""
    shuffle_buffer: int = 10_000
    """Number of documents in the shuffle buffer of a stream."""
    files: Any = None
    """Paths or glob patterns, for source text_files: text, .jsonl, .ndjson, .json, .parquet, .csv or
    .tsv, also compressed (.gz, .zst, .bz2, .xz)."""
    context_length: int = 128
    """Tokens per sequence, including BOS."""
    bos: Any = "auto"
    """Begin each sequence with BOS: auto (if the tokenizer begins a text with it), true (with EOS if the
    tokenizer has no BOS), or false."""
    validation_tokens: int = 32_768
    """Held-out tokens that each evaluation reads."""
    validation_share: float = 0.1
    """Share of documents that are held out. All runs on the same data hold out the same documents."""
    seed: int = 42
    """Seed of the order of documents and training sequences."""
    repeat: bool = False
    """Repeat the text if it ends before `train.train_tokens`; if false, that is an error."""
    cache_dir: str = "~/.cache/sae_lora"
    """Cache folder for tokenised text. Does not change results."""


@dataclass
class TrainConfig:
    """The optimisation."""

    train_tokens: int = 400_000
    """Number of training tokens."""
    batch_size: int = 4
    """Sequences per step."""
    micro_batch_size: int | None = None
    """Sequences per forward and backward pass; gradients are accumulated over a step. Null: the batch.
    Saves memory. Results differ only by rounding and by the random draws of dropout."""
    activation_checkpointing: bool = False
    """Recompute adapted blocks in the backward pass. Saves memory, takes time, does not change
    results."""
    lr: float = 4.5e-3
    """Peak learning rate of AdamW."""
    schedule: Schedule = Schedule.linear
    """Learning rate schedule: constant, or linear, which falls to zero at the end."""
    warmup_share: float = 0.15
    """Share of the steps in which the rate rises from zero."""
    loraplus_ratio: float = 1.0
    """Learning rate of B divided by the learning rate of A (LoRA+, arXiv 2402.12354)."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    grad_clip: float | None = 1.0
    """Largest norm of the gradient; null: no clipping."""
    kl_reduction: Reduction = Reduction.token_mean
    """Reduction of KL to the loss: token_mean (nats per token), or sequence_sum (summed over each
    sequence, as in the published code, so that `grad_clip` acts in nearly every step)."""
    kl: KLComputation = KLComputation.fused
    """Computation of KL: fused (a few tokens at a time), or full (all logits at once, as a reference).
    Results differ only by rounding."""
    kl_chunk_tokens: int | None = None
    """Tokens whose logits are in memory at once. Null: as many as make 16M logits on a CPU, but from
    256 to 512; on a GPU 256M logits. Results differ only by rounding."""
    eval_every_tokens: int = 100_000
    """Training tokens between two evaluations."""
    eval_each_sae: bool = True
    """With several SAEs, also evaluate each one alone and each one left out, at the end."""
    eval_batch_tokens: int = 4096
    """Tokens per forward pass of an evaluation. Changes memory, not results."""
    eval_cache_gb: float = 2.0
    """Memory for hidden states that are kept between evaluations, if all fit. Saves time."""
    checkpoint_every_steps: int = 200
    """Steps between two checkpoints: the most work that a crash can lose."""
    checkpoint_every_min: float | None = 10.0
    """Also save a checkpoint after this many minutes without one; null: only by steps. Such checkpoints
    are rarer if they would take more than 3% of the time."""
    seed: int = 0
    """Seed of initial weights and dropout."""
    device: Device = Device.auto
    """Device: auto, cpu or cuda."""
    dtype: DType = DType.float32
    """Precision of the forward and backward pass. Adapters are always float32."""
    tf32: bool = False
    """Multiply float32 matrices in TF32 on GPUs. Results change in the third digit."""
    deterministic: bool = False
    """Use only deterministic algorithms on a GPU, so that a run that was stopped and resumed gives the
    results of one that was not, to the last bit. Slower; operations without such an algorithm fail."""
    stack: Any = "auto"
    """Runs of a pack that go through the same blocks are one batch there: on, off, or auto (on for a GPU
    without `deterministic`). Results differ only by rounding; on a GPU, dropout hits other inputs."""

    compile: Any = "auto"
    """Compile the model's blocks with torch.compile, which takes a minute or more at the beginning: on,
    off, or auto (on for a GPU without `deterministic`). Results differ only by rounding."""

    adapter_products: Any = "auto"
    """Precision in which adapters are multiplied if runs are stacked or compiled: float32, bfloat16
    (needs `dtype` bfloat16), or auto (as `dtype` on a GPU, else float32). Their weights and gradients
    are float32 in any case."""

    def products_on(self, *, gpu: bool) -> DType:
        """The precision in which stacks multiply adapters on a GPU, or on a CPU."""
        if self.adapter_products == "auto":
            return self.dtype if gpu else DType.float32
        return DType[self.adapter_products]

    def compiles_on(self, *, gpu: bool) -> bool:
        """True if blocks are compiled on a GPU, or on a CPU."""
        return self._is_on(self.compile, gpu)

    def stacks_on(self, *, gpu: bool) -> bool:
        """True if runs of a pack are stacked on a GPU, or on a CPU."""
        return self._is_on(self.stack, gpu or self.adapter_products == DType.bfloat16.name)

    def _is_on(self, value: Any, gpu: bool) -> bool:
        if (chosen := switch(value)) is not None:
            return chosen
        return gpu and not self.deterministic and not self.activation_checkpointing


@dataclass
class Config:
    """The complete config of one run, as `config.yaml` in a run folder holds it."""

    model: ModelConfig = field(default_factory=ModelConfig)
    sae: SAEConfig = field(default_factory=SAEConfig)
    layer: LayerConfig = field(default_factory=LayerConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    init: str | None = None
    """Begin with the SAE or the adapters of another run: the folder of a finished run, or a method,
    which stands for the run of the same command with this method and the same model, layer and seed."""
    init_at: float = 1.0
    """Use the SAE of `init` after this share of its training: 1, or one of `method.checkpoints`."""
    objective: Any = "ce_gap"
    """The measure by which `launcher.halving` compares runs, and that an adaptive sweeper gets of each
    run; for a sweeper, also a list. ce_gap, kl, student_ce and fvu are to be minimised, gap_closed and
    top1_agreement to be maximised."""
    sweep: str = "main"
    """Name of the sweep: the folder under `output_dir` that holds its runs."""
    output_dir: str = "outputs"
    """Folder of all sweeps."""


WRITTEN_BY_PLANNER = frozenset(
    {"model.commit", "data.version", "sae.used", "lora.begun", "lora.selection"}
)
"""Keys that the planner fills in. Nobody sets them on the command line."""


def as_list(value: Any) -> list[Any]:
    """The value of a key that takes one value or a list, as a list."""
    return list(value) if isinstance(value, list) else [value]
