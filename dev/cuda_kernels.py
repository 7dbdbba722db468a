"""Check and time the CUDA kernels of ops/ on a GPU, with PyTorch in the place of Paddle.

    python dev/cuda_kernels.py                  all checks, then the time of each layer
    compute-sanitizer python dev/cuda_kernels.py -small

The kernels know nothing of either framework: they take addresses. So this shows what they compute, and how
fast, on a machine that has nvcc and PyTorch but no Paddle. tools/verify_gpu.py does the same within Paddle.
The oracle is the formula in float64, with PyTorch's own gradients.
"""
from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import Tensor

OPS = Path(__file__).resolve().parents[1] / 'ops'
SHIM = """
#include "halo_attention_gpu.h"
#define HALO_CALLS(T, NAME)                                                                           \\
  extern "C" int NAME##_forward(const halo::Shape* s, T** p, cudaStream_t stream) {                   \\
    return halo::forward<T>(*s, {p[0], p[1], p[2], p[3]}, p[4], stream);                              \\
  }                                                                                                   \\
  extern "C" int NAME##_backward(const halo::Shape* s, T** p, float* scratch, cudaStream_t stream) {  \\
    const halo::Gradients<T> gradients{p[5], p[6], p[7], p[8]};                                       \\
    return halo::backward<T>(*s, {p[0], p[1], p[2], p[3]}, p[4], gradients, scratch, stream);         \\
  }
HALO_CALLS(float, float32)
HALO_CALLS(__half, float16)
HALO_CALLS(__nv_bfloat16, bfloat16)
extern "C" size_t scratch(const halo::Shape* s) { return halo::workspace(*s); }
"""
LIMITS = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}      # of the largest value
MIN_SECONDS = 0.2                                   # that each timing lasts


class Shape(ctypes.Structure):
    """The sizes of one attention layer, laid out as halo::Shape in ops/shape.h."""

    _fields_ = [(name, ctypes.c_int) for name in ('B', 'N', 'd', 'v', 'H', 'W', 'block', 'halo', 'Hq', 'Wq')]


