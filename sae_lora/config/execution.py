"""The schema of `launcher`, `evaluation` and `tracking`: what cannot change how a run is trained."""

from dataclasses import dataclass, field
from typing import Any

from sae_lora.config.enums import LauncherKind, Suite, TrackingMode

BENCHMARKS = ("core", "sparse_probing", "scr", "tpp", "absorption")
"""The benchmarks of SAEBench that work with any model and need no account and no LLM judge."""
SHORTEST_TEXT = 2
"""Least number of tokens of a text for steering: the first token is only context."""


def switch(value: Any) -> bool | None:
    """on and off as true and false, `None` for auto and all else. YAML reads on and off as booleans."""
    return {"on": True, "off": False, True: True, False: False}.get(value)


@dataclass
class EvaluationConfig:
    """The measurements of finished runs. Does not change their training."""

    suites: list[Suite] = field(default_factory=list)
    """Suites at the end of each run: core, mechanism, lora, latents, tasks, steering, saebench,
    circuits; or downstream (tasks, steering, saebench). `sae-lora evaluate` runs them at any time."""
    resamples: int = 1000
    """Number of bootstrap resamples of held-out sequences, for intervals of means."""
    sequences: int = 500
    """Largest number of held-out sequences that the suites mechanism and lora read."""
    directions: int = 16
    """Suite lora: largest number of directions of the SAE's error and decoder to compare with
    adapters."""
    steering_latents: Any = 8
    """Latents to steer with: a list of indices, or a number; then the latents whose activations separate
    texts best."""
    steering_block: int | None = None
    """Block of the SAE with these latents; null: the first SAE."""
    steering_strengths: list[float] = field(default_factory=lambda: [0.0625, 0.125, 0.25, 0.5, 1.0])
    """Strengths to try, in units of the latent's mean activation where it is active. For each latent and
    model the strength that is best on one half of the texts is measured on the other half."""
    steering_max_harm: float | None = 0.0
    """Largest loss of positive texts, in nats per token, that a strength may cause; with 0 they must
    become likelier. Null: no limit."""
    steering_texts: str | None = None
    """A .jsonl file of text to steer on, with the fields `latent` (index), `text` and `label` (positive
    if the text has what the latent stands for, else negative). Null: held-out text, labelled by
    activation."""
    steering_examples: int = 8
    """Held-out text: largest number of positive texts per latent in each half, and of negative ones."""
    steering_text_tokens: int = 64
    """Held-out text: tokens per text, from the beginning of a sequence."""
    tasks: list[str] = field(default_factory=lambda: ["mmlu", "hellaswag", "truthfulqa_mc2"])
    """Tasks or groups of lm-evaluation-harness, or the included tiny_continuation and
    tiny_generation."""
    task_limit: int | None = None
    """Number of documents per task, from the first; null: all."""
    few_shot: int | None = None
    """Number of examples before each document; null: the task's own number, or none."""
    task_batch_size: int = 8
    """Texts per forward pass of a task. Results differ only by rounding."""
    saebench: list[str] = field(default_factory=lambda: list(BENCHMARKS))
    """Benchmarks of SAEBench, which needs `sae-lora setup saebench` once."""
    saebench_options: Any = None
    """Fields of SAEBench's config classes, by benchmark, such as `{sparse_probing:
    {probe_train_set_size: 400}}`; null: SAEBench's own values."""
    saebench_python: str | None = None
    """Python of an environment with SAEBench; null: the environment of `sae-lora setup saebench`."""
    latents_effect_tokens: int = 4096
    """Suite latents: held-out tokens on which the effects of latents are measured."""
    latents_pages: bool = True
    """Suite latents: write pages to browse the latents, about 2 kB for each."""
    circuits_prompts: str | None = None
    """A .jsonl file of prompts for attribution graphs, with the field `text`. Null: ten of our own."""
    circuits_max_features: int = 8192
    """Largest number of active latents in an attribution graph."""
    circuits_python: str | None = None
    """Python of an environment with circuit-tracer; null: that of `sae-lora setup circuits`."""


