"""Does an exported model compute in transformers what the student computed in Megatron?

    python tools/check_export.py runs/train/hf runs/train/export_probe.safetensors

An adapter directory (``--save-adapter``) is loaded by ``peft`` on its base model.
The probe (token sequences, and the student's next-token logits for them) is written by the training
job beside every export.  Exit status 1 where the largest difference exceeds ``--tolerance``.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from megatron_phf.console import program
from megatron_phf.data.tokenizer import load_hf
from megatron_phf.files.foreign import read_json_object


def load_export(directory: str, base: str | None = None) -> Any:
    """The model of a HuggingFace directory, or of a PEFT adapter and its base model.

    ``base``: where that lies, if not where the adapter says.

    Raises:
        ValueError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    adapter = os.path.join(directory, "adapter_config.json")
    try:
        if not os.path.isfile(adapter):
            base = directory
        elif base is None:
            base = str(read_json_object(adapter)["base_model_name_or_path"])
        model = AutoModelForCausalLM.from_pretrained(
            base, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{base}: transformers cannot load it ({error})") from error
    if base == directory:
        return model
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ValueError(
            f"{directory}: an adapter needs the package peft: pip install peft"
        ) from error
    try:
        return PeftModel.from_pretrained(model, directory)
    except Exception as error:  # torch's and safetensors' own among them
        raise ValueError(f"{directory}: peft cannot load it ({error})") from error


def write_probe(directory: str, probe_file: str, base: str | None = None) -> None:
    """Write what transformers (and peft) compute in fp32, for comparison with another model.

    Raises:
        ValueError: the model cannot be loaded, or the file is there already.
    """
    if os.path.lexists(probe_file):
        raise ValueError(f"{probe_file}: is there already; name another file")
    import torch
    from safetensors.torch import save_file

    model = load_export(directory, base).float().eval()
    size = model.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(size, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[:, -1].contiguous()
    save_file({"tokens": tokens, "logits": logits}, probe_file)


def largest_difference(
    model_directory: str, probe_file: str, rounded_to: str | None = None
) -> tuple[float, float]:
    """(largest absolute difference of the logits, their standard deviation).

    ``rounded_to``: round the weights to this dtype and compute in fp32.

    Raises:
        ValueError: model or probe cannot be read.
    """
    import torch
    from safetensors.torch import load_file

    try:
        probe = load_file(probe_file)
        tokens, expected = probe["tokens"], probe["logits"]
    except Exception as error:  # safetensors has errors of its own
        raise ValueError(f"{probe_file}: no export probe ({error})") from error
    model = load_export(model_directory)
    if rounded_to is not None:  # not the rotary tables, which are no weights
        model = model.float()
        for p in model.parameters():
            p.data = p.data.to(getattr(torch, rounded_to)).float()
    with torch.no_grad():
        logits = model.eval()(input_ids=tokens).logits[:, -1].float()
    return float((logits - expected).abs().max()), float(expected.std())


# Words, digits, punctuation, another script, blanks of several kinds.
_SAMPLE = "Let x = 1,024 and y = 3/4: what is \\boxed{x\u00b2 - y}?\n\tÉté, 数学.  <|im_end|></s>"
_MESSAGES = [{"role": "user", "content": "What is 1 + 1?"}]


def _tokenizer(directory: str) -> Any:
    """A directory's tokenizer without foreign code, or why it does not load."""
    try:
        return load_hf(directory)
    except Exception as error:  # of many kinds, by file and format
        return f"{type(error).__name__}: {error}"


def _behaviour(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer does, by name."""
    found = {
        "class": type(tokenizer).__name__,
        "vocabulary": tokenizer.get_vocab(),
        "special tokens": tokenizer.special_tokens_map,
        "ids of a text": tokenizer(_SAMPLE)["input_ids"],
        "chat template": tokenizer.chat_template,
    }
    found["text of these ids"] = tokenizer.decode(found["ids of a text"])
    if tokenizer.chat_template:
        try:
            prompt = tokenizer.apply_chat_template(_MESSAGES, add_generation_prompt=True)
            found["ids of a chat"] = prompt["input_ids"]
        except Exception as error:  # a template is a program
            found["ids of a chat"] = f"{type(error).__name__}: {error}"
    return found


def tokenizer_difference(source: str, target: str) -> str | None:
    """What the tokenizer of ``target`` does otherwise than that of ``source``; None: nothing.

    Where the source's does not load without foreign code, there is nothing to compare.
    """
    first = _tokenizer(source)
    if isinstance(first, str):
        return None
    second = _tokenizer(target)
    if isinstance(second, str):
        return f"the tokenizer of {target} does not load ({second})"
    expected, found = _behaviour(first), _behaviour(second)
    different = [name for name, value in expected.items() if found.get(name) != value]
    if different:
        return f"the tokenizer of {target} is not that of {source}: {', '.join(different)}"
    return None


@program
def main(argv: list[str] | None = None) -> int:
    """Print the comparison; 0 within the tolerance, 1 beyond it, 2 where a file is unreadable."""
    parser = argparse.ArgumentParser(description="Compare an export's logits with the student's.")
    parser.add_argument("model", help="exported HuggingFace or adapter directory")
    parser.add_argument("probe", help="export_probe.safetensors of the same run")
    parser.add_argument(
        "--tolerance", type=float, default=1e-3, help="of the logits; for bf16 try 0.25"
    )
    parser.add_argument(
        "--rounded-to",
        choices=("float32", "bfloat16"),
        help="round the weights to this first, and compute in fp32",
    )
    parser.add_argument(
        "--tokenizers", nargs=2, metavar="DIR", help="compare the tokenizers of these, too"
    )
    parser.add_argument("--write", action="store_true", help="write the probe from this model")
    parser.add_argument("--base", help="with --write: the base model of an adapter")
    args = parser.parse_args(argv)
    if args.write:
        write_probe(args.model, args.probe, args.base)
        return 0
    if args.tokenizers is not None:
        problem = tokenizer_difference(*args.tokenizers)
        if problem is not None:
            print(f"DIFFERENT: {problem}", file=sys.stderr)
            return 1
    difference, deviation = largest_difference(args.model, args.probe, args.rounded_to)
    good = difference <= args.tolerance
    print(
        f"{'equal' if good else 'DIFFERENT'}: largest difference of the logits {difference:.2e} "
        f"(their standard deviation {deviation:.2f}, tolerance {args.tolerance:g})",
        file=sys.stdout if good else sys.stderr,
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
