"""Enums for the config keys that accept only certain words."""

import enum


class DType(enum.Enum):
    """Floating-point format of a model's weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Device(enum.Enum):
    """Device of a run; `auto` is a GPU if there is one, else the CPU."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Attention(enum.Enum):
    """Implementation of attention; `auto` is the fused one on a GPU, blockwise for soft-capped scores on
    a CPU, and else transformers' choice."""

    auto = "auto"
    eager = "eager"
    sdpa = "sdpa"
    flash_attention_2 = "flash_attention_2"
    flex_attention = "flex_attention"
    blockwise = "blockwise"
    fused = "fused"


class SAEFamily(enum.Enum):
    """Source of an SAE. It also determines what is known about the SAE before loading."""

    tiny = "tiny"
    gemma_scope = "gemma_scope"
    llama_scope = "llama_scope"
    transcoder = "transcoder"
    registry = "registry"
    disk = "disk"
    new = "new"
    identity = "identity"


class Architecture(enum.Enum):
    """Architecture of a new SAE, by sae-lens's names."""

    topk = "topk"
    batchtopk = "batchtopk"
    matryoshka = "matryoshka"
    jumprelu = "jumprelu"
    standard = "standard"
    gated = "gated"
    transcoder = "transcoder"
    """Standard, from the input of an MLP to its output."""
    batchtopk_transcoder = "batchtopk_transcoder"
    """BatchTopK, from the input of an MLP to its output."""


TRANSCODING = (Architecture.transcoder, Architecture.batchtopk_transcoder)
"""Architectures of new transcoders."""


class Suite(enum.Enum):
    """Suite: a group of measurements of a finished run."""

    core = "core"
    mechanism = "mechanism"
    lora = "lora"
    tasks = "tasks"
    steering = "steering"
    saebench = "saebench"
    circuits = "circuits"
    latents = "latents"
    downstream = "downstream"
    """tasks, steering and saebench together, without those for which nothing is configured."""


class Method(enum.Enum):
    """Method: which weights are trained so that the model predicts better with its SAE."""

    lora = "lora"
    mezo = "mezo"
    linear_adapter = "linear_adapter"
    mlp_adapter = "mlp_adapter"
    sae_finetune = "sae_finetune"
    lora_sae = "lora_sae"
    e2e = "e2e"
    sae = "sae"


class Hook(enum.Enum):
    """Activation of a block that an SAE replaces: the residual stream before or after the block, or the
    output of attention or MLP.
    """

    resid_pre = "resid_pre"
    attn_out = "attn_out"
    mlp_out = "mlp_out"
    resid_post = "resid_post"


class Reads(enum.Enum):
    """Activation of a block that a transcoder reads: the input of the MLP, which is the output of the
    norm before it; the same without the norm's weight and bias; or the input of this norm.
    """

    mlp_in = "mlp_in"
    mlp_normalized = "mlp_normalized"
    resid_mid = "resid_mid"


class TextSource(enum.Enum):
    """Source of text."""

    stdlib = "stdlib"
    text_files = "text_files"
    hub = "hub"


class Schedule(enum.Enum):
    """Learning rate schedule after the warm-up."""

    constant = "constant"
    linear = "linear"


class Reduction(enum.Enum):
    """Reduction of a step's KL to its loss: mean over tokens, or their sum per sequence."""

    token_mean = "token_mean"
    sequence_sum = "sequence_sum"


class Initialisation(enum.Enum):
    """Initial values of an adapter's A. B is zero, so a new adapter changes nothing."""

    kaiming = "kaiming"
    svd = "svd"


class KLComputation(enum.Enum):
    """Computation of KL: a few tokens at a time, or with the logits of all tokens at once."""

    fused = "fused"
    full = "full"


class LauncherKind(enum.Enum):
    """Place where runs are executed: this machine or SLURM."""

    local = "local"
    slurm = "slurm"


class TrackingMode(enum.Enum):
    """Mode of Weights & Biases; or Trackio in its place."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"
    trackio = "trackio"
