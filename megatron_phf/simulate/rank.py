"""One rank of a job, simulated: its build, its steps, and what they took."""

from __future__ import annotations

import contextlib
import itertools
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from megatron_phf.config.teachers import teacher_names
from megatron_phf.data.rollouts import Rollout
from megatron_phf.rollout.megatron.engine import student_engine
from megatron_phf.rollout.sampling import SamplingParams
from megatron_phf.runtime import device, kernels, parallel
from megatron_phf.simulate import results
from megatron_phf.simulate.collectives import communicate
from megatron_phf.simulate.events import short_name
from megatron_phf.simulate.groups import Shapes, join, other_stages
from megatron_phf.simulate.job import Job
from megatron_phf.simulate.mode import FakeCuda
from megatron_phf.simulate.transfers import HANDLERS
from megatron_phf.teacher import kinds
from megatron_phf.train import build
from megatron_phf.train.metrics import PhaseTimer

_DECODED = 3  # tokens that are decoded: all but the first are alike


def make_simulator() -> FakeCuda:
    """The mode that a rank's code runs under; once a process."""
    return FakeCuda(HANDLERS, communicate)


def simulate(sim: FakeCuda, job: Job, rank: int) -> dict[str, Any]:
    """Play ``rank`` of the job in this process; what it took, as JSON holds it."""
    start = time.perf_counter()
    played = _Rank(sim, job)
    try:
        played.run(rank)
    except Exception as error:
        # Whatever CUDA, torch or megatron-core refuses: the job would end here.
        where = played.failed or sim.events.phase
        sim.events.refused[where, _first_line(error), _raised_at(error)] += 1
        played.result["traceback"] = traceback.format_exc()
    found = results.found(sim, job, played.result, played.shapes.tokens)
    return {"rank": rank, "seconds": time.perf_counter() - start, **found}


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300] if text else ''}"


def _raised_at(error: Exception) -> str:
    """The innermost line of the product, or of megatron-core, that an error went through."""
    trace, site = error.__traceback__, "?"
    while trace is not None:
        if short_name(trace.tb_frame.f_code.co_filename) is not None:
            frame = trace.tb_frame
            site = f"{short_name(frame.f_code.co_filename)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return site


class _Timer(PhaseTimer):
    """A step's phases, as the simulation names them."""

    def __init__(self, rank: _Rank) -> None:
        super().__init__()
        self._rank = rank

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with self._rank.phase(name), super().phase(name):
            yield


class _Forward:
    """An engine's forward that knows how often it was called.

    Behind prompts of ``prompt`` tokens the cache grows to what the last of ``new`` needs.
    """

    def __init__(self, function: Callable[..., Any], prompt: int, new: int) -> None:
        self._function, self.calls = function, 0
        self._columns = range(prompt + 1, prompt + new)

    def __call__(self, tokens: Any, positions: Any, caches: Any) -> Any:
        self.calls += 1
        if self.calls == 2:
            for cache, columns in itertools.product(caches, self._columns):
                cache.reserve(columns)
        return self._function(tokens, positions, caches)


class _Rank:
    def __init__(self, sim: FakeCuda, job: Job) -> None:
        self.sim, self.job = sim, job
        self.result: dict[str, Any] = {}
        self.failed: str | None = None
        self.shapes = Shapes()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before, self.sim.events.phase = self.sim.events.phase, name
        try:
            yield
        except Exception:
            self.failed = self.failed or name
            raise
        finally:
            self.sim.events.phase = before

    def run(self, rank: int) -> None:
        """Build, decode where asked, step; raises what the job would raise."""
        job, config = self.job, self.job.config
        for module in (build, kinds):  # weights are not read: there is no memory for them
            module.load_hf_weights = lambda *args, **kwargs: None  # type: ignore[attr-defined]
        if job.engine_stub:
            off = kernels.Feature("fused rotary embedding", False, "not in the stand-in")
            kernels.rope = lambda implementation: off
        device.setup()
        join(self.sim, config, job.world, rank)
        self.shapes.install()
        with self.sim:
            assert config.model.hf_model is not None
            student = build.load_student(job.models.student, config, config.model.hf_model)
            with other_stages(job.models, config):
                distiller = build.make_distiller(job.models, config, student)
            self._name_holders(distiller)
            self.result["memory after build"] = self.sim.memory.bytes
            self.result["memory"] = results.peaks(self.sim.memory)
            distiller.optimizer.make_state()  # every step is like the later ones
            self._follow_updates(distiller.teacher)
            for step in range(1, job.steps + 1):
                self.sim.events.forget()
                self.sim.memory.forget()
                if job.decode:
                    self._decode(student)
                with self.phase("between phases"):
                    distiller.step(step, self._rollouts(), _Timer(self))
                self._name_holders(distiller)
        self._check_steps(distiller)

    def _rollouts(self) -> list[Rollout]:
        count = self.job.config.train.global_batch_size // parallel.data_parallel_size()
        data, new = self.job.config.data, self.job.config.rollout.max_new_tokens
        student, teacher = (1,) * data.max_prompt_length, (1,) * data.max_teacher_prompt_length
        names = teacher_names(self.job.config) or (None,)
        turns = itertools.islice(itertools.cycle(names), count)
        return [Rollout(student, teacher, (1,) * new, teacher=name) for name in turns]

    def _decode(self, student: list[Any]) -> None:
        """A few tokens of a batch of rollouts, in a cache as long as theirs."""
        config = self.job.config
        r, prompt = config.rollout, config.data.max_prompt_length
        count = config.train.global_batch_size // parallel.data_parallel_size()
        sampling = SamplingParams(
            r.rollout_temperature, r.rollout_top_p, r.rollout_top_k, r.max_new_tokens, (1,), 0
        )
        engine: Any = student_engine(config, self.job.models, student)
        engine.prepare(1)
        engine.forward = forward = _Forward(engine.forward, prompt, r.max_new_tokens)
        # What the host asks for is whether any row goes on.
        self.sim.made_up = lambda: int(forward.calls < _DECODED)
        with self.phase("decode"):
            rows = min(count, r.rollout_batch_size)
            # Each its own: equal prompts would be read once.
            size = self.job.models.vocab_size
            prompts = [(i % size, i // size % size, *(1,) * prompt)[:prompt] for i in range(rows)]
            engine.generate(prompts, sampling, list(range(rows)))
        self.sim.made_up = lambda: 1

    def _follow_updates(self, teacher: Any) -> None:
        update = teacher.update

        def named(student: Any) -> None:
            with self.phase("teacher update"):
                update(student)

        teacher.update = named

    def _name_holders(self, distiller: Any) -> None:
        memory, optimizer = self.sim.memory, distiller.optimizer
        memory.belongs_to("weights", (p for c in distiller.student for p in c.parameters()))
        for wrapped in optimizer.wrapped:
            buffers = (*wrapped.buffers, *wrapped.expert_parallel_buffers)
            memory.belongs_to("gradients", (b.grad_data for b in buffers))
        if distiller.teacher.chunks is not distiller.student:
            chunks = distiller.teacher.chunks
            memory.belongs_to("teacher", (p for c in chunks for p in c.parameters()))

    def _check_steps(self, distiller: Any) -> None:
        """A value that was made up must not have let the product leave out its update."""
        done, asked = distiller.optimizer.schedule_steps, self.job.steps
        if distiller.nonfinite.total or done != asked:
            what = f"the optimizer ran in {done} of {asked} steps"
            self.sim.events.refused["optimizer", what, "train/step.py"] += 1
