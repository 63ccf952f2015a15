"""What can be checked of the GPU path without one: flags, kernels, padding, memory advice."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_phf.cli import gpu_flags, out_of_memory, preflight
from megatron_phf.config.flags import check_fields, parse_args
from megatron_phf.demo.task import MODEL_CONFIG
from megatron_phf.hidden.rows import SequenceShards
from megatron_phf.model import gpt
from megatron_phf.model.architecture import parse_architecture
from megatron_phf.runtime import device, kernels, optional_packages
from megatron_phf.runtime.environment import set_cuda_defaults, without_defaults
from megatron_phf.runtime.visible_gpus import count_visible, visible_gpus
from tests.launch import REPO, environment

FP8 = ["--transformer-impl", "transformer_engine", "--fp8-format", "e4m3"]
WEIGHTS = [*FP8, "--fp8-recipe", "tensorwise", "--fp8-param-gather"]
DISTRIBUTED = ["--use-distributed-optimizer"]
USERBUFFERS = ["--tp-comm-overlap", "--sequence-parallel", "--tensor-model-parallel-size", "2"]
USERBUFFERS += ["--hf-model", "m", "--data", "d"]  # not the embedded task's defaults
USERBUFFERS += ["--pack-sequences", "--max-tokens-per-microbatch", "3072"]
MX_WEIGHTS = [*FP8, "--fp8-recipe", "mxfp8", "--fp8-param-gather", *DISTRIBUTED]


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Add a directory to where packages are found; what of them was imported goes afterwards."""
    before = set(sys.modules)

    def add(directory: Path) -> None:
        monkeypatch.syspath_prepend(str(directory))
        importlib.invalidate_caches()

    yield add
    optional_packages.import_failure.cache_clear()
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("transformer_engine", "apex", "amp_C"):
            del sys.modules[name]


@pytest.fixture
def engine(packages: Callable[[Path], None]) -> None:
    """As if Transformer Engine were installed."""
    packages(REPO / "tests" / "fake_te")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            [*FP8[:2], "--fp8-format", "hybrid", "--fp8-recipe", "blockwise"],
            "use --fp8-format e4m3",
        ),
        (["--fp8-param-gather"], "--fp8-param-gather needs --fp8-format"),
        (["--first-last-layers-bf16"], "--first-last-layers-bf16 needs --fp8-format"),
        ([*FP8, "--first-last-layers-bf16"], "choose tensorwise, blockwise or mxfp8"),
        (WEIGHTS, "--fp8-param-gather needs --use-distributed-optimizer"),
        (MX_WEIGHTS, "does not work with --fp8-recipe mxfp8"),
        ([*WEIGHTS, *DISTRIBUTED, "--lora-rank", "8"], "leave out --lora-rank"),
        ([*WEIGHTS, *DISTRIBUTED, "--teacher", "live"], "use frozen or ema"),
        ([*FP8, "--dtype", "fp32"], "--fp8-format needs --dtype bf16"),
        (["--tp-comm-overlap"], "--tp-comm-overlap needs --sequence-parallel"),
        ([*USERBUFFERS, "--lora-rank", "8"], "without --lora-rank"),
        ([*USERBUFFERS, "--transformer-impl", "local"], "Transformer Engine's layers"),
        ([*USERBUFFERS, *FP8, "--fp8-recipe", "mxfp8"], "delayed or tensorwise"),
        ([*USERBUFFERS, "--max-new-tokens", "2000"], "may have 4048 tokens"),
        (["--overlap-param-gather", *DISTRIBUTED], "and --overlap-grad-reduce"),
        (["--fp8-format", "e4m3", "--transformer-impl", "local"], "Transformer Engine's layers"),
        ([*FP8, "--fp8-amax-history-len", "0"], "--fp8-amax-history-len 0: need at least 1"),
    ],
)
def test_combinations_that_do_not_fit(engine: None, flags: list[str], message: str) -> None:
    config = parse_args(["--hf-model", "m", *flags])
    with pytest.raises(ValueError, match=message):
        check_fields(config)
        gpu_flags.check_gpu(config)


@pytest.mark.parametrize("flags", [FP8, [*WEIGHTS, *DISTRIBUTED], FP8[:2], USERBUFFERS])
def test_combinations_that_fit(engine: None, flags: list[str]) -> None:
    gpu_flags.check_gpu(parse_args(flags))