@dataclass
class LauncherConfig:
    """Execution of runs. Does not change results."""

    kind: LauncherKind = LauncherKind.local
    """Place of execution: local (this machine) or slurm (array jobs on a cluster)."""
    pack: Any = "auto"
    """Runs that train together in one process and share the frozen model's work: auto (as many as fit,
    up to eight), off, or the largest number. Each run gives the same result as alone."""
    gpu_mem_gb: float | None = None
    """Memory of a GPU, in GB, which limits packs; null: this machine's GPU, or 40 on a cluster."""
    dry_run: bool = False
    """Print the plan and stop."""
    strict: bool = False
    """Refuse a width or an L0 that does not exist instead of taking the nearest, and a point of a sweep
    without an SAE instead of dropping it."""
    retry_failed: bool = False
    """Run failed runs again."""
    timeout_min: int | None = None
    """Time limit of a job, in minutes, after which it saves and is started again; null: none. slurm
    needs one."""
    signal_delay_s: int = 90
    """Seconds before the time limit at which runs are asked to save."""
    cpus_per_task: int | None = None
    """CPU cores of a job; null: an equal share of this machine, or the cluster's default."""
    max_parallel: int | None = None
    """local: jobs at a time; null: one per GPU, or one without GPUs."""
    partition: str | None = None
    """slurm: the partition; null: the cluster's default."""
    account: str | None = None
    """slurm: the account to charge."""
    qos: str | None = None
    """slurm: quality of service."""
    constraint: str | None = None
    """slurm: features that a node must have."""
    gpus_per_node: int = 1
    """GPUs of a job on each node; 0 for none. Several GPUs share each batch."""
    nodes: int = 1
    """slurm: nodes of a job. Several nodes share each batch."""
    processes_per_node: int | None = None
    """Processes on each node that share each batch; null: one per GPU, or one."""
    shard: Any = "auto"
    """Divide the frozen weights of the model's blocks among the processes that share each batch: on,
    off, or auto: if a run alone does not fit into a GPU. Saves memory; gathering weights takes time."""
    mem_gb: float | None = None
    """slurm: main memory of a job, in GB; null: the partition's default."""
    setup: list[str] = field(default_factory=list)
    """slurm: shell commands at the beginning of a job, such as `module load cuda`."""
    array_parallelism: int = 256
    """slurm: largest number of jobs of an array that run at the same time."""
    max_array_size: int = 1000
    """slurm: largest number of jobs in one array. A larger sweep becomes several arrays."""
    sbatch: Any = None
    """slurm: further sbatch options, as `{option: value}`."""
    wait: bool = False
    """slurm: wait until the runs end, and show their progress."""
    halving: Any = None
    """Successive halving: a config key such as train.lr, or a list of keys. Runs that are equal in all
    other keys compete by `objective`: at each rung, those that are not among the best stop. Null: off,
    and runs that were stopped so go on."""
    rungs: list[int] | None = None
    """halving: training tokens at which runs are compared, multiples of `train.eval_every_tokens`. Null:
    the first evaluations after an eighth, a quarter and a half of the training."""
    keep: float = 0.75
    """halving: share of the runs at a rung that goes on, rounded up to whole runs. 0.5 saves twice as
    much, and often loses the best run (docs/results/halving.md)."""

    @property
    def shards(self) -> bool | None:
        """`shard` as true, false, or `None` for auto."""
        return switch(self.shard)

    @property
    def node_processes(self) -> int:
        """Processes on each node that share the batches of a pack."""
        return self.processes_per_node or self.gpus_per_node or 1


@dataclass
class TrackingConfig:
    """Weights & Biases, or Trackio in its place. Does not change results."""

    mode: TrackingMode = TrackingMode.auto
    """auto (online if logged in and the server answers, else offline), online, offline, disabled, or
    trackio (in place of W&B, on this machine only)."""
    project: str | None = None
    """W&B project; null: WANDB_PROJECT, or else sae_lora."""
    entity: str | None = None
    """W&B user or team; null: WANDB_ENTITY, or else the account's default."""
    name: str | None = None
    """Name of the run in W&B; null: WANDB_NAME, or else the name of its folder without the hash. In a
    sweep, what varies stands before it."""
    tags: list[str] = field(default_factory=list)
    """More tags in W&B; empty: WANDB_TAGS."""
    notes: str | None = None
    """A text about the run in W&B; null: WANDB_NOTES."""
    dir: str | None = None
    """Folder of W&B's own files; null: WANDB_DIR, or else the run folder."""
    finish_timeout_s: float = 30.0
    """Seconds that the end of a run may wait for uploads."""
