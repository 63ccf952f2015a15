"""Rotary position embeddings: every spelling of them in a ``config.json``, and their frequencies.

transformers 4 keeps ``rope_theta`` beside ``rope_scaling``, transformers 5 all of it in
``rope_parameters``; files have either, both, or ``rope_theta`` inside ``rope_scaling``.
``read_rope`` decides as transformers 5 does (``convert_rope_params_to_dict`` and
``standardize_rope_params`` of its modeling_rope_utils.py), and refuses what would be computed
otherwise.  No import of torch: the checks before launch read it too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_phf.files.foreign import Fields, shown

if TYPE_CHECKING:
    from torch import Tensor

_DEFAULT_BASE = 10000.0  # of transformers' Llama, Qwen2 and Qwen3 where the file says nothing
KINDS = ("default", "linear", "llama3")
# transformers' RopeParameters, and ``type``, the older name; what a kind does not read is ignored.
KNOWN = {
    *("rope_theta", "rope_type", "type", "partial_rotary_factor", "factor", "attention_factor"),
    *("original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "short_factor"),
    *("long_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "mrope_section",
}


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's: wavelengths from ``original / low`` on are divided by the factor.

    Those up to ``original / high`` stay, and between the two it is interpolated.
    """

    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Rope:
    """Frequencies ``base ** (-2 i / channels)``, divided by ``factor``: all, or as ``llama3``."""

    base: float = _DEFAULT_BASE
    factor: float = 1.0
    llama3: Llama3Scaling | None = None


def _parameters(content: Fields) -> tuple[Fields, float]:
    """(the object that decides, the base): ``rope_scaling`` where it has something in it.

    The base stands in that object, else beside it.
    """
    scaling = content.table("rope_scaling")
    parameters = scaling if scaling.content else content.table("rope_parameters")
    for fields in (parameters, content):
        if "rope_theta" in fields.content:  # null is no number: transformers fails on it too
            return parameters, fields.number("rope_theta")
    return parameters, _DEFAULT_BASE


def _check_parameters(content: Fields, parameters: Fields) -> None:
    for fields in (parameters, content):
        share = fields.number("partial_rotary_factor", 1.0)
        if share != 1:  # transformers has it ignored by some kinds and fail in others
            raise ValueError(
                f"{content.path}: partial_rotary_factor={share:g} is not supported: all channels "
                "of a head are rotated"
            )
    for name in parameters.content.keys() - KNOWN:  # by kind of layer, among others
        raise ValueError(f"{content.path}: rope parameter {shown(name)} is not supported")


def _llama3(content: Fields, parameters: Fields) -> Llama3Scaling:
    name = "original_max_position_embeddings"
    # transformers prefers the one beside, and takes max_position_embeddings where there is none.
    beside = name in content.content
    original = (content if beside else parameters).size(
        name, None if beside or name in parameters.content else _positions(content)
    )
    low, high = (parameters.number(f"{which}_freq_factor") for which in ("low", "high"))
    if high <= low:
        raise ValueError(
            f"{content.path}: high_freq_factor {high:g} is not above low_freq_factor {low:g}; copy "
            "the model again"
        )
    return Llama3Scaling(low, high, original)


def _positions(content: Fields) -> int:
    return content.size("max_position_embeddings")


def read_rope(content: Fields, kinds: Sequence[str] = KINDS) -> Rope:
    """The rotary embedding of a ``config.json``, as transformers 5 reads it.

    Raises:
        ValueError: a kind, or a number of it, that the Megatron model would compute otherwise.
    """
    parameters, base = _parameters(content)
    _check_parameters(content, parameters)
    named = [parameters.content[n] for n in ("rope_type", "type") if n in parameters.content]
    kind = named[0] if named else "default"
    if kind not in kinds:
        raise ValueError(
            f"{content.path}: rope scaling {shown(kind)} is not supported (only {', '.join(kinds)})"
        )
    if kind == "default":
        return Rope(base)
    factor = parameters.number("factor")
    return Rope(base, factor, _llama3(content, parameters) if kind == "llama3" else None)


def scaled_frequencies(frequencies: Tensor, rope: Rope) -> Tensor:
    """The unscaled ``frequencies`` [channels / 2] as ``rope`` scales them, in their dtype.

    The operations and their order are those of transformers (modeling_rope_utils.py), so that the
    result has the same bits.
    """
    import torch

    slow = frequencies / rope.factor
    if rope.llama3 is None:
        return slow
    scaling, wavelength = rope.llama3, 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    original = scaling.original_max_position_embeddings
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    result = torch.where(wavelength > original / low, slow, between)
    return torch.where(wavelength < original / high, frequencies, result)
