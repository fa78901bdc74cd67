"""The GPU's kernels compiled for cards of two makers; `test_triton` runs these tests in a process of their own."""

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from normswap.layers.torch import BatchRenorm2d, SwitchNorm1d, SwitchNorm2d, gpu

from .models import filled

TARGETS = {"cuda": (80, 32), "hip": ("gfx942", 64)}
STEPS = {
    "sn of long rows": (SwitchNorm2d, {}, (2, 64, 56, 56), torch.contiguous_format, torch.bfloat16),
    "sn channels_last": (
        SwitchNorm2d,
        {"batch_statistics": "frozen"},
        (4, 64, 14, 14),
        torch.channels_last,
        torch.half,
    ),
    "sn of short rows": (
        SwitchNorm2d,
        {"compat": "switchablenorms", "affine": False},
        (3, 70, 7, 7),
        None,
        torch.float32,
    ),
    "sn of vectors": (SwitchNorm1d, {"batch_statistics": "none"}, (64, 32), None, torch.float32),
    "brn of long rows": (BatchRenorm2d, {"schedule": "paper", "momentum": None}, (2, 64, 56, 56), None, torch.float32),
    "brn channels_last": (BatchRenorm2d, {"schedule": "sigmoid"}, (1, 3, 90, 91), torch.channels_last, torch.bfloat16),
}
TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64", torch.int64: "*i64"
}  # fmt: skip


def compiled_for(target, kernel, arguments):
    """Compile a kernel as a launch with these arguments would, and return what came of it."""
    signature, constants, divisible = {}, {}, {}
    for index, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=True)):
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and special):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            divisible[index,] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0 and special:
                divisible[index,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible)
    return triton.compile(source, target=GPUTarget(target, *TARGETS[target]), options={"num_warps": gpu.WARPS}).asm


@pytest.mark.parametrize("step", STEPS)
def test_compiles(step, monkeypatch, tmp_path):
    """Each launch of a step compiles to a program for a card; data in rows of 16 values move 16 bytes at a time."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches = []
    monkeypatch.setattr(gpu, "_devices", {"cpu"})
    monkeypatch.setattr(gpu, "_ready", lambda device: True)
    monkeypatch.setattr(gpu, "_launch", lambda kernel, programs, *arguments: launches.append((kernel, arguments)))
    cls, options, shape, layout, dtype = STEPS[step]
    x = torch.ones(shape, dtype=dtype)
    x = (x if layout is None else x.contiguous(memory_format=layout)).requires_grad_()
    y = filled(cls, shape[1], **options)(x)
    y.backward(torch.ones_like(y))

    assert len(launches) == 6
    for kernel, arguments in launches:
        assert compiled_for("hip", kernel, arguments)["hsaco"]
        assembly = compiled_for("cuda", kernel, arguments)
        assert assembly["cubin"]
        if "long rows" in step and kernel.fn.__name__ in ("moments", "affine", "products", "combine"):
            assert "ld.global.v4.b32" in assembly["ptx"]
