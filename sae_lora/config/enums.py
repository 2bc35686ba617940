"""The words that a config may use, where only some are allowed."""

import enum


class DType(enum.Enum):
    """Floating-point formats a model can be held in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Device(enum.Enum):
    """Device of a run; `auto` takes the GPU where there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Attention(enum.Enum):
    """Implementation of attention; `auto` is transformers' own choice, except where that is slow."""

    auto = "auto"
    eager = "eager"
    sdpa = "sdpa"
    flash_attention_2 = "flash_attention_2"
    flex_attention = "flex_attention"
    blockwise = "blockwise"


class SAEFamily(enum.Enum):
    """Source of an SAE; it also settles the facts that are known about it."""

    tiny = "tiny"
    gemma_scope = "gemma_scope"
    llama_scope = "llama_scope"
    registry = "registry"
    disk = "disk"
    new = "new"
    identity = "identity"


class Architecture(enum.Enum):
    """Architecture of a new SAE; sae-lens's names."""

    topk = "topk"
    batchtopk = "batchtopk"
    matryoshka = "matryoshka"
    jumprelu = "jumprelu"
    standard = "standard"
    gated = "gated"


class Suite(enum.Enum):
    """Group of measurements of a finished run."""

    core = "core"
    mechanism = "mechanism"
    lora = "lora"
    tasks = "tasks"
    steering = "steering"
    saebench = "saebench"
    downstream = "downstream"
    """tasks, steering and saebench together, as far as tasks and benchmarks are asked for."""


class Method(enum.Enum):
    """Method: the weights that are trained so that the model predicts better through its SAE."""

    lora = "lora"
    mezo = "mezo"
    linear_adapter = "linear_adapter"
    mlp_adapter = "mlp_adapter"
    sae_finetune = "sae_finetune"
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


class TextSource(enum.Enum):
    """Source of text."""

    stdlib = "stdlib"
    text_files = "text_files"
    hub = "hub"


class Schedule(enum.Enum):
    """Course of the learning rate after the warm-up."""

    constant = "constant"
    linear = "linear"


class Reduction(enum.Enum):
    """Reduction of a step's KL to its loss: mean over tokens, or their sum per sequence."""

    token_mean = "token_mean"
    sequence_sum = "sequence_sum"


class Initialisation(enum.Enum):
    """First values of an adapter's A. B begins with zeros, so that nothing is changed yet."""

    kaiming = "kaiming"
    svd = "svd"


class KLComputation(enum.Enum):
    """Computation of the KL: a few tokens at a time, or with the logits of all tokens at once."""

    fused = "fused"
    full = "full"


class LauncherKind(enum.Enum):
    """Place where the plan runs."""

    local = "local"
    slurm = "slurm"


class TrackingMode(enum.Enum):
    """Use of Weights & Biases."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"
