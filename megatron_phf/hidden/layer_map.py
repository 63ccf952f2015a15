"""Which layer of another model each layer is compared with.

Standard library only: the checks before launch use it, and so does ``megatron_phf.losses``.
"""

from __future__ import annotations

from collections.abc import Sequence


def relative_layer_map(student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """Student layer l = 1..L_S -> teacher layer round(l L_T / L_S), halves up, at least 1.

    The last layers meet; a shallower teacher's layers occur several times, a deeper one's are
    partly left out.
    """
    return tuple(
        max(1, (2 * layer * teacher_layers + student_layers) // (2 * student_layers))
        for layer in range(1, student_layers + 1)
    )


def check_layer_map(layer_map: Sequence[int], student_layers: int, teacher_layers: int) -> None:
    """Raise ValueError unless every student layer has a teacher layer (1-based), in order."""
    if len(layer_map) != student_layers:
        raise ValueError(
            f"{len(layer_map)} teacher layers for the student's {student_layers}: name one for each"
        )
    for layer in layer_map:
        if not 1 <= layer <= teacher_layers:
            raise ValueError(f"teacher layer {layer}: the teacher has layers 1 to {teacher_layers}")
    if list(layer_map) != sorted(layer_map):
        raise ValueError("the teacher layers must not decrease: neighbours meet neighbours")
