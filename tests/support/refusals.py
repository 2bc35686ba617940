"""Commands that cannot work, and the words of their error: field, value, and allowed values."""

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

from tests.support.coders import write_cfg
from tests.support.commands import launch

WRONG: list[tuple[str, list[str]]] = [
    # keys that do not exist
    ("lora.rnk=3", ["there is no key lora.rnk", "nearest valid: lora.rank"]),
    ("trian.lr=1", ["there is no key trian.lr"]),
    ("+foo=1", ["there is no key foo"]),
    ("+lora.foo=1", ["there is no key lora.foo"]),
    ("lauuncher=slurm", ["lauuncher"]),
    ("launcher.partitoin=gpu", ["nearest valid: launcher.partition"]),
    # choices that do not exist
    ("sae=gema_scope", ["nearest valid: sae=gemma_scope"]),
    ("model=gemma2_3b", ["nearest valid: model=gemma"]),
    ("experiment=rank", ["nearest valid: experiment=ranks"]),
    ("train.device=gpu", ["train.device = 'gpu'", "cpu"]),
    ("tracking.mode=on", ["tracking.mode = 'on'", "online"]),
    # wrong types
    ("lora.rank=abc", ["lora.rank = 'abc'", "a whole number"]),
    ("train.train_tokens=1e6", ["nearest valid: train.train_tokens=1000000"]),
    ("train.lr=fast", ["train.lr = 'fast'", "a number"]),
    ("lora.rank_stabilised=perhaps", ["lora.rank_stabilised = 'perhaps'", "true or false"]),
    ("layer.index=first", ["layer.index = 'first'"]),
    ("launcher.sbatch=7", ["launcher.sbatch = 7"]),
    # impossible values
    ("lora.rank=0", ["lora.rank = 0", "nearest valid: lora.rank=1"]),
    ("-m lora.rank=4,0", ["lora.rank = 0", "nearest valid: lora.rank=1"]),
    ("lora.dropout=1.5", ["nearest valid: lora.dropout=0.9"]),
    ("lora.targets=mpl", ["nearest valid: lora.targets=mlp"]),
    ("lora.blocks=[3,99]", ["lora.blocks = [3, 99]", "blocks from 0 to 7"]),
    ("train.lr=0", ["train.lr = 0"]),
    ("train.lr=nan", ["train.lr = nan"]),
    ("train.train_tokens=100", ["nearest valid: train.train_tokens=512"]),
    ("train.seed=-1", ["nearest valid: train.seed=0"]),
    ("data.validation_share=1", ["nearest valid: data.validation_share=0.9"]),
    ("data.context_length=4", ["nearest valid: data.context_length=8"]),
    ("data.context_length=512", ["nearest valid: data.context_length=256"]),
    ("sae.width=16kk", ["sae.width = '16kk'", "16k, 131k"]),
    ("sae.l0=-4", ["sae.l0 = -4"]),
    ("sweep=a/b", ["nearest valid: sweep=a_b"]),
    ("launcher.timeout_min=1", ["launcher.signal_delay_s = 90", "less than the 60 s"]),
    ("launcher.max_parallel=0", ["launcher.max_parallel = 0"]),
    (
        "-m launcher.max_parallel=1,2",
        ["launcher.max_parallel = 2", "nearest valid: launcher.max_parallel=1"],
    ),
    ("launcher.dry_run=true model.attention=flex_attention train.device=cpu", ["not run on a CPU"]),
    # things that do not exist or do not fit together
    ("model.name=no/such-model", ["model.name = 'no/such-model'"]),
    ("model.name=./nowhere", ["model.name = './nowhere'"]),
    ("layer.index=8", ["layer.index = 8", "nearest valid: layer.index=7"]),
    ("layer.index=[1,26]", ["layer.index = 26", "nearest valid: layer.index=7"]),
    ("layer.index=0", ["layer.index = 0", "nearest valid: layer.index=1"]),
    ("layer.index=7 sae=identity", ["lora.blocks = 'after'", "nearest valid: lora.blocks=all"]),
    ("sae=gemma_scope", ["sae.family = 'gemma_scope'", "gemma-2-2b"]),
    ("sae=registry sae.release=gpt2-small-res-jbb", ["nearest valid: sae.release=gpt2-small-res-jb"]),
    (
        "sae=registry sae.release=gemma-scope-2b-pt-res sae.id=layer_12/width_16k/average_l0_821",
        ["nearest valid: sae.id=layer_12/width_16k/average_l0_82"],
    ),
    ("sae=disk", ["sae.path = null"]),
    ("sae=disk sae.path={home}/another_width", ["sae.path", "its d_in is 64"]),
    (
        "sae=disk sae.path={home}/of_an_mlp layer.hook=resid_post",
        ["layer.hook = 'resid_post'", "blocks.3.hook_mlp_out", "nearest valid: layer.hook=mlp_out"],
    ),
    ("sae=disk sae.path={home}/of_an_mlp layer.index=2", ["nearest valid: layer.index=3"]),
    ("sae=disk sae.path={home}/of_heads", ["blocks.3.attn.hook_z", "hook_attn_out"]),
    ("layer.hook=mlp", ["layer.hook = 'mlp'", "nearest valid: layer.hook=mlp_out"]),
    ("sae=disk sae.path={home}/another_widht", ["another_width"]),
    ("sae=disk sae.path={home}/of_a_run", ["a folder of SAEs", "of_a_run/sae/blocks.3.hook_resid_post"]),
    (
        "sae=disk sae.path={home}/sound layer.index=2",
        ["layer.index = 2", "nearest valid: layer.index=3"],
    ),
    ("sae.l0=5 launcher.strict=true", ["sae.l0 = 5", "nearest valid: sae.l0=4"]),
    ("sae.width=4k layer.index=2", ["sae.width = '4k'", "nearest valid: sae.width=1024"]),
    ("data=text_files data.files={home}/nothing/*.txt data.context_length=128", ["data.files"]),
    # methods
    ("method=sea", ["method = 'sea'", "nearest valid: method=sae"]),
    ("method=lora sae=new", ["sae.family = 'new'", "method=sae and method=e2e train new ones"]),
    ("method=sae sae=tiny", ["sae.family = 'tiny'", "new with method=sae"]),
    ("init=nowhere", ["init = 'nowhere'", "it is not a run folder", "outputs/<sweep>/<run>"]),
    # ranks that no matrix has
    ("lora.rank=100000", ["lora.rank = 100000", "at most 128", "nearest valid: lora.rank=128"]),
    ("method=sae_finetune method.rank=4000", ["nearest valid: method.rank=128"]),
    # words of Hydra's that mean nothing here
    ("+experiment=grid", ["write experiment=grid"]),
    ("~lora.rank", ["cannot be deleted", "it is lora.rank=16"]),
    ("--lora.rank 4", ["write lora.rank=4"]),
    ("--config-dri x", ["there is no option --config-dri", "nearest valid: --config-dir"]),
    ("lora.rank =4", ["lora.rank has no value"]),
    ("foo", ["foo has no value"]),
    ("lora.rank=1,2", ["lora.rank has several values", "add -m"]),
    ("-m hydra/sweeper=nevergrad", ["pip install hydra-nevergrad-sweeper"]),
    ("hydra/sweeper=basic", ["has no use here", "add -m"]),
    ("hydra/launcher=joblib", ["has no use here", "launcher.max_parallel"]),
    ("hydra/launcher=submitit_slurm", ["launcher=slurm"]),
    ("objective=gap_close", ["objective = 'gap_close'", "nearest valid: objective=gap_closed"]),
    # halving
    ("launcher.halving=lora.rnk", ["launcher.halving = 'lora.rnk'", "launcher.halving=lora.rank"]),
    ("launcher.halving=lr", ["launcher.halving = 'lr'", "nearest valid: launcher.halving=train.lr"]),
    ("launcher.halving=train.seed", ["their mean counts", "launcher.halving=train.lr"]),
    ("launcher.halving=off", ["launcher.halving = 'off'", "nearest valid: launcher.halving=null"]),
    ("launcher.halving=train.lr launcher.keep=2", ["launcher.keep = 2", "launcher.keep=0.99"]),
    (
        "launcher.halving=train.lr launcher.rungs=[50000]",
        ["launcher.rungs = 50000", "from 100,000 to 300,000", "nearest valid: launcher.rungs=[100000]"],
    ),
    (
        "launcher.halving=train.lr train.eval_every_tokens=400000",
        ["train.eval_every_tokens = 400000", "nearest valid: train.eval_every_tokens=50000"],
    ),
    (
        "launcher.halving=train.lr objective=[kl,ce_gap]",
        ["objective = ['kl', 'ce_gap']", "nearest valid: objective=kl"],
    ),
    ("-m experiment=grid,ranks", ["a sweep of its own", "nearest valid: experiment=grid"]),
    ("experiment=grid,ranks", ["nearest valid: experiment=grid"]),
    ("-m lora.rank=1 --cfg job", ["leave out -m"]),
    # null, and texts with control characters
    ("lora.rank=null", ["lora.rank = null", "a whole number"]),
    ("evaluation.suites=[foo]", ["evaluation.suites[0] = 'foo'", "one of core"]),
    ("launcher.account=a\x01b launcher=slurm", ["launcher.account", "control characters"]),
    ("sweep=.", ["sweep = '.'", "nearest valid: sweep=main"]),
    ("data.context_length=0", ["nearest valid: data.context_length=8"]),
    ("tracking.project=a/b", ["tracking.project = 'a/b'", "nearest valid: tracking.project=a-b"]),
    ("tracking.entity=a:b", ["tracking.entity = 'a:b'", "nearest valid: tracking.entity=a-b"]),
    # a value in place of a group's option
    ("lora=16", ["lora = '16'", "one of default, paper", "set by their names: lora.rank"]),
    ("-m lora=default,16", ["lora = 16", "one of default, paper"]),
    ("model=1", ["model = '1'", "one of gemma2_27b"]),
    ("lora=true", ["lora = 'true'", "one of default, paper"]),
    ("sae=1.5", ["sae = '1.5'", "one of disk"]),
    ("lora=[paper]", ["lora = '[paper]'", "one of default, paper"]),
    ("lora={rank:4}", ["lora = '{rank:4}'", "one of default, paper"]),
    ("model=", ["model = ''", "one of gemma2_27b"]),
    # Hydra's options
    ("--config-name foo", ["--config-name has no use here", "--config-dir FOLDER"]),
    ("--config-path foo", ["--config-path has no use here"]),
    ("--config-dir {home}/nowhere", ["there is no such folder"]),
    ("--multirun=1", ["it takes no value, and got '1'", "allowed: -m"]),
    ("--info lora.rank=4", ["--info/-i", "choose from"]),
    ("--cfg lora.rank=4", ["--cfg/-c", "choose from"]),
    ("--shell-completion", ["--install-completion"]),
    ("+lora.rank=4", ["the config has the key lora.rank; write lora.rank=4"]),
    # several numbers in place of one
    ("lora.rank=[4]", ["a whole number, without brackets: lora.rank=4"]),
    ("lora.rank=[1,4]", ["for a sweep, several with commas: -m lora.rank=1,4"]),
    ("lora.rank=1-4", ["for a sweep: -m lora.rank=range(1,5)"]),
    ("lora.rank=1..4", ["for a sweep: -m lora.rank=range(1,5)"]),
    # lists and mappings in place of a text, and texts in place of a list
    ("sweep=[1,2]", ["sweep = ", "'1', '2'", "allowed: text"]),
    ("sae.path={a:1}", ["sae.path", "'a': 1"]),
    ("lora.dora={a:1}", ["lora.dora", "'a': 1"]),
    ("tracking.tags=5", ["tracking.tags takes a list", "tracking.tags=[A,B]"]),
    # numbers that nothing has, and names of folders
    ("train.train_tokens=99999999999999999999999", ["at most 1000000000000000"]),
    ("sweep=.hidden", ["sweep = '.hidden'", "nearest valid: sweep=hidden"]),
    ("output_dir=", ["nearest valid: output_dir=outputs"]),
    ("hydra.job=1", ["hydra.job is a section"]),
    # an empty sweep
    ("-m lora.rank=glob(*)", ["this sweep has no points", "lora.rank=glob(*)"]),
    ("-m lora.rank=range(5,1)", ["this sweep has no points"]),
    ("-m sae.width=4k layer.index=2,4", ["no point of this sweep has an SAE"]),
    ("-m lora.rank=", ["lora.rank"]),
    # folders that cannot be written
    ("output_dir={home}/file", ["output_dir", "file"]),
    ("tracking.mode=offline tracking.dir={home}/file", ["tracking.dir (or WANDB_DIR)", "not a folder"]),
    ("output_dir=/proc/outputs", ["output_dir", "/proc/outputs"]),
]
"""A command, with `{home}` for the folder of `prepare`, and words of its error."""