def test_without_transformer_engine() -> None:
    assert importlib.util.find_spec("transformer_engine") is None
    for flags in (FP8[:2], ["--fp8-format", "hybrid"]):
        with pytest.raises(ValueError, match="installed"):
            gpu_flags.check_gpu(parse_args(flags))


def package(directory: Path, name: str, code: str = "") -> None:
    """Write ``name`` (``a.b``: with its parent) as a package of this code."""
    for depth in range(1, len(name.split(".")) + 1):
        path = directory.joinpath(*name.split(".")[:depth])
        path.mkdir(exist_ok=True)
        (path / "__init__.py").touch()
    (path / "__init__.py").write_text(code)


# What Transformer Engine's package does without its PyTorch extension, by version and what else is
# there; another torch's extension; one that is only a folder.
BROKEN = {
    "RuntimeError: Found empty": 'raise RuntimeError("Found empty `transformer-engine`\\nmore")',
    "FileNotFoundError: Could not find shared": 'raise FileNotFoundError("Could not find shared")',
    "AssertionError: no transformer_engine_torch": 'assert 0, "no transformer_engine_torch"',
    "ImportError: undefined symbol": 'raise ImportError("undefined symbol: _ZN2")',
    "ModuleNotFoundError: No module named 'transformer_engine.pytorch'": "",
    "ValueError:": "raise ValueError",
}


@pytest.mark.parametrize("said", BROKEN)
def test_a_transformer_engine_that_does_not_import(
    said: str, tmp_path: Path, packages: Callable[[Path], None]
) -> None:
    """Said in preflight, where it is asked for; and then nobody finds it."""
    package(tmp_path, "transformer_engine", BROKEN[said])
    packages(tmp_path)
    gpu_flags.check_gpu(parse_args([]))  # auto: the local layers will do
    for flags in (FP8[:2], FP8, ["--fp8-format", "hybrid"], USERBUFFERS):
        with pytest.raises(ValueError, match="transformer_engine is installed but does not") as e:
            gpu_flags.check_gpu(parse_args(flags))
        assert said in str(e.value) and "\n" not in str(e.value)
    assert importlib.util.find_spec("transformer_engine") is None
    assert not device.has_module("transformer_engine")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("transformer_engine")
    line = kernels.layers("local")
    assert not line.on and line.why.startswith("transformer_engine is installed but does not")


MEGATRON = """
import json
from megatron_phf.runtime import device
device.import_megatron()
from megatron_phf.runtime import kernels
from megatron.core.optimizer import Adam
from megatron.core.transformer.transformer_block import LayerNormImpl
from megatron.core.extensions.transformer_engine import HAVE_TE
print(json.dumps([HAVE_TE, LayerNormImpl.__name__, Adam.__module__, kernels.layers("local").why]))
"""


def test_megatron_imports_beside_broken_packages(tmp_path: Path) -> None:
    """An empty Transformer Engine, and PyPI's apex, which is another project."""
    package(tmp_path, "transformer_engine.common", 'raise RuntimeError("Found empty")')
    package(tmp_path, "transformer_engine", "import transformer_engine.common")
    package(tmp_path, "apex")
    paths = os.pathsep.join([str(tmp_path), str(REPO)])
    done = subprocess.run(
        [sys.executable, "-c", MEGATRON], env={**environment(), "PYTHONPATH": paths}, text=True,
        capture_output=True, timeout=300, check=True,
    )  # fmt: skip
    engine, norm, adam, why = json.loads(done.stdout.splitlines()[-1])
    assert (engine, norm) == (False, "WrappedTorchNorm")
    assert adam.startswith("torch.optim")
    broken = "transformer_engine is installed but does not import (RuntimeError: Found empty)"
    assert why == broken


@pytest.mark.parametrize(
    ("change", "flags", "message"),
    [
        ({"hidden_size": 72}, [], "multiples of 16, but hidden_size is 72"),
        ({}, ["--tensor-model-parallel-size", "4"], "attention output a rank is 40"),
        ({"ffn_hidden_size": 264}, [], "MLP width a rank is 264"),
        ({"hidden_size": 80}, ["--fp8-recipe", "mxfp8"], "multiples of 32, but hidden_size is 80"),
        (
            {},
            ["--fp8-recipe", "tensorwise", "--first-last-layers-bf16",
             "--num-layers-at-end-in-bf16", "4"],
            "--num-layers-at-end-in-bf16 4: need 0 to 3",
        ),
    ],
)  # fmt: skip
def test_widths_that_fp8_cannot_take(change: dict, flags: list[str], message: str) -> None:
    arch = replace(parse_architecture({**MODEL_CONFIG, "head_dim": 32}, "test"), **change)
    config = parse_args([*FP8, "--pad-attention-heads", *flags])
    if "attention output" in message:
        arch = replace(arch, kv_channels=20)
    with pytest.raises(ValueError, match=message):
        gpu_flags.check_fp8_model(config, arch)
    gpu_flags.check_fp8_model(parse_args(flags), arch)  # without FP8 any width will do


