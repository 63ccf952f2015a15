"""The method's settings, as the reference takes them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """The method's settings; ``clip_mode`` entry, token or none."""

    alpha: float = 0.05
    beta: float = 0.0
    temperature: float = 1.1
    clip_mode: str = "entry"
    clip: float = 0.05
    top_k: int = 0
    window_size: int = 128
    window_rule: str = "even"
    objective: str = "jsd"
    opsd_weight: float = 1.0  # of the output loss
    layer_map: tuple[int, ...] | None = None  # None: by relative depth
    terms: str = "direction,geometry,adjacent"  # of the flow loss; name or name=weight each
    layers: tuple[int, ...] | None = None  # in the flow loss; None: all
    aux_coeff: float = 0.0  # of the routers' load-balancing loss
    token_weighting: str = "none"
    token_keep_fraction: float = 0.5
    token_entropy_threshold: float = 0.8
    skip_first_tokens: int = 0
    micro_batch_size: int = 1  # over which it is computed
    ratio_cap: float | None = None  # of the importance weights; None: all tokens count alike