def prepare(home: Path) -> None:
    """Write SAEs that do not fit, and a file at the place of a folder."""
    home.mkdir(parents=True, exist_ok=True)
    (home / "file").write_text("")
    for name, d_in, hook in (
        ("another_width", 64, "blocks.3.hook_resid_post"),
        ("of_an_mlp", 128, "blocks.3.hook_mlp_out"),
        ("of_heads", 128, "blocks.3.attn.hook_z"),
        ("sound", 128, "blocks.3.hook_resid_post"),
        ("of_a_run/sae/blocks.3.hook_resid_post", 128, "blocks.3.hook_resid_post"),
    ):
        write_cfg(home / name, d_in=d_in, metadata={"hook_name": hook})


def fault_of(
    command: str, words: list[str], home: Path, by: Callable[..., CompletedProcess[str]] = launch
) -> str | None:
    """The fault of the command's error message; `None` if it is as expected.

    Args:
        command: Overrides and options of `launch.py`.
        words: Words of the error.
        home: A folder that `prepare` has filled.
        by: Function that runs the command.
    """
    arguments = command.replace("{home}", str(home)).split()
    if not any(argument.startswith("output_dir") for argument in arguments):
        arguments.append(f"output_dir={home}/outputs")
    refused = by(*arguments)
    missing = [word for word in words if word not in refused.stderr]
    if refused.returncode != 1:
        return f"exit code {refused.returncode}"
    if "Traceback" in refused.stderr or not refused.stderr.startswith("error: "):
        return f"not one message: {refused.stderr}"
    if missing:
        return f"{missing} not in: {refused.stderr}"
    if "loading model" in refused.stdout or (home / "outputs").exists():
        return "something was started"
    return None