def test_an_old_engine_cuts_no_packed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--transformer-impl", "transformer_engine", "--pack-sequences"]
    config = parse_args([*flags, "--context-parallel-size", "2"])
    monkeypatch.setattr(gpt, "is_te_min_version", lambda version: False)
    arch = parse_architecture(MODEL_CONFIG, "the embedded model")
    with pytest.raises(ValueError, match=r"needs Transformer Engine 1\.10 or newer"):
        gpt.build_model(arch, config)


class _Group:
    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size


@pytest.mark.parametrize(
    ("context", "sequence", "alignment", "multiple"),
    [
        (1, 1, 1, 1), (1, 2, 1, 2), (2, 1, 1, 4), (2, 2, 1, 8), (1, 1, 16, 16), (1, 1, 32, 32),
        (1, 4, 16, 64), (2, 1, 16, 32), (2, 4, 32, 256), (4, 2, 16, 128),
    ],
)  # fmt: skip
def test_padding(context: int, sequence: int, alignment: int, multiple: int) -> None:
    """Each process's piece is a multiple of the alignment, each context part has equal halves."""
    groups = (None if n == 1 else _Group(n) for n in (context, sequence))
    shards = SequenceShards(*groups, alignment)  # type: ignore[arg-type]
    assert shards.length_multiple == multiple
    assert multiple % (context * sequence) == 0
    assert multiple // (context * sequence) % alignment == 0
    assert context == 1 or multiple % (2 * context) == 0


