"""The product's command line for the reference's options."""

from __future__ import annotations

from megatron_phf.reference.options import Options


def flags(o: Options, model: str, replay: str, batch: int, **more: object) -> list[str]:
    """The product's command line for the reference's options."""
    values = {
        "hf-model": model,
        "replay-file": replay,
        "rollout-engine": "replay",
        "global-batch-size": batch,
        "dtype": "fp32",
        "phf-alpha": o.alpha,
        "phf-window-size": o.window_size,
        "phf-window-rule": o.window_rule,
        "phf-terms": o.terms,
        "opsd-beta": o.beta,
        "opsd-temperature": o.temperature,
        "opsd-clip-mode": o.clip_mode,
        "opsd-clip": o.clip,
        "opsd-top-k": o.top_k,
        "opsd-objective": o.objective,
        "opsd-weight": o.opsd_weight,
        "token-weighting": o.token_weighting,
        "token-keep-fraction": o.token_keep_fraction,
        "token-entropy-threshold": o.token_entropy_threshold,
        "skip-first-tokens": o.skip_first_tokens,
        "logits-chunk-tokens": 16,
        "train-iters": 1,
        "max-prompt-length": 32,
        "max-teacher-prompt-length": 32,
        "max-new-tokens": 64,
        **more,
    }
    if o.ratio_cap is not None:
        values["importance-ratio-cap"] = o.ratio_cap
    if o.layers is not None:
        values["phf-layers"] = ",".join(map(str, o.layers))
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]
