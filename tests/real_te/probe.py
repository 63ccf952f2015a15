"""Asked in a process of its own, as two packages have the name ``transformer_engine``.

    python tests/real_te/probe.py signatures DIRECTORY [NAME ...]
    python tests/real_te/probe.py weights DIRECTORY MODEL [FLAG ...]
    python tests/real_te/probe.py adam DIRECTORY

The answer is one line of JSON, the last.  DIRECTORY: where the package lies; the stand-in's too.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from tests.real_te import extension  # noqa: E402


def _public(module: Any) -> dict[str, Any]:
    """Its own functions and classes, and the methods that the latter do not inherit."""
    own = {
        n: v
        for n, v in vars(module).items()
        if not n.startswith("_") and getattr(v, "__module__", "") == module.__name__
    }
    methods = {
        f"{name}.{n}": v
        for name, each in own.items()
        if inspect.isclass(each)
        for n, v in vars(each).items()
        if not n.startswith("_") and inspect.isroutine(v)
    }
    return own | methods


def signatures(names: list[str]) -> dict[str, list]:
    """Module:name -> [parameter, kind, whether it must be given] of each; None: it is not there.

    Without names: all that the modules of the package have.
    """
    if not names:
        modules = [n for n in sys.modules if n.startswith("transformer_engine")]
        names = [f"{m}:{n}" for m in modules for n in _public(sys.modules[m])]
    found: dict[str, Any] = {}
    for name in names:
        module, path = name.split(":")
        try:
            value = importlib.import_module(module)
            for part in path.split("."):
                value = getattr(value, part)
        except (ImportError, AttributeError):
            found[name] = None
            continue
        found[name] = [
            [p.name, p.kind.name, p.default is p.empty]
            for p in inspect.signature(value).parameters.values()
        ]
    return found


def weights(model: str, flags: list[str]) -> dict[str, float]:
    """How far masters, a teacher's copy and FP8 weights are from those that ``model`` has."""
    from megatron_phf.runtime import device, parallel

    device.import_megatron()
    from megatron_phf.config.flags import parse_args
    from megatron_phf.model import gpt
    from megatron_phf.model.architecture import read_architecture
    from megatron_phf.model.fp8 import never_trained
    from megatron_phf.train.optimizer import StudentOptimizer
    from megatron_phf.weights.huggingface import load_hf_weights

    config = parse_args(["--hf-model", model, "--transformer-impl", "transformer_engine", *flags])
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    parallel.initialize(config.parallel)
    device.setup()
    extension.see_a_hopper()
    device.fp8_support = lambda recipe: None
    arch = read_architecture(model)
    student = gpt.build_model(arch, config)
    load_hf_weights(student, arch, config, model)
    plain = gpt.build_model(arch, never_trained(config))
    load_hf_weights(plain, arch, never_trained(config), model)
    read = {name: p.detach().float() for name, p in plain[0].named_parameters()}
    teacher = gpt.frozen_copy(student, arch, config)
    if not config.fp8.fp8_param_gather:
        return {"parameters": len(read)}
    StudentOptimizer(student, config)

    def far(pairs: Any) -> float:
        return max(float((a.detach().float() - b).abs().max()) for a, b in pairs)

    named = dict(student[0].named_parameters())
    kind = importlib.import_module("transformer_engine.pytorch").QuantizedTensor
    rounded = {name for name, p in named.items() if isinstance(p, kind)}
    masters = {n: named[n].main_param.view(named[n].shape) for n in rounded}
    copied = dict(teacher[0].named_parameters())
    return {
        "parameters": len(read),
        "rounded": len(rounded),
        "masters": far((masters[n], read[n]) for n in rounded),
        "teacher": far((copied[n], read[n]) for n in read),
        "weights": far((named[n].dequantize(), read[n]) for n in rounded),
        "largest": max(float(read[n].abs().max()) for n in rounded),
    }


def adam() -> dict[str, float]:
    """torch's Adam after six steps against two of it, two of the real fused one, two of it."""
    from megatron_phf.train import adam_state
    from tests.unit.runtime.test_kernels import resume, saved

    extension.see_a_hopper()
    fused = importlib.import_module("transformer_engine.pytorch.optimizers").FusedAdam
    settings = {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-4, "weight_decay": 0.1}
    gradients = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(0))
    results = {}
    for distributed in (False, True):
        ends = []
        for kinds in ([torch.optim.AdamW] * 3, [torch.optim.AdamW, fused, torch.optim.AdamW]):
            weight, state = torch.nn.Parameter(torch.ones(4, 3)), None
            for part, kind in enumerate(kinds):
                optimizer = kind([weight], **settings)
                if state is not None:
                    resume(optimizer, state)
                else:
                    adam_state.allocate(optimizer)
                for gradient in gradients[2 * part : 2 * part + 2]:
                    weight.grad = gradient.clone()
                    optimizer.step()
                state = saved(optimizer, distributed=distributed)
            ends.append(weight.detach())
        results["distributed" if distributed else "whole"] = float((ends[0] - ends[1]).abs().max())
    return results


def main() -> None:
    """See the module."""
    question, directory, *rest = sys.argv[1:]
    if "fake_te" in directory:
        sys.path.insert(0, directory)
        importlib.import_module("transformer_engine.pytorch.optimizers")
    else:
        extension.make_importable(directory)
    if question == "signatures":
        answer: Any = signatures(rest)
    else:
        answer = weights(rest[0], rest[1:]) if question == "weights" else adam()
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
