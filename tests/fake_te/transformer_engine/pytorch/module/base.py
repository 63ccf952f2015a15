"""Userbuffers: nothing is allocated, but their shape is kept, and linears are held to it."""

from transformer_engine.recording import record

shape: list[int] = []


def initialize_ub(shape, tp_size, use_fp8=False, bootstrap_backend=None) -> None:
    """Again for each case of the tests' driver; the real one may run once a process."""
    record.append({"what": "initialize_ub", "tokens": shape[0], "fp8_buffers": use_fp8})
    globals()["shape"] = shape


def check(x, fp8: bool) -> None:
    """As the real buffers do with a tensor that they are to hold."""
    assert shape == [x.shape[:-1].numel(), x.shape[-1]], f"userbuffers {shape}: {tuple(x.shape)}"
    started = [r for r in record if r["what"] == "initialize_ub"]
    assert started[-1]["fp8_buffers"] == fp8, "userbuffers of this precision are not registered"
