"""What the acceptance runs on this machine, part by part, and how long each may take.

The parts are the two lists of docs/gpu.md: ten minutes of one card; on several GPUs the layouts
behind it, and on eight the hour.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_phf.reference import Options, flags

CASES, MEASURE = "megatron_phf.cli.cases", "megatron_phf.cli.accept.measure"
MODEL = "megatron_phf.cli.accept.model"
CPU_SECONDS, START_SECONDS = 300.0, 150.0
# Seconds that a part's cases may take, the starts of their processes aside.
PARTS = {
    "machine": 150.0, "write": 60.0, "parity": 60.0, "graphs": 30.0, "decode": 90.0, "step": 150.0,
    "head": 30.0, "synchronisations": 30.0, "engine": 150.0, "layouts": 600.0, "recipe": 450.0,
    "vllm": 600.0, "engines": 450.0, "end": 180.0,
}  # fmt: skip
MINUTES = {1: 10, 2: 20, 8: 60}
_TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
_PP2, _SHARDED = ["--pipeline-model-parallel-size", "2"], ["--use-distributed-optimizer"]
_TP8 = ["--tensor-model-parallel-size", "8", "--sequence-parallel", "--pad-attention-heads"]
_CP2 = ["--context-parallel-size", "2", "--max-tokens-per-microbatch", "128", "--pack-sequences"]
_EP8 = ["--expert-model-parallel-size", "8", "--expert-tensor-parallel-size", "1"]
_EP8 += ["--moe-aux-loss-coeff", "0"]  # the reference's own default
# By GPUs: (name in the table, flags).
LAYOUTS = {
    1: {},
    2: {"TP 2": _TP2, "CP 2": _CP2},
    8: {
        "TP 2 x PP 2 x DP 2": [*_TP2, *_PP2, *_SHARDED, "--overlap-grad-reduce"],
        "TP 8": _TP8,
        "CP 2": _CP2,
        "virtual stages": [*_TP2, *_PP2, "--num-virtual-stages-per-pipeline-rank", "2"],
        "EP 8": [*_TP2, *_EP8],
    },
}
_FP8 = ["--fp8-format", "hybrid", "--fp8-recipe", "tensorwise"]
_LOCAL = ["--transformer-impl", "local"]
_TE = ["--transformer-impl", "transformer_engine", "--dtype", "bf16"]
_PACKED = ["--max-tokens-per-microbatch", "128", "--pack-sequences"]
_SYNCS, _CUDA = "synchronisations", "CUDA"
# Ways of bringing weights to vLLM, and the flags that each needs.
_WAYS = {"adapter": ["--lora-rank", "8"], "torch_distributed": [], "nccl": [],
         "ipc": ["--vllm-colocated"]}  # fmt: skip
_ROWS = {True: (4, 8, 64), False: (2, 4)}  # that decode together
# On a GPU the recipe's shape: rows of 6,144 tokens, full of four rollouts or two of the teacher's.
_LENGTHS = {
    True: {"batch": 16, "prompt": 512, "teacher_prompt": 2048, "response": 1024},
    False: {"batch": 8, "prompt": 8, "teacher_prompt": 32, "response": 16},
}
_DECODED = {True: {"prompt": 64, "tokens": 128}, False: {"prompt": 8, "tokens": 8}}


@dataclass(frozen=True)
class Case:
    """Leaves NAME.json; ``title`` and ``row``: its row of the table and what makes it.

    ``needs``: other cases that the row is about; ``missing``: what this machine lacks for it.
    """

    part: str
    name: str
    kind: str
    processes: int
    argv: list[str]
    title: str = ""
    row: str = ""
    needs: tuple[str, ...] = ()
    missing: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 60.0  # after which it is ended on a GPU, its start aside

    @property
    def module(self) -> str:
        """The program that runs it."""
        ours = {"gradients": CASES, "job": CASES, "write": MODEL}
        return ours.get(self.kind, MEASURE)

    def as_json(self) -> dict[str, Any]:
        """For the process that runs it."""
        return {"name": self.name, "kind": self.kind, "argv": self.argv, **self.settings}


@dataclass(frozen=True)
class Plan:
    """``tiny``: directory of models of a few layers; ``large``: the one that is measured.

    ``engine``, ``vllm``, ``disk``: what this machine lacks for rows of Transformer Engine, of vLLM
    and of the 8B recipe; None: it is there.  ``job``: flags of the training that is compared.
    """

    directory: str
    tiny: str
    large: str
    traces: str
    cuda: bool
    engine: str | None
    vllm: str | None
    disk: str | None
    processes: int
    job: list[str]
    random: bool = True  # whether ``large`` is to be written
    steps: int = 10

    def path(self, name: str) -> str:
        """Below the acceptance's directory."""
        return os.path.join(self.directory, name)

    def limit(self, case: Case) -> float:
        """A GPU that misses its goal still shows by how much; a CPU may be a busy one."""
        return case.seconds if self.cuda else CPU_SECONDS

    def cases(self) -> list[Case]:
        """All of them, in the order in which they run."""
        write = [Case("write", "large", "write", 1, [self.large])] if self.random else []
        cases = [*write, *self._card(), *self._engine()]
        if self.processes > 1:
            reduce = Case("machine", "all_reduce", "all_reduce", self.processes, self._large(),
                          "an all-reduce of all GPUs", "all_reduce")  # fmt: skip
            cases = [reduce, *cases, *self._layouts()]
        if self.processes == 8:
            cases += [*self._recipes(), *self._vllm(), *self._engines()]
        return [*cases, *self._end()]

    def _tiny(self, name: str) -> str:
        return os.path.join(self.tiny, name)

    def _gradients(
        self, part: str, name: str, processes: int, argv: list[str], title: str, precision: str,
        model: str = "model", missing: str | None = None,
    ) -> Case:  # fmt: skip
        options = flags(Options(), self._tiny(model), self._tiny("replay.jsonl"), 4)
        return Case(
            part, f"parity_{name}", "gradients", processes, [*options, *argv, *self._quiet(name)],
            f"parity with transformers, {title}", "parity", missing=missing,
            settings={"model": model, "precision": precision},
        )  # fmt: skip

    def _quiet(self, name: str) -> list[str]:
        return ["--output-dir", self.path(name), "--no-progress", "--no-tensorboard"]

    def _large(self, *more: str, model: str | None = None) -> list[str]:
        lengths = _LENGTHS[self.cuda]
        values = {
            "hf-model": model or self.large, "data": self._tiny("problems.jsonl"),
            "dtype": "bf16" if self.cuda else "fp32", "train-iters": 1000,
            "global-batch-size": lengths["batch"], "max-new-tokens": lengths["response"],
            "max-prompt-length": lengths["prompt"],
            "max-teacher-prompt-length": lengths["teacher_prompt"],
            "max-tokens-per-microbatch": 2 * (lengths["teacher_prompt"] + lengths["response"]),
        }  # fmt: skip
        argv = [word for key, value in values.items() for word in (f"--{key}", str(value))]
        return [*argv, "--pack-sequences", *self._quiet("large"), *more]

    def _step(self, part: str, name: str, argv: list[str], title: str, **about: Any) -> Case:
        settings = {
            **_LENGTHS[self.cuda], "warm": 1, "rounds": 3 if self.cuda else 1,
            "flows": [True, False], "sample": False, "trace": os.path.join(self.traces, name),
            **about.pop("settings", {}),
        }  # fmt: skip
        case = Case(part, name, "step", 1, argv, title, "step", settings=settings)
        return replace(case, **about)

    def _decoding(self, suffix: str, argv: list[str], title: str) -> list[Case]:
        def case(part: str, name: str, words: str, rows: int) -> Case:
            settings = {**_DECODED[self.cuda], "rows": rows}
            return Case(part, name, part, 1, argv, words + title, part, settings=settings)

        rows, words = _ROWS[self.cuda], "tokens with graphs = tokens without"
        graphs = replace(
            case("graphs", f"graphs{suffix}", words, rows[1]), missing=None if self.cuda else _CUDA
        )
        return [graphs] + [
            case("decode", f"decode{suffix}_{n}", f"decoding in process, {n} rows", n) for n in rows
        ]

    def _card(self) -> list[Case]:
        """Parity, and what a large model shows, with all weights and with adapters."""
        bf16 = ["--dtype", "bf16", *_LOCAL]
        argv = self._large("--preset", "phf", *_LOCAL)
        step = self._step("step", "step", argv, "a step")
        chunks = {**step.settings, "chunks": [256, 1024] if self.cuda else [4, 16]}
        return [
            self._gradients("parity", "bf16", 1, bf16, "bf16", "bf16"),
            self._gradients("parity", "packed", 1, [*bf16, *_PACKED], "packed rows", "bf16"),
            *self._decoding("", self._large(*_LOCAL), ""),
            *self._decoding("_lora", argv, ", LoRA"),
            step,
            Case("head", "head", "head", 1, argv, "the head alone", "head", settings=chunks),
            replace(step, part=_SYNCS, name=_SYNCS, kind=_SYNCS, row=_SYNCS,
                    missing=None if self.cuda else _CUDA,
                    title="host waits for the GPU in a step"),
        ]  # fmt: skip

    def _engine(self) -> list[Case]:
        """One card with Transformer Engine."""
        cases = []
        for name, more, title in (("te", [], "Transformer Engine"), ("fp8", _FP8, "FP8")):
            flags, precision = [*_TE, *more], "fp8" if more else "bf16"
            step = self._large("--preset", "phf", *flags)
            cases += [
                self._gradients("engine", name, 1, flags, title, precision, missing=self.engine),
                self._step("engine", f"step_{name}", step, f"a step, {title}", missing=self.engine),
            ]
        return sorted(cases, key=lambda case: case.kind)  # one start for each kind

    def _layouts(self) -> list[Case]:
        """In fp32: a contribution that is lost does not hide behind rounding."""
        cases = [
            self._gradients(
                "layouts", name.lower().replace(" ", ""), self.processes,
                ["--dtype", "fp32", *_LOCAL, *argv], name, "fp32",
                "experts" if name == "EP 8" else "model",
            )
            for name, argv in LAYOUTS[self.processes].items()
        ]  # fmt: skip
        split = self._large(*_LOCAL, "--tensor-model-parallel-size", str(self.processes))
        graphs = self._decoding("_split", split, f", TP {self.processes}")[0]
        return [*cases, replace(graphs, part="layouts", processes=self.processes)]

    def _eight(self, part: str, name: str, more: list[str], title: str, **about: Any) -> Case:
        recipe = ["--preset", "phf_8b", *_TP2, *_SHARDED, "--overlap-grad-reduce", *more]
        argv = self._large(*recipe, "--global-batch-size", "32", model=self.path("eight"))
        settings = {"batch": 32, "rounds": 4, "flows": [True], "sample": True}
        return self._step(part, name, argv, f"the 8B recipe{title}", processes=8, needs=("eight",),
                          settings=settings, seconds=240.0, **about)  # fmt: skip

    def _recipes(self) -> list[Case]:
        """The recipe of 8B as it is: examples/h100/qwen3_8b.sh, five steps of it."""
        argv = [self.path("eight"), "8B"]
        write = Case("recipe", "eight", "write", 1, argv, missing=self.disk, seconds=120.0)
        return [write, self._eight("recipe", "recipe", _LOCAL, "", missing=self.disk)]

    def _vllm(self) -> list[Case]:
        """Two steps by each way of bringing weights; then a server that is killed amid one."""
        cases = []
        for way, row in (*((way, "ran") for way in _WAYS), ("nccl", "killed")):
            name = f"vllm_{way if row == 'ran' else row}"
            launch = f"CUDA_VISIBLE_DEVICES={0 if way == 'ipc' else 7} --max-model-len 256"
            launch += " --gpu-memory-utilization 0.4"
            if way == "ipc":
                launch = f"VLLM_ALLOW_INSECURE_SERIALIZATION=1 {launch}"
            argv = [*self.job, *_LOCAL, "--train-iters", "2", "--rollout-engine", "vllm"]
            argv += ["--hf-model", self._tiny("served"), "--vllm-launch", launch]
            argv += ["--vllm-weight-sync", way, *_WAYS[way], *self._quiet(name)]
            words = f"weights by {way}" if row == "ran" else "its server killed amid a transfer"
            cases.append(
                Case("vllm", name, "job", 1, argv, f"vLLM, {words}", row, missing=self.vllm,
                     settings={"kill_server": row == "killed"}, seconds=110.0)
            )  # fmt: skip
        return cases

    def _engines(self) -> list[Case]:
        buffers = [*_TP2, *_TE, *_PACKED, "--tp-comm-overlap"]
        missing = self.engine or self.disk
        return [
            self._gradients("engines", "te_8", 8, [*LAYOUTS[8]["TP 2 x PP 2 x DP 2"], *_TE],
                            "Transformer Engine, TP 2 x PP 2 x DP 2", "bf16", missing=self.engine),
            self._gradients("engines", "userbuffers", 8, buffers, "userbuffers", "bf16",
                            missing=self.engine),
            self._eight("engines", "recipe_te", _TE, ", Transformer Engine", missing=missing),
            self._eight("engines", "recipe_fp8", [*_TE, *_FP8], ", FP8", missing=missing),
        ]  # fmt: skip

    def _end(self) -> list[Case]:
        """Training beside itself: another precision; ended by TERM, and gone on with."""
        split = [] if self.processes == 1 else [*_TP2, *(_SHARDED if self.processes == 8 else [])]
        again = ["--rollout-engine", "replay", "--replay-file", self.path("rollouts.jsonl")]
        fp32, bf16 = ["--dtype", "fp32", *_LOCAL], ["--dtype", "bf16", *_LOCAL]
        record = ["--record-rollouts", self.path("rollouts.jsonl")]

        def case(name: str, argv: list[str], **about: Any) -> Case:
            argv = [*self.job, *split, "--train-iters", str(self.steps), *argv, *self._quiet(name)]
            return Case("end", name, "job", self.processes, argv, **about)

        cases = [
            case("train", [*fp32, *record]),
            case("train_bf16", [*again, *bf16], title="losses, bf16 against fp32", row="curve",
                 needs=("train",), settings={"precision": "bf16"}),
            case("train_fp8", [*again, *_TE, *_FP8], title="losses, FP8 against bf16", row="curve",
                 needs=("train_bf16",), settings={"precision": "fp8"}, missing=self.engine),
        ]  # fmt: skip
        for name, more in (("save", []), ("asynchronous save", ["--async-save"])):
            word = name.split()[0]
            argv = [*again, *fp32, "--save", self.path(f"{word}.checkpoints"), *more]
            cases += [
                case(f"{word}_term", argv, settings={"term": self.steps // 2}),
                case(f"{word}_resumed", [*argv, "--load", self.path(f"{word}.checkpoints")],
                     title=f"losses, resumed after TERM and {name}", row="resume",
                     needs=("train", f"{word}_term")),
            ]  # fmt: skip
        return cases