@dataclass(frozen=True)
class Layer:
    """One attention layer; `where` tells which network has it."""

    where: str
    batch: int
    heads: int
    head_dim: int
    value_dim: int
    height: int
    width: int
    block: int = 8
    halo: int = 2
    stride: int = 1

    def shape(self, batch: int = 0) -> Shape:
        rows, columns = -(-self.height // self.stride), -(-self.width // self.stride)
        return Shape(batch or self.batch, self.heads, self.head_dim, self.value_dim, self.height, self.width,
                     self.block, self.halo, rows, columns)


SPEED = (
    Layer('26t, stage 3', 256, 8, 32, 32, 16, 16),
    Layer('26t, stage 4, stride 2', 256, 8, 64, 64, 16, 16, stride=2),
    Layer('26t, stage 4', 256, 8, 64, 64, 8, 8),
    Layer('h1, stage 1', 64, 4, 16, 16, 64, 64, halo=3),
    Layer('h1, stage 2', 64, 8, 16, 16, 32, 32, halo=3),
)
CHECKS = (
    *SPEED,
    Layer('a ragged map', 3, 2, 24, 40, 19, 29, halo=3),
    Layer('a ragged map, stride 2', 2, 3, 16, 16, 21, 18, stride=2),
    Layer('blocks of 12, three channels a lane', 2, 2, 72, 72, 24, 36, block=12, halo=1),
    Layer('a halo wider than the block', 2, 2, 8, 8, 14, 14, block=4, halo=6),
    Layer('no halo', 2, 4, 128, 128, 16, 16, halo=0),
    Layer('one pixel', 1, 1, 1, 1, 1, 1),
)


# ---- the kernels

def build(folder: str) -> Any:
    """Compile the kernels for this machine's GPU by nvcc and load them."""
    source, library = Path(folder, 'shim.cu'), Path(folder, 'kernels.so')
    source.write_text(SHIM)
    subprocess.run(['nvcc', '-O3', '-std=c++17', '-arch=native', '-shared', '-Xcompiler', '-fPIC', f'-I{OPS}',
                    str(source), str(OPS / 'halo_attention.cu'), '-o', str(library)], check=True)
    kernels = ctypes.CDLL(str(library))
    kernels.scratch.restype = ctypes.c_size_t
    return kernels


def fused(kernels: Any, shape: Shape) -> tuple[Callable, Callable]:
    """Return forward(inputs) -> out and backward(inputs, dout) -> four gradients."""
    scratch = torch.empty(kernels.scratch(ctypes.byref(shape)), device='cuda')

    def call(name: str, tensors: list, *more: Any) -> None:
        pointers = (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
        dtype = str(tensors[0].dtype).split('.')[1]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        error = getattr(kernels, f'{dtype}_{name}')(ctypes.byref(shape), pointers, *more, stream)
        if error:
            raise RuntimeError(f'{name} of {dtype}: CUDA error {error}')

    def forward(inputs: list) -> Tensor:
        out = inputs[0].new_empty(shape.B, shape.N * shape.v, shape.Hq, shape.Wq)
        call('forward', [*inputs, out])
        return out

    def backward(inputs: list, dout: Tensor) -> list:
        gradients = [torch.empty_like(tensor) for tensor in inputs]
        call('backward', [*inputs, dout, *gradients], ctypes.c_void_p(scratch.data_ptr()))
        return gradients

    return forward, backward


# ---- the formula

def block_counts(shape: Shape) -> tuple[int, int]:
    """Return how many blocks cover the height and the width of the map."""
    return -(-shape.H // shape.block), -(-shape.W // shape.block)


def windows_of(shape: Shape, q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return queries (B, N, blocks, b*b, d), windows (B, N, blocks, w*w, d + v), and b."""
    rows, columns = block_counts(shape)
    window = shape.block + 2 * shape.halo
    stride = next(s for s in range(1, shape.block + 1)
                  if -(-shape.H // s) == shape.Hq and -(-shape.W // s) == shape.Wq and shape.block % s == 0)
    b = shape.block // stride
    q = F.pad(q, (0, columns * b - shape.Wq, 0, rows * b - shape.Hq))
    q = q.view(shape.B, shape.N, shape.d, rows, b, columns, b).permute(0, 1, 3, 5, 4, 6, 2)
    kv = F.pad(kv, (shape.halo, columns * shape.block - shape.W + shape.halo,
                    shape.halo, rows * shape.block - shape.H + shape.halo))
    kv = kv.unfold(2, window, shape.block).unfold(3, window, shape.block)
    kv = kv.unflatten(1, (shape.N, shape.d + shape.v)).permute(0, 1, 3, 4, 5, 6, 2)
    return q.flatten(4, 5).flatten(2, 3), kv.flatten(4, 5).flatten(2, 3), b


def outside(shape: Shape, device: Any) -> Tensor:
    """Return (blocks, 1, w*w), True for keys of a ragged map beyond its halo."""
    window = shape.block + 2 * shape.halo
    places = torch.arange(window, device=device)
    rows = torch.arange(0, shape.H, shape.block, device=device)[:, None] + places
    columns = torch.arange(0, shape.W, shape.block, device=device)[:, None] + places
    beyond_row = rows >= shape.H + 2 * shape.halo
    beyond_column = columns >= shape.W + 2 * shape.halo
    beyond = beyond_row[:, None, :, None] | beyond_column[None, :, None, :]
    return beyond.flatten(2).flatten(0, 1)[:, None]


def join(shape: Shape, out: Tensor, b: int) -> Tensor:
    """Return (B, N*v, Hq, Wq) of blocks (B, N, blocks, b*b, v)."""
    rows, columns = block_counts(shape)
    out = out.view(shape.B, shape.N, rows, columns, b, b, shape.v).permute(0, 1, 6, 2, 4, 3, 5)
    out = out.reshape(shape.B, shape.N * shape.v, rows * b, columns * b)
    return out[:, :, :shape.Hq, :shape.Wq]


def of_positions(q: Tensor, table: Tensor, b: int, window: int, axis: int) -> Tensor:
    """Return (B, N, blocks, b*b, w): each query times the table's rows for the w rows or columns it sees."""
    at = torch.arange(window, device=q.device) - torch.arange(b, device=q.device)[:, None] + window - 1
    q = q.unflatten(3, (b, b))
    logits = torch.einsum('znkyxd,ywd->znkyxw' if axis == 0 else 'znkyxd,xwd->znkyxw', q, table[at])
    return logits.flatten(3, 4)


def composed(shape: Shape, q: Tensor, kv: Tensor, height_rel: Tensor, width_rel: Tensor) -> Tensor:
    """Compute halo attention by PyTorch's operators, with the logits in memory."""
    q, kv, b = windows_of(shape, q, kv)
    window = shape.block + 2 * shape.halo
    key, value = kv.split([shape.d, shape.v], -1)
    rows = of_positions(q, height_rel, b, window, 0)[..., :, None]
    columns = of_positions(q, width_rel, b, window, 1)[..., None, :]
    logits = (q * shape.d ** -0.5) @ key.transpose(-1, -2) + (rows + columns).flatten(4)
    if shape.H % shape.block or shape.W % shape.block:
        logits = logits.masked_fill(outside(shape, q.device), -torch.inf)
    return join(shape, logits.softmax(-1) @ value, b)


def sdpa(shape: Shape, q: Tensor, kv: Tensor, height_rel: Tensor, width_rel: Tensor) -> Tensor:
    """Compute it by scaled_dot_product_attention, the position logits being channels of one-hot keys."""
    q, kv, b = windows_of(shape, q, kv)
    window = shape.block + 2 * shape.halo
    key, value = kv.split([shape.d, shape.v], -1)
    rows = of_positions(q, height_rel, b, window, 0)
    columns = of_positions(q, width_rel, b, window, 1)
    place = torch.eye(window, device=q.device, dtype=q.dtype)
    row, column = place[:, None].expand(-1, window, -1), place.expand(window, -1, -1)
    one_hot = torch.cat([row, column], -1).flatten(0, 1)
    query = torch.cat([q * shape.d ** -0.5, rows, columns], -1).flatten(0, 2)
    key = torch.cat([key, one_hot.expand(*key.shape[:3], -1, -1)], -1).flatten(0, 2)
    value = F.pad(value, (0, query.shape[-1] - shape.v)).flatten(0, 2)
    out = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None], scale=1.0)
    return join(shape, out[..., :shape.v].reshape(shape.B, shape.N, -1, b * b, shape.v), b)


# ---- checks and timings

def draw(shape: Shape, dtype: Any) -> tuple[list, Tensor]:
    """Return random inputs q, kv and both tables, and a gradient of the output."""
    generator = torch.Generator('cuda').manual_seed(0)
    window = shape.block + 2 * shape.halo
    sizes = [(shape.B, shape.N * shape.d, shape.Hq, shape.Wq),
             (shape.B, shape.N * (shape.d + shape.v), shape.H, shape.W),
             (2 * window - 1, shape.d), (2 * window - 1, shape.d),
             (shape.B, shape.N * shape.v, shape.Hq, shape.Wq)]
    tensors = [torch.randn(size, device='cuda', generator=generator) for size in sizes]
    tensors[2:4] = [table * shape.d ** -0.5 for table in tensors[2:4]]
    tensors = [tensor.to(dtype) for tensor in tensors]
    return tensors[:4], tensors[4]


def check(kernels: Any, layer: Layer, dtype: Any) -> tuple[list, bool]:
    """Return the errors of the output and four gradients over the largest value, and if bits repeat."""
    shape = layer.shape(min(layer.batch, 4))
    inputs, dout = draw(shape, dtype)
    forward, backward = fused(kernels, shape)
    results = [forward(inputs), *backward(inputs, dout)]
    again = [forward(inputs), *backward(inputs, dout)]
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    out = composed(shape, *exact)
    out.backward(dout.double())
    expected = [out, *(tensor.grad for tensor in exact)]
    expected = [tensor.detach() for tensor in expected]
    errors = [float((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30))
              for a, b in zip(results, expected)]
    return errors, all(torch.equal(a, b) for a, b in zip(results, again))


def seconds(work: Callable[[], Any]) -> float:
    """Return the seconds of one call on the GPU, in the fastest of five series."""
    work()
    torch.cuda.synchronize()
    count, best = 1, float('inf')
    series = 0
    while series < 5:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(count):
            work()
        end.record()
        end.synchronize()
        passed = start.elapsed_time(end) / 1000
        if passed < MIN_SECONDS / 5:
            count *= 2
            continue
        best, series = min(best, passed / count), series + 1
    return best


def both_passes(function: Callable, shape: Shape, inputs: list, dout: Tensor) -> Callable:
    """Return the work of one forward and backward pass of a function of PyTorch."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]

    def work() -> Any:
        return torch.autograd.grad(function(shape, *leaves), leaves, dout)

    return work


def times(kernels: Any, layer: Layer, dtype: Any) -> Iterator[tuple[str, float, float]]:
    """Yield (attention, microseconds of the forward pass, of both passes), per image."""
    shape = layer.shape()
    inputs, dout = draw(shape, dtype)
    forward, backward = fused(kernels, shape)
    scale = 1e6 / shape.B
    yield ('fused', scale * seconds(lambda: forward(inputs)),
           scale * seconds(lambda: (forward(inputs), backward(inputs, dout))))
    for function in (composed, sdpa):
        with torch.no_grad():
            alone = seconds(partial(function, shape, *inputs))
        yield function.__name__, scale * alone, scale * seconds(both_passes(function, shape, inputs, dout))


def main() -> int:
    """Print one line for each check and timing; return 1 if a check failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-small', action='store_true', help='check the small layers only, and time nothing')
    small = parser.parse_args().small
    card = torch.cuda.get_device_name()
    print(f'{card}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}', flush=True)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        kernels = build(folder)
        for layer in CHECKS[len(SPEED):] if small else CHECKS:
            for dtype, limit in LIMITS.items():
                errors, same = check(kernels, layer, dtype)
                good = max(errors) < limit and same
                failed += not good
                numbers = ' '.join(f'{error:.1e}' for error in errors)
                print(f'{"passed" if good else "FAILED"}  {str(dtype)[6:]:8} {numbers}  '
                      f'{"same bits" if same else "OTHER BITS"}  {layer.where}', flush=True)
        for layer in () if small else SPEED:
            for dtype in LIMITS:
                for name, alone, both in times(kernels, layer, dtype):
                    print(f'{layer.where}, batch {layer.batch}, {str(dtype)[6:]}: {name}: '
                          f'forward {alone:.2f}, both {both:.2f} us/image', flush=True)
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
