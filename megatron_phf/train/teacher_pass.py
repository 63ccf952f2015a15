"""The teacher reads the rollouts: targets for every layer, and states for the output loss."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_phf.hidden.rows import SequenceShards, gather_rows
from megatron_phf.hidden.tap import FlowTap
from megatron_phf.model.gpt import evaluating
from megatron_phf.teacher.kinds import Teacher
from megatron_phf.train.batch import StepBatch, flow_windows
from megatron_phf.train.pipeline import run_pipeline


@dataclass(frozen=True)
class TeacherOutput:
    """What the output loss needs of the teacher on the last stage, elsewhere empty.

    ``rows``: final hidden states [n, h] of each microbatch; ``heads``: its teacher's output weight,
    one tensor for all of a teacher.  What is not on the device always (an offloaded teacher's, that
    of a teacher whose turn is over) stays there until the student's pass has read it.
    """

    rows: dict[int, Tensor]
    heads: dict[int, Tensor]


@dataclass(frozen=True)
class TeacherPass:
    """A forward-only pipeline over the microbatches; ``tap`` None: there is no flow loss.

    ``scores``: the output loss needs it too; where neither does, nothing is computed.
    """

    teacher: Teacher
    tap: FlowTap | None
    shards: SequenceShards
    scores: bool = True

    def __call__(self, batch: StepBatch) -> TeacherOutput:
        """Flow targets into the tap on every stage, and, on the last, final hidden states.

        Never its logits.
        """
        batches = batch.teachers
        output = TeacherOutput({}, {})
        if self.tap is None and not self.scores:
            return output
        chunks = self.teacher.chunks

        def keep(index: int, hidden: Tensor) -> tuple[Tensor, None]:
            # All of them on every context rank: the student's row may be elsewhere.
            output.rows[index] = gather_rows(hidden, batches[index].scored, self.shards)
            output.heads[index] = chunks[-1].output_weight().detach()
            return hidden.new_zeros(()), None

        if self.tap is not None:
            self.tap.start_recording(flow_windows(batches))
        with self.teacher.active() as switch, evaluating(chunks):
            turn = (
                None if switch is None else lambda c, index: switch(c, batch.teacher_names[index])
            )
            run_pipeline(chunks, batches, keep, self.shards, forward_only=True, prepare=turn)
        if self.tap is not None:
            self.tap.finish_recording()
        return output