def test_the_table_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU; then as it would be on CUDA, with and without the packages."""
    table = kernels.feature_table(parse_args([]), "local")
    first = table.splitlines()[0].split()
    assert first[:4] == ["kernel", "Transformer", "Engine", "layers"]
    assert first[4:] == ["off", "transformer_engine", "is", "not", "installed"]
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    there: set[str] = set()
    monkeypatch.setattr(device, "has_module", lambda name: name in there)
    state = {f.name: f for f in kernels.features(parse_args([]), "local")}
    assert "apex, built with its CUDA extensions, is missing" in (
        state["gradient accumulation fusion"].why
    )
    assert not state["fused rotary embedding"].on and state["fused SwiGLU"].on
    there |= {"transformer_engine", "fused_weight_gradient_mlp_cuda"}
    monkeypatch.setattr(kernels, "is_te_min_version", lambda version: True)
    state = {f.name: f for f in kernels.features(parse_args(FP8), "transformer_engine")}
    names = ("gradient accumulation fusion", "fused rotary embedding", "fused Adam", "FP8")
    assert all(state[name].on for name in names)
    assert state["FP8"].why == "e4m3, delayed scaling"
    lora = {f.name: f for f in kernels.features(parse_args(["--lora-rank", "8"]), "local")}
    assert "--lora-rank" in lora["gradient accumulation fusion"].why
    off = kernels.gradient_accumulation(parse_args(["--no-gradient-accumulation-fusion"]))
    assert (off.on, off.why) == (False, "--no-gradient-accumulation-fusion")


def test_memory_advice_names_flags_that_the_run_can_still_change() -> None:
    plain = out_of_memory.advice(parse_args(["--micro-batch-size", "4"]), "student")
    flags = [line.split(":")[0] for line in plain]
    assert flags[:3] == ["--micro-batch-size 2", "--recompute-granularity full",
                         "--logits-chunk-tokens 128"]  # fmt: skip
    assert "--teacher-offload" in flags and "--use-distributed-optimizer" in flags
    used = ["--micro-batch-size", "1", "--recompute-granularity", "full", "--teacher-offload"]
    used += ["--use-distributed-optimizer", "--logits-chunk-tokens", "64", "--max-new-tokens", "64"]
    left = out_of_memory.advice(parse_args([*used, "--lora-rank", "8"]), "student")
    assert len(left) == 1 and left[0].startswith("--tensor-model-parallel-size 2, or")
    rollout = out_of_memory.advice(parse_args(["--rollout-batch-size", "8"]), "rollout")
    assert rollout[0] == "--rollout-batch-size 4: half the KV cache"
    elsewhere = out_of_memory.advice(parse_args(["--rollout-engine", "vllm"]), "rollout")
    assert not any("KV cache" in line for line in elsewhere)
    parser_flags = {word for line in (*plain, *left, *rollout) for word in line.replace(
        ":", " ").replace(",", " ").split() if word.startswith("--")}  # fmt: skip
    for flag in parser_flags:
        with pytest.raises(ValueError) as caught:  # known flags end with another error, or none
            parse_args([flag, "x"])
            raise ValueError("known")
        assert "unrecognized arguments: --" not in str(caught.value)


OUT_OF_MEMORY = """
import torch
from megatron_phf.config.flags import parse_args
from megatron_phf.cli.main import run_rank
def job(config, signals, heartbeat):
    heartbeat.at("step 3, student")
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
run_rank(lambda: parse_args(["--output-dir", OUT]), job)
"""


def test_out_of_memory_is_one_error_with_its_phase_and_advice(tmp_path: Path) -> None:
    code = OUT_OF_MEMORY.replace("OUT", repr(str(tmp_path / "out")))
    torchrun = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**environment(), **torchrun}, text=True,
        capture_output=True, timeout=300, check=False, cwd=REPO,
    )  # fmt: skip
    assert done.returncode == 1
    error = done.stderr[done.stderr.index("error: ") :]
    assert error.startswith("error: rank 0: out of device memory (step 3, student): CUDA out of")
    assert "\n  --micro-batch-size 8: half the activations" in error
    assert "Traceback" not in done.stderr


def test_launcher_counts_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    """With nvidia-smi on PATH: a process a GPU, rounded down to whole models."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\nfor i in 0 1 2 3 4; do echo "GPU $i: NVIDIA H100"; done\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == 5
    assert preflight.main(["--global-batch-size", "64", "--tensor-model-parallel-size", "2"]) == 0
    assert capsys.readouterr().out.split()[0] == "4"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3,4")
    assert preflight.main(["--global-batch-size", "48"]) == 0
    assert capsys.readouterr().out.split()[0] == "3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # two processes on the CPU
    assert preflight.main(["--global-batch-size", "64"]) == 0
    assert capsys.readouterr().out.split()[0] == "2"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert visible_gpus() == 0


# The stand-in for nvidia-smi lists eight GPUs; this torch has none.  Every command that computes.
COMPUTES = {
    "training": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1",
                 "examples/pretrain_phf.sh"],
    "acceptance": ["tools/acceptance.py", "--dry-run"],
    "parity": ["tools/parity.py", "--make-tiny-model"],
    "conversion": ["-m", "megatron_phf.cli.convert", "job.json"],
}  # fmt: skip


