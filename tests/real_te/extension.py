"""Transformer Engine's own Python on a CPU: its C extension, triton and onnx stubbed.

The extension's enumerations are those that its Python reads while it is imported; of its functions
Adam's kernels and the norm compute, with torch's arithmetic, and every other one raises.
"""

from __future__ import annotations

import enum
import importlib
import os
import sys
import types
import warnings
from unittest.mock import MagicMock

import torch

from megatron_phf.runtime import cuda_on_cpu

_DTYPES = ("Byte", "Int32", "Float32", "Float16", "BFloat16", "Float8E4M3", "Float8E5M2")
_ENUMS = {
    "DType": [f"k{name}" for name in (*_DTYPES, "Float4E2M1")],
    "FP8FwdTensors": [
        f"GEMM{i}_{kind}" for i in (1, 2, 3) for kind in ("INPUT", "WEIGHT", "OUTPUT")
    ],
    "NVTE_Fused_Attn_Backend": ["NVTE_No_Backend", "NVTE_F16_arbitrary_seqlen", "NVTE_FP8"],
    "FP8BwdTensors": [f"GRAD_{kind}{i}" for i in (1, 2, 3) for kind in ("OUTPUT", "INPUT")],
}

_TRITON = ("", ".language", ".language.core", ".language.standard", ".runtime")
_STUBBED = ("onnx", "onnxscript", *(f"triton{name}" for name in _TRITON))


class _Named(type):
    """A class whose every attribute is a number of its own: an enumeration not written out."""

    def __getattr__(cls, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, cls(len(cls.__dict__)))
        return cls.__dict__[name]


class _Extension(types.ModuleType):
    """What is not in ``_ENUMS``: a name in capitals is an enumeration, others are kernels."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)

        def kernel(*args: object, **kwargs: object) -> None:
            raise NotImplementedError(f"transformer_engine_torch.{name}: there is no GPU")

        value = _Named(name, (int,), {}) if name[0].isupper() else kernel
        setattr(self, name, value)
        return value


def multi_tensor_adam(
    chunk, noop, lists, lr, beta1, beta2, eps, step, mode, bias_correction, weight_decay
) -> None:
    """The kernel's arithmetic (multi_tensor_apply's adam.cu), on fp32 tensors."""
    assert not noop.item()
    first, second = ((1 - b**step) if bias_correction else 1 for b in (beta1, beta2))
    for grad, p, m, v in zip(*lists, strict=True):
        g = grad if mode else grad + weight_decay * p
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        update = (m / first) / ((v / second).sqrt() + eps)
        p.sub_(lr * (update + weight_decay * p if mode else update))


def create_empty_quantized_tensor(quantizer, shape, dtype, device, *pinned):
    """An FP8 tensor of one scale, whose values mean nothing yet."""
    kind = importlib.import_module("transformer_engine.pytorch").Float8Tensor
    data = torch.zeros(*shape, dtype=torch.uint8)
    return kind(
        shape=data.shape, dtype=dtype, data=data, fp8_scale_inv=torch.ones(1),
        fp8_dtype=quantizer.dtype, quantizer=quantizer, device=data.device,
    )  # fmt: skip


def quantize(tensor, quantizer, out=None, noop=None):
    """To FP8 with a scale a tensor: the quantizer's own, or 448 over the largest entry."""
    if out is None:
        out = quantizer.make_empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    largest = tensor.detach().abs().max().float()
    scale = getattr(quantizer, "scale", 448 / largest)
    rounded = (tensor.detach().float() * scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    out._data.copy_(rounded.view(torch.uint8))
    out._scale_inv.copy_(1 / scale)
    return out


def multi_tensor_l2norm(chunk, noop, lists, per_tensor=False):
    """The norm of all tensors of the one list, and of each where asked for."""
    norms = torch.stack([t.float().norm() for t in lists[0]])
    return norms.norm()[None], norms if per_tensor else torch.empty(0)


_FUNCTIONS = (multi_tensor_adam, multi_tensor_l2norm, create_empty_quantized_tensor, quantize)


def make_importable(directory: str) -> None:
    """Import ``transformer_engine`` of ``directory`` into this process.

    Raises:
        ImportError: the package there needs more than this stub has.
    """
    extension = _Extension("transformer_engine_torch")
    for name, members in _ENUMS.items():
        setattr(extension, name, enum.IntEnum(name, members, start=0))
    for function in _FUNCTIONS:
        setattr(extension, function.__name__, function)
    extension.get_cudnn_version = lambda: 91300
    sys.modules["transformer_engine_torch"] = extension
    importlib.import_module("torch._inductor.compile_fx")  # before there seems to be a triton
    for name in _STUBBED:
        sys.modules[name] = MagicMock(__spec__=None, __path__=[], __version__="3.0")
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # no libraries of CUDA are looked for
    os.environ["NVTE_TORCH_COMPILE"] = "0"  # torch's compiler would take the stub for triton
    sys.path.insert(0, directory)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the extension, which the first import does not find
        common = importlib.import_module("transformer_engine.common")
        common.load_framework_extension = lambda framework: None
        importlib.import_module("transformer_engine.pytorch")


def see_a_hopper() -> None:
    """Let Transformer Engine's modules see a Hopper whose memory is the host's."""
    view = cuda_on_cpu._cpu_view()
    properties = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    view.cuda.is_available = lambda: True
    view.cuda.get_device_capability = lambda *args: (9, 0)
    view.cuda.get_device_properties = lambda *args: properties
    for name, module in list(sys.modules.items()):
        if name.startswith("transformer_engine") and getattr(module, "torch", None) is torch:
            module.torch = view
