"""What the acceptance runs on this machine, how long each case may take, and what it skips.

Expected seconds are those of one H100, from counted operations and bytes: matrix products at 35 %
of the peak, memory at 2.5 TB/s, at least 300 microseconds a layer and decoded token (kernel
launches), files at 0.5 GB/s.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from megatron_phf.estimate.flops import forward_flops
from megatron_phf.model.architecture import Architecture

# Starts: cases of one share processes.
WRITE, PARITY, TRAIN, LARGE, DECODE = range(5)
ENGINE, ENGINE_TRAIN, ENGINE_LARGE, ENGINE_DECODE, ENGINE_FP8 = range(5, 10)
CASES, MEASURE = "megatron_phf.cli.cases", "megatron_phf.cli.accept.measure"
MODEL = "megatron_phf.cli.accept.model"
LAYOUTS = {
    1: [],
    2: ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
    8: ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2",
        "--sequence-parallel", "--use-distributed-optimizer", "--overlap-grad-reduce"],
}  # fmt: skip
# A token passes all stages, which no CUDA graph holds.
DECODE_LAYOUTS = {**LAYOUTS, 8: LAYOUTS[2]}
_FLOPS, _BYTES, _LAUNCH, _DISK = 0.35 * 989e12, 2.5e12, 300e-6, 0.5e9
START, START_LIMIT = 20.0, 150.0  # a process: imports, CUDA, NCCL, and, for LARGE, the weights
_WARM, _ROUNDS = 2, 5
_FP8 = ["--fp8-format", "hybrid", "--fp8-recipe", "tensorwise"]
_LOCAL = ["--transformer-impl", "local"]
_TE = ["--transformer-impl", "transformer_engine", "--dtype", "bf16"]


@dataclass(frozen=True)
class Case:
    """Leaves NAME.json; ``start``: those with the same number share processes."""

    start: int
    name: str
    kind: str
    argv: list[str]
    seconds: float
    limit: float  # seconds after which it is ended, its start aside
    settings: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For the process that runs it."""
        return {"name": self.name, "kind": self.kind, "argv": self.argv, **self.settings}


@dataclass(frozen=True)
class Lengths:
    """Of the large model's rollouts; ``rows`` decode together, ``tokens`` of them timed."""

    batch: int
    micro_batch: int
    prompt: int
    teacher_prompt: int
    response: int
    rows: int
    tokens: int


LENGTHS = {True: Lengths(16, 4, 64, 192, 512, 64, 128), False: Lengths(4, 2, 8, 16, 24, 4, 8)}