@pytest.mark.parametrize("command", COMPUTES)
def test_no_command_takes_the_cpu_of_a_machine_with_gpus(command: str, tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\nfor i in 0 1 2 3 4 5 6 7; do echo "GPU $i: NVIDIA H100"; done\n')
    smi.chmod(0o755)
    variables = environment()
    variables.pop("CUDA_VISIBLE_DEVICES", None)
    variables |= {"PATH": f"{tmp_path}:{variables['PATH']}", "LOCAL_RANK": "0"}
    words = [sys.executable, *COMPUTES[command]]
    if command == "training":
        words += ["--output-dir", str(tmp_path / "out")]
    done = subprocess.run(
        words, env=variables, text=True, capture_output=True, timeout=120, check=False, cwd=REPO
    )
    assert done.returncode in (1, 2)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr[-2000:]
    assert errors[0].startswith("error: nvidia-smi lists 8 GPU(s), but torch ")
    assert "CUDA_VISIBLE_DEVICES= to" in errors[0]
    assert not (tmp_path / "out").exists()


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    monkeypatch.setattr(device.torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    with pytest.raises(ValueError, match=r"nproc-per-node 8: this machine has 4 GPU.*=0,1,2,3"):
        device.init_distributed(0, 1.0)


GPUS = """GPU 0: NVIDIA GPU of H100 80GB HBM3 (UUID: GPU-aa10f1c2-0000-0000-0000-000000000000)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-ab20f1c2-0000-0000-0000-000000000001)
GPU 2: NVIDIA H100 80GB HBM3 (UUID: GPU-b030f1c2-0000-0000-0000-000000000002)
  MIG 3g.40gb     Device  0: (UUID: MIG-11111111-0000-0000-0000-000000000000)
  MIG 3g.40gb     Device  1: (UUID: MIG-22222222-0000-0000-0000-000000000000)
"""
WHOLE = "".join(line + "\n" for line in GPUS.splitlines() if "MIG" not in line)


@pytest.mark.parametrize(
    ("visible", "count", "whole"),
    [
        # A process sees one MIG instance and nothing else; ``whole``: without instances.
        (None, 1, 3),
        ("", 0, 0), ("-1", 0, 0), ("NoDevFiles", 0, 0), ("3", 0, 0), (" ", 0, 0),
        ("0", 1, 1), ("0,1", 2, 2), ("1, 0", 2, 2), ("0,1,2", 1, 3), ("2", 1, 1),
        ("0,-1,1", 1, 1), ("0,7,1", 1, 1), ("1,,0", 1, 1), ("0,0", 0, 0),
        ("GPU-aa10f1c2-0000-0000-0000-000000000000", 1, 1), ("GPU-aa,GPU-ab", 2, 2),
        ("GPU-a", 0, 0), ("GPU-b", 1, 1), ("GPU-ff", 0, 0), ("GPU-aa,GPU-aa10", 0, 0),
        ("MIG-22222222-0000-0000-0000-000000000000", 1, 1),
        ("MIG-11111111-0000-0000-0000-000000000000,MIG-22222222-0000-0000-0000-000000000000", 1, 1),
    ],
)  # fmt: skip
def test_gpus_that_cuda_shows(visible: str | None, count: int, whole: int) -> None:
    assert count_visible(GPUS, visible) == count
    assert count_visible(WHOLE, visible) == whole


@pytest.mark.parametrize(
    ("given", "new", "old"),
    [
        ({}, "expandable_segments:True", "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "a:1"}, "a:1", "a:1"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "b:2"}, "b:2", "b:2"),
        ({"PYTORCH_ALLOC_CONF": "a:1", "PYTORCH_CUDA_ALLOC_CONF": "b:2"}, "a:1", "b:2"),
    ],
)
def test_cuda_variables(given: dict, new: str, old: str) -> None:
    """torch reads either name of the allocator's; what the user has set holds under both."""
    variables = dict(given)
    set_cuda_defaults(variables)
    defaults = {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "NCCL_GRAPH_REGISTER": "0",
        "PYTORCH_ALLOC_CONF": new,
        "PYTORCH_CUDA_ALLOC_CONF": old,
    }
    assert variables.items() >= defaults.items()
    set_cuda_defaults(variables)  # as a child process does
    assert without_defaults({**variables, "PATH": "/bin"}) == {**given, "PATH": "/bin"}
    user = {**given, "CUDA_DEVICE_MAX_CONNECTIONS": "8", "NCCL_GRAPH_REGISTER": "1"}
    variables = dict(user)
    set_cuda_defaults(variables)
    assert variables.items() >= user.items() and without_defaults(variables) == user


def test_every_start_sets_cuda_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """The product's ranks, the tests' driver and the benchmarks, before they import torch."""
    names = ("CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    names += ("NCCL_GRAPH_REGISTER",)
    assert all(name in environment() for name in names)
    for name in names:
        monkeypatch.delenv(name, raising=False)
    starts = {
        "benchmarks": "import benchmarks.harness",
        "driver": "import tests.parallel.driver",
        "product": "import megatron_phf.cli.main as m; m.preflight.check = end; "
        "m.run_rank(lambda: None, None)",
    }
    for name, code in starts.items():
        # The import of torch ends the process: it says what is set by then.
        script = STOP_AT_TORCH.format(names=names, code=code)
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=REPO, text=True, capture_output=True, check=False
        )
        assert json.loads(done.stdout) == dict.fromkeys(names, True), (name, done.stderr)


STOP_AT_TORCH = """
import json, os, sys
def end(*ignored):
    print(json.dumps({{name: name in os.environ for name in {names}}}), flush=True)
    os._exit(0)
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch": end()
sys.meta_path.insert(0, Finder())
{code}
end()
"""
