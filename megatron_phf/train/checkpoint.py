"""Save a run and take it up again: weights, optimizer, teacher, position.

The data position is the step's number: rollouts and their prompts depend on nothing else
(``rollout.sources``).  What a run reads (model, data, templates) is not copied into its checkpoints
but fingerprinted, and compared when it resumes.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

import torch.distributed as dist

from megatron_phf.config.settings import Config
from megatron_phf.data.rollouts import Rollout, read_sampled, write_sampled
from megatron_phf.model.gpt_config import model_dtype
from megatron_phf.runtime import device, parallel
from megatron_phf.runtime.together import on_every_rank, on_first_rank
from megatron_phf.train import checkpoint_files as files
from megatron_phf.train.checkpoint_inputs import check_compatible, copy_model_files, inputs
from megatron_phf.train.logging import say
from megatron_phf.train.run_files import versions
from megatron_phf.train.step import Distiller
from megatron_phf.weights import torch_dist
from megatron_phf.weights.sharded import load_weights_state, weights_sharded_state_dict

_SAMPLED = "rollouts.jsonl"
Sampled = Mapping[int, Sequence[Rollout]]


@dataclass(frozen=True)
class Progress:
    """Where a run is; ``iteration`` steps are done."""

    iteration: int = 0
    nonfinite_steps: int = 0  # skipped so far
    nonfinite_in_a_row: int = 0
    collapse: dict[str, Any] = field(default_factory=dict)  # levels of its signs


class Checkpointer:
    """The checkpoints of one run; every method is collective.

    ``sampled``: rollouts of steps to come, of the checkpoint that was taken up.
    """

    def __init__(
        self,
        config: Config,
        distiller: Distiller,
        rendering: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """``rendering``: how the run makes prompts (``build.job_tokenizer``)."""
        self._config, self._distiller, self._rendering = config, distiller, dict(rendering)
        self._directory = config.checkpoint.save
        self._inputs = on_first_rank(inputs, config)
        # A group of its own: the thread's collectives must not mix with those of the steps.
        separate = config.checkpoint.async_save or device.has_cuda()
        self._group = dist.new_group(backend="gloo") if separate else None
        if self._directory is not None:
            on_first_rank(files.remove_leftovers, self._directory)
        self._buffers = torch_dist.HostBuffers() if config.checkpoint.async_save else None
        self._thread: threading.Thread | None = None
        self._problem: Exception | None = None
        self.sampled: Sampled = {}

    def save(self, progress: Progress, sampled: Sampled) -> None:
        """Write a checkpoint, or start to (--async-save).

        ``sampled``: the global batches of steps to come that need not be sampled again.

        Raises:
            ValueError: this one or the one before cannot be written; older ones stay.
        """
        assert self._directory is not None
        self.finish()
        snapshot = torch_dist.Snapshot(self._state(loading=False), self._buffers)
        manifest = self._manifest(progress)
        arguments = (snapshot, progress.iteration, manifest, sampled)
        if self._buffers is None:
            self._write(*arguments)
            self.finish()
        else:
            write = device.in_thread(self._write)
            self._thread = threading.Thread(target=write, args=arguments, name="save")
            self._thread.start()

    def finish(self) -> None:
        """Wait for an asynchronous save; ValueError as for :meth:`save`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        problem, self._problem = self._problem, None
        if isinstance(problem, OSError):
            raise ValueError(
                f"--save {self._directory}: cannot be written ({problem}); checkpoints saved "
                "before are as they were"
            )
        if problem is not None:
            raise problem

    def _write(
        self, snapshot: torch_dist.Snapshot, iteration: int, manifest: dict, sampled: Sampled
    ) -> None:
        """All ranks write beside the final place; rank 0 publishes.  Leaves an error behind."""
        assert self._directory is not None
        where = (self._directory, iteration)
        partial, rank, group = files.partial_directory(*where), dist.get_rank(), self._group
        try:
            on_first_rank(files.start, *where, group=group)
            snapshot.write(partial, group)
            on_first_rank(copy_model_files, self._config, partial, group=group)
            if sampled:
                path = os.path.join(partial, _SAMPLED)
                on_first_rank(write_sampled, path, sampled, group=group)
            mine = [n for n in files.files_below(partial) if _writer(n) == rank]
            settled = on_every_rank(files.settle, partial, mine, group=group)
            for part in parallel.gather_objects(settled, group):
                manifest["files"].update(part)
            on_first_rank(files.publish, *where, manifest, group=group)
            if count := self._config.checkpoint.keep_last:
                on_first_rank(files.keep_last, self._directory, count, group=group)
        except OSError as error:
            if rank == 0:
                files.discard(*where)
            self._problem = error
        except Exception as error:  # of a thread, which has nobody to tell
            self._problem = error

    def _manifest(self, progress: Progress) -> dict[str, Any]:
        return {
            "format": files.FORMAT,
            "progress": asdict(progress),
            "schedule_steps": self._distiller.optimizer.schedule_steps,
            "lr_decay_iters": self._distiller.optimizer.lr_decay_iters,
            "versions": versions(),
            "config": asdict(self._config),
            "architecture": asdict(self._distiller.arch),
            "dtype": str(model_dtype(self._config)),
            "layout": self._layout(),
            "inputs": self._inputs,
            "rendering": self._rendering,
            "files": {},
        }

    def _layout(self) -> dict[str, Any]:
        layout = asdict(self._config.parallel)
        del layout["distributed_timeout_minutes"]
        return {"world_size": dist.get_world_size(), **layout}

    def _state(self, loading: bool) -> dict[str, Any]:
        distiller = self._distiller
        state = weights_sharded_state_dict(distiller.student)
        state["optimizer"] = distiller.optimizer.sharded_state_dict(state, loading)
        state["teacher"] = distiller.teacher.sharded_state_dict()
        return state

    def resume(self) -> Progress:
        """Take up the newest good checkpoint of --load; a fresh start where there is none.

        Raises:
            ValueError: none is good, or (--exact-checkpoint) not the newest; or it belongs to
                another model, data or method: names the file or flag.
        """
        directory = self._config.checkpoint.load
        assert directory is not None
        if files.converted_weights(directory) is not None:
            say(f"--load {directory}: converted weights, starting before step 1")
            return Progress()
        iterations = on_first_rank(files.saved_iterations, directory)
        exact = self._config.checkpoint.exact_checkpoint
        if not iterations:
            if exact:
                raise ValueError(f"--load {directory}: no checkpoint there (--exact-checkpoint)")
            say(f"--load {directory}: no checkpoint there, starting from --hf-model")
            return Progress()
        for iteration in iterations:
            path = files.iteration_directory(directory, iteration)
            manifest, problem = _examined(path)
            if problem is None:
                return self._take(path, manifest)
            if exact:
                raise ValueError(f"damaged checkpoint: {problem} (--exact-checkpoint)")
            say(f"damaged checkpoint: {problem}; trying the one before")
        raise ValueError(
            f"--load {directory}: all {len(iterations)} checkpoints are damaged; restore one, or "
            "start anew without --load"
        )

    def _take(self, path: str, manifest: dict[str, Any]) -> Progress:
        for change in check_compatible(path, manifest, self._manifest(Progress())):
            say(f"changed since the checkpoint: {change}")
        asked = self._state(True)
        state = torch_dist.read(asked, path, complete=False)
        load_weights_state(self._distiller.student, state)
        # Checkpoints of older versions decay over all steps, and do not say so.
        decay = manifest.get("lr_decay_iters", manifest["config"]["train"]["train_iters"])
        optimizer, train = self._distiller.optimizer, self._config.train
        saved = (asked["optimizer"], state["optimizer"])
        optimizer.load_state_dict(*saved, manifest["schedule_steps"], decay)
        if train.lr_decay_iters is None and decay != train.train_iters:
            say(f"the learning rate goes on as it began, over {decay} steps (--lr-decay-iters)")
        self._distiller.teacher.load_state_dict(state.get("teacher", {}))
        fields = {f.name for f in dataclasses.fields(Progress)}
        progress = Progress(**{k: v for k, v in manifest["progress"].items() if k in fields})
        rollouts = os.path.join(path, _SAMPLED)
        self.sampled = read_sampled(rollouts) if _SAMPLED in manifest["files"] else {}
        say(f"resumed from {path} after step {progress.iteration}")
        return progress


def _writer(name: str) -> int:
    """The rank that wrote a file: torch names its files ``__RANK_NUMBER.distcp``."""
    first = name.removeprefix("__").split("_")[0]
    return int(first) if name.startswith("__") and first.isdigit() else 0


def _examined(path: str) -> tuple[dict[str, Any], str | None]:
    """The manifest, and what is wrong with the checkpoint; each rank reads a part of the files."""
    try:
        manifest = on_first_rank(files.read_manifest, path)
    except ValueError as error:
        return {}, str(error)
    names = sorted(manifest["files"])[dist.get_rank() :: dist.get_world_size()]
    found = files.damage(path, {name: manifest["files"][name] for name in names})
    problems = [text for part in parallel.gather_objects(found) for text in part]
    return manifest, f"{path}: {'; '.join(problems)}" if problems else None