@dataclass(frozen=True)
class Plan:
    """``tiny``: directory of a model of a few layers; ``large``: the one that is measured."""

    directory: str
    tiny: str
    large: str
    arch: Architecture  # of ``large``
    cuda: bool
    engine: str | None  # why Transformer Engine's rows are skipped; None: it is there
    processes: int
    steps: int
    job: list[str]  # flags of the training whose losses are compared

    @property
    def layout(self) -> list[str]:
        """Flags of the split over processes."""
        return LAYOUTS[self.processes]

    @property
    def lengths(self) -> Lengths:
        """Of the large model's rollouts."""
        return LENGTHS[self.cuda]

    def path(self, name: str) -> str:
        """Below the acceptance's directory."""
        return os.path.join(self.directory, name)

    def _driver(self, start: int, name: str, kind: str, seconds: float, argv: list[str]) -> Case:
        output = ["--output-dir", self.path(name), "--no-progress", "--no-tensorboard"]
        return Case(start, name, kind, [*argv, *output], seconds, self._limit(seconds))

    def _limit(self, seconds: float) -> float:
        """A GPU that misses its goal still shows by how much; a CPU may be a busy one."""
        return (60 if self.cuda else 300) + 4 * seconds

    def cases(self) -> list[Case]:
        """All of them, in the order in which they run."""
        cases = [*self._parity(), *self._training(), *self._large(LARGE, "", _LOCAL)]
        cases.append(self._decode(DECODE, "", _LOCAL))
        if self.engine is None:
            cases += [*self._engine(), *self._large(ENGINE_LARGE, "_te", _TE)]
            cases.append(self._decode(ENGINE_DECODE, "_te", _TE))
            cases += self._large(ENGINE_FP8, "_fp8", [*_TE, *_FP8])
        return cases

    def make_large(self) -> Case:
        """Writes the random model that is measured."""
        seconds = 3 * 2 * self.arch.num_parameters() / _DISK
        return Case(WRITE, "large", MODEL, [self.large], seconds, self._limit(seconds))

    def _parity_flags(self, layout: list[str]) -> list[str]:
        from megatron_phf.reference import Options, flags

        replay, model = (os.path.join(self.tiny, name) for name in ("replay.jsonl", "model"))
        return [*flags(Options(), model, replay, 4), *layout]

    def _parity(self) -> list[Case]:
        packed = ["--dtype", "bf16", "--max-tokens-per-microbatch", "128", "--pack-sequences"]
        kinds = {"fp32": ["--dtype", "fp32"], "bf16": ["--dtype", "bf16"], "packed": packed}
        flags = {name: [*self._parity_flags(self.layout), *more] for name, more in kinds.items()}
        if self.cuda and self.layout:  # GPUs to cut packed rows over
            context = ["--context-parallel-size", "2"]
            flags["context"] = [*self._parity_flags([]), *packed, *context]
        return [
            self._driver(PARITY, f"parity_{name}", "gradients", 5, [*argv, *_LOCAL])
            for name, argv in flags.items()
        ]

    def _engine(self) -> list[Case]:
        parity = self._parity_flags(self.layout)
        flags = {"te": [*parity, *_TE]}
        if "--sequence-parallel" in self.layout:  # communication to overlap
            flags["userbuffers"] = [*parity, *_TE, "--max-tokens-per-microbatch", "128"]
            flags["userbuffers"] += ["--pack-sequences", "--tp-comm-overlap"]
        flags["fp8"] = [*parity, *_TE, *_FP8]
        cases = [
            self._driver(ENGINE, f"parity_{name}", "gradients", 10, argv)
            for name, argv in flags.items()
        ]
        argv = [*self.job, *self._again(), *_TE, *_FP8]
        cases.append(self._driver(ENGINE_TRAIN, "train_fp8", "job", 0.4 * self.steps, argv))
        return cases

    def _again(self) -> list[str]:
        return ["--rollout-engine", "replay", "--replay-file", self.path("rollouts.jsonl")]

    def _training(self) -> list[Case]:
        """Rollouts are recorded by the first; the others train on them."""
        fp32, bf16 = (["--dtype", dtype, *_LOCAL] for dtype in ("fp32", "bf16"))
        record = ["--record-rollouts", self.path("rollouts.jsonl")]
        decoding = self.steps * _LAUNCH * 4 * 32
        again = [*self.job, *self._again()]
        cases = [
            (self.steps * 0.2 + decoding, "train", [*self.job, *fp32, *record]),
            (self.steps * 0.2, "train_bf16", [*again, *bf16]),
        ]
        for name, flags in (("save", []), ("async_save", ["--async-save"])):
            save = [*again, *fp32, "--save", self.path(f"{name}.checkpoints"), *flags]
            half = ["--exit-interval", str(self.steps // 2)]
            cases.append((5.0, f"{name}_half", [*save, *half]))
            resumed = [*save, "--load", self.path(f"{name}.checkpoints")]
            cases.append((5.0, f"{name}_resumed", resumed))
        start = TRAIN if self.cuda else PARITY  # a CPU's peaks are not measured
        return [self._driver(start, name, "job", s, argv) for s, name, argv in cases]

    def _large(self, start: int, suffix: str, flags: list[str]) -> list[Case]:
        seconds = {"step": 2 * (_WARM + _ROUNDS) * self.step_seconds()}
        if not suffix:  # the rest does not depend on the layers
            seconds["synchronisations"] = 2 * self.step_seconds()
        argv = self._large_flags([*self.layout, *flags])
        return [self._measured(start, kind + suffix, argv, s) for kind, s in seconds.items()]

    def _decode(self, start: int, suffix: str, flags: list[str]) -> Case:
        layout = DECODE_LAYOUTS[self.processes]
        argv = self._large_flags([*layout, *flags])
        return self._measured(start, "decode" + suffix, argv, self.decode_seconds())

    def _measured(self, start: int, name: str, argv: list[str], seconds: float) -> Case:
        settings = {**vars(self.lengths), "warm": _WARM, "rounds": _ROUNDS if self.cuda else 1}
        kind = name.split("_")[0]
        return Case(start, name, kind, argv, seconds, self._limit(seconds), settings)

    def _large_flags(self, more: list[str]) -> list[str]:
        lengths, dtype = self.lengths, "bf16" if self.cuda else "fp32"
        argv = ["--hf-model", self.large, "--data", os.path.join(self.tiny, "problems.jsonl")]
        argv += ["--global-batch-size", str(lengths.batch), "--train-iters", "1000"]
        argv += ["--micro-batch-size", str(lengths.micro_batch), "--lr", "1e-6"]
        argv += ["--max-new-tokens", str(lengths.response), "--dtype", dtype, *more]
        argv += ["--rollout-batch-size", str(lengths.rows), "--output-dir", self.path("large")]
        return argv

    def step_seconds(self) -> float:
        """Teacher's pass, student's two, and Adam, which reads and writes 18 bytes a weight."""
        lengths, count = self.lengths, self.lengths.batch
        student = [lengths.prompt + lengths.response] * count
        teacher = [lengths.teacher_prompt + lengths.response] * count
        scored = count * lengths.response
        flops = 3 * forward_flops(self.arch, student, scored).total
        flops += 2 * forward_flops(self.arch, teacher, scored).total
        return flops / self.processes / _FLOPS + 36 * self.arch.num_parameters() / _BYTES

    def decode_seconds(self) -> float:
        """Three batches: to warm up, a short one and a long one."""
        tokens = 3 * (8 + self.lengths.tokens / 8) + self.lengths.tokens
        token = max(2 * self.arch.num_parameters() / _BYTES, self.arch.num_layers * _LAUNCH)
        return tokens * token

    def expected_seconds(self) -> float:
        """Of the whole run on one H100, the making of the large model included."""
        cases = [self.make_large(), *self.cases()]
        return sum(case.seconds for case in cases) + len({case.start for case in cases}) * START
