"""What each kind of teacher (``--teacher``) has.  Without torch: the checks and estimates ask."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_phf.config.settings import Config


@dataclass(frozen=True)
class TeacherTraits:
    """``copy``: weights of its own, else the student's; ``average``: fp32 ones of what is trained.

    ``adapters``: it can share the base weights of a student that trains adapters alone.
    """

    copy: bool = True
    average: bool = False
    adapters: bool = True

    @property
    def follows(self) -> bool:
        """Whether it changes with the student."""
        return self.average or not self.copy


TRAITS = {
    "frozen": TeacherTraits(),
    "ema": TeacherTraits(average=True),
    "live": TeacherTraits(copy=False),
}


def traits_of(config: Config) -> TeacherTraits:
    """Those of the run's teacher."""
    return TRAITS[config.method.teacher]
