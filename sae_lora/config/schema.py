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
    LauncherKind,
    Method,
    Reduction,
    SAEFamily,
    Schedule,
    TextSource,
    TrackingMode,
)
from sae_lora.config.evaluation import EvaluationConfig


@dataclass
class ModelConfig:
    """The language model. It is frozen; the teacher is this model as it is."""

    name: str = MISSING
    """Hugging Face repository (`org/name`), a local folder, or `tiny` for the embedded model."""
    revision: str | None = None
    """Branch, tag or commit of the repository; null is its default branch."""
    commit: str | None = None
    """Commit of `revision` when the run was planned. The launcher writes it."""
    dtype: DType = DType.float32
    """Precision the weights are loaded in."""
    attention: Attention = Attention.auto
    """auto, eager, sdpa, flash_attention_2, flex_attention, or blockwise, our own, which auto takes for
    soft-capped scores (Gemma-2) on a CPU. Changes time and memory; the result by rounding alone."""
    middle_block: int = 0
    """The block of an SAE when `layer.index` is null and the SAE does not say."""

    @property
    def pinned_revision(self) -> str | None:
        """The revision to read: the commit where the run was planned with one, else `revision`."""
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
    """One SAE that exists. The planner writes these; they are not for the command line."""

    block: int = MISSING
    """The block that the SAE is in."""
    hook: Hook = Hook.resid_post
    """The part of the block that the SAE replaces: attn_out, mlp_out, or its output, resid_post."""
    release: str | None = None
    """Registry release."""
    id: str | None = None
    """Registry id within the release."""
    path: str | None = None
    """Folder in sae-lens's format."""
    commit: str | None = None
    """Commit of the release's repository when the run was planned."""
    sha256: str | None = None
    """SHA-256 of the weights file in that folder: another SAE there is another run."""
    width: int | None = None
    """Number of latents, where known before loading."""
    l0: float | None = None
    """Mean active latents per token, as the SAE's makers state it."""
    adapter: Adapters | None = None
    """A trained map on the SAE's output."""
    group: list[int] = field(default_factory=list)
    """The blocks that share the SAE, where it is one for several."""


@dataclass
class SAEConfig:
    """The sparse autoencoder. It is frozen. Everything is loaded through sae-lens."""

    family: SAEFamily = MISSING
    """tiny, gemma_scope, llama_scope, registry, disk, identity, or new: the run makes it (sae, e2e)."""
    width: str | None = None
    """Number of latents: `16k`, `131k`, `1m` or a number. The nearest that exists is taken."""
    l0: float | None = None
    """Active latents per token. The nearest that exists is taken. New SAE: the k of topk, batchtopk
    and matryoshka, or the target of jumprelu; standard and gated have none."""
    architecture: Architecture = Architecture.topk
    """New SAE: topk, batchtopk, matryoshka, jumprelu, standard (L1) or gated."""
    sparsity_coefficient: float | None = None
    """New jumprelu, standard or gated SAE: weight of its sparsity penalty; null: sae-lens's own."""
    release: str | None = None
    """sae-lens registry release (family `registry`)."""
    id: str | None = None
    """sae-lens registry id within the release (family `registry`)."""
    path: str | None = None
    """Folder in sae-lens's format (family `disk`); `{block}` in it stands for the block's index."""
    dtype: DType = DType.float32
    """Precision of the SAE's weights and arithmetic."""
    sparse: bool | None = None
    """Multiply active latents alone, in decoding and in every gradient, of a TopK, JumpReLU or ReLU SAE.
    Null: from 16k latents on. Changes time and memory; the result by rounding alone."""
    keep_special_tokens: bool | None = None
    """Whether positions of BOS and EOS keep their activation. Null is true for SAEs that were not
    trained on them (Gemma Scope, and those whose own config says so), false otherwise."""
    used: list[SAEChoice] = field(default_factory=list)
    """The SAEs that the request resolved to. Written by the planner."""


@dataclass
class LayerConfig:
    """Place of the SAE in the model."""

    index: Any = None
    """A block's index or a list of them. Null: the SAE's own metadata, or the model's `middle_block`."""
    hook: Hook | None = None
    """resid_pre or resid_post, the residual stream before or after the block; attn_out or mlp_out, which
    its attention or its MLP adds to that. Null: the SAE's own metadata, or resid_post."""
    every: int | None = None
    """An SAE at every n-th block, all at once, as far as there are such SAEs; instead of `index`."""
    first: int | None = None
    """The first block of `every`; null: the first that has such an SAE."""
    amad_max: float | None = None
    """method=sae: one SAE for each group of blocks that lie close, in as few groups as keep the mean of
    their widest angular distances below this (arXiv 2410.21508). Every block but the last has one."""
    n_groups: int | None = None
    """method=sae: the same in so many groups."""
    evenly: bool = False
    """With `n_groups`: groups of neighbouring blocks of equal size, whatever their distances."""


@dataclass
class LoRAConfig:
    """The adapters. They are peft's, and the only weights that move."""

    rank: int = 16
    """Rank r of every adapter."""
    alpha: Any = 6.0
    """Scale: an adapter adds (alpha / rank) · B · A, or (alpha / √rank) · B · A if rank-stabilised. A
    number, or a multiple of the rank such as 2r. The planner writes the number."""
    dropout: float = 0.0
    """Dropout on the adapter's input while training."""
    targets: Any = "all"
    """Matrices: all, attn, mlp, qv, one of q k v o gate up down, or a list of these."""
    blocks: Any = "after"
    """Blocks: after (the first SAE), all, or a list of indices."""
    rank_stabilised: bool = True
    """Scale by alpha / √rank instead of alpha / rank (arXiv 2312.03732)."""
    init: Initialisation = Initialisation.svd
    """A begins with kaiming, peft's random numbers, or svd, the directions of its input that the matrix
    stretches most, in the same length. B begins with zeros."""
    begun: Adapters | None = None
    """The trained adapters that `init` stands for, with which these begin. The planner writes it."""
    dora: bool = False
    """Learn the length of each of the matrix's columns apart from their direction (arXiv 2402.09353)."""


@dataclass
class MethodConfig:
    """The method: the weights that are trained, and how."""

    kind: Method = Method.lora
    """lora, mezo (LoRA by forward passes alone), linear_adapter or mlp_adapter (on the SAE's output),
    sae_finetune, e2e (the SAE, end to end) or sae (the SAE, to reconstruct)."""
    rank: int | None = None
    """linear_adapter: rank of its map; mlp_adapter: its hidden width; null: the model's width.
    sae_finetune: rank of LoRA on the SAE's two matrices; null: all of its weights move."""
    mse: bool = True
    """sae_finetune: KL and reconstruction error, balanced (arXiv 2503.17272); false: KL alone."""
    epsilon: float = 1e-3
    """mezo: distance that weights are moved to measure the loss."""
    dead_after_tokens: int = 100_000
    """sae_finetune, e2e, sae: tokens without being active after which a latent counts as dead, and is
    revived by an auxiliary loss where the SAE's architecture has one."""
    buffer_tokens: int = 65_536
    """sae: tokens whose activations are held and shuffled among each other."""
    checkpoints: list[float] = field(default_factory=list)
    """sae, e2e, sae_finetune: shares of the training tokens after which the SAE is saved: [0.1,0.5]."""


@dataclass
class DataConfig:
    """Text, and how it becomes sequences."""

    source: TextSource = MISSING
    """stdlib (the embedded default), text_files or hub."""
    name: str | None = None
    """Hugging Face data set (`org/name`), for source `hub`."""
    subset: str | None = None
    """The data set's configuration, where it has several."""
    split: str = "train"
    """The data set's split."""
    revision: str | None = None
    """Branch, tag or commit of the data set."""
    version: str | None = None
    """Commit of the data set, or hash of the text, when the run was planned. The launcher writes it."""
    column: str = "text"
    """The column that holds the text."""
    streaming: bool = True
    """Read the data set as a stream, rather than download it whole."""
    shuffle_buffer: int = 10_000
    """Documents in the buffer that a stream is shuffled in."""
    files: Any = None
    """Paths or glob patterns, for source `text_files`: .txt and other text, .jsonl, .jsonl.zst."""
    context_length: int = 128
    """Tokens per sequence, BOS included."""
    validation_tokens: int = 32_768
    """Held-out tokens that every evaluation reads."""
    validation_share: float = 0.1
    """Share of documents that are held out; the same documents for every run of the same data."""
    seed: int = 42
    """Order of the documents and of the training sequences."""
    repeat: bool = False
    """Go round again when the text ends before `train.train_tokens`; else that is an error."""
    cache_dir: str = "~/.cache/sae_lora"
    """Folder for tokenised text. Does not change a result."""


@dataclass
class TrainConfig:
    """The optimisation."""

    train_tokens: int = 400_000
    """Tokens trained on."""
    batch_size: int = 4
    """Sequences per step."""
    micro_batch_size: int | None = None
    """Sequences per forward and backward pass, whose gradients add up to the step's; null: all of them.
    Changes memory; the result by rounding and by the inputs that dropout hits."""
    activation_checkpointing: bool = False
    """Compute live blocks again in the backward pass. Changes memory and time, not the result."""
    lr: float = 4.5e-3
    """Peak learning rate of AdamW."""
    schedule: Schedule = Schedule.linear
    """constant, or linear: falling to zero at the end."""
    warmup_share: float = 0.15
    """Share of the steps over which the rate rises from zero."""
    loraplus_ratio: float = 1.0
    """Learning rate of the adapters' B over that of A (LoRA+, arXiv 2402.12354)."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    grad_clip: float | None = 1.0
    """Largest norm of the adapters' gradient; null does not clip."""
    kl_reduction: Reduction = Reduction.token_mean
    """token_mean: nats per token. sequence_sum: summed over each sequence, as in the published code,
    so that `grad_clip` binds in nearly every step."""
    kl: KLComputation = KLComputation.fused
    """fused, or full: all logits at once, to check against. The result differs by rounding alone."""
    kl_chunk_tokens: int | None = None
    """Tokens whose logits are held at once; null: those of 4M logits on a CPU and of 256M on a GPU, but
    at least 88. Changes memory; the result by rounding alone."""
    eval_every_tokens: int = 100_000
    """Training tokens between two evaluations."""
    eval_each_sae: bool = True
    """At the end, also evaluate each of several SAEs alone, and left out. Does not change training."""
    eval_batch_tokens: int = 4096
    """Tokens per forward pass of an evaluation; changes memory, not the result."""
    eval_cache_gb: float = 2.0
    """Room for hidden states kept between evaluations, where all fit. Changes time, not the result."""
    checkpoint_every_steps: int = 200
    """Steps between two checkpoints, the most that a crash can cost. Does not change a result."""
    seed: int = 0
    """The adapters' initial values and dropout."""
    device: Device = Device.auto
    """auto, cpu or cuda."""
    dtype: DType = DType.float32
    """Precision the forward and backward pass computes in. Adapters are always float32."""
    tf32: bool = False
    """Multiply float32 matrices in TF32 where a GPU has it: results change in their third digit."""


@dataclass
class LauncherConfig:
    """Place and manner in which the plan runs. Does not change a result."""

    kind: LauncherKind = LauncherKind.local
    """local: on this machine. slurm: as array jobs on a cluster."""
    pack: Any = "auto"
    """Runs that train together in one process and share the frozen part of their work: auto (as many as
    fit, up to eight), off, or the largest number. Each run is the same as alone."""
    gpu_mem_gb: float | None = None
    """Memory of a GPU, which packs must fit into; null: this machine's, and 40 on a cluster."""
    dry_run: bool = False
    """Print the plan and stop."""
    strict: bool = False
    """Refuse a width or an L0 that does not exist, rather than take the nearest, and a point of a sweep
    without an SAE, rather than drop it."""
    retry_failed: bool = False
    """Run again what failed before."""
    timeout_min: int | None = None
    """Minutes a job is given before it saves and is started again; null: no limit. SLURM needs one."""
    signal_delay_s: int = 90
    """Seconds before the end of that time at which a run is asked to save."""
    cpus_per_task: int | None = None
    """CPU cores of a run; null: an equal share of this machine's, or what the cluster gives."""
    max_parallel: int | None = None
    """local: runs at a time; null: one per GPU, or one where there is none."""
    partition: str | None = None
    """slurm: the partition; null: the cluster's default."""
    account: str | None = None
    """slurm: the account that pays."""
    qos: str | None = None
    """slurm: quality of service."""
    constraint: str | None = None
    """slurm: features that a node must have."""
    gpus_per_node: int = 1
    """GPUs of a job on each of its nodes; 0 for none. Several share the batches of its pack."""
    nodes: int = 1
    """slurm: nodes of a job, which share the batches of its pack."""
    processes_per_node: int | None = None
    """Processes that share the batches of a pack on each node; null: as many as GPUs, or one."""
    mem_gb: float | None = None
    """slurm: main memory of a job; null: the partition's default."""
    setup: list[str] = field(default_factory=list)
    """slurm: shell commands at the beginning of a job (`module load …`)."""
    array_parallelism: int = 256
    """slurm: jobs of an array that may run at the same time."""
    max_array_size: int = 1000
    """slurm: jobs in one array; a larger sweep becomes several."""
    sbatch: Any = None
    """slurm: any further sbatch option, as `{option: value}`."""
    wait: bool = False
    """slurm: stay and show the runs until they have ended."""

    @property
    def node_processes(self) -> int:
        """Processes on each node that share the batches of a pack."""
        return self.processes_per_node or self.gpus_per_node or 1


@dataclass
class TrackingConfig:
    """Weights & Biases. Does not change a result."""

    mode: TrackingMode = TrackingMode.auto
    """auto: online when logged in and the server answers, else offline."""
    project: str = "sae_lora"
    """W&B project."""
    entity: str | None = None
    """W&B user or team; null is the account's default."""
    finish_timeout_s: float = 30.0
    """Seconds that the end of a run may wait for uploads."""


@dataclass
class Config:
    """One run, completely, as `config.yaml` in a run folder holds it."""

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
    """Folder of a finished run whose SAE or adapters this one begins with. Or the method of another run
    of the same command, of the same model, layer and seed, which then comes first."""
    init_at: float = 1.0
    """Share of that run's training after which its SAE is taken: 1, or one of `method.checkpoints`."""
    sweep: str = "main"
    """Name of the folder under `output_dir` that the runs of one sweep share."""
    output_dir: str = "outputs"
    """Folder that holds the sweeps. Does not change a result."""


def as_list(value: Any) -> list[Any]:
    """A key that takes one value or a list of them, as a list."""
    return list(value) if isinstance(value, list) else [value]
