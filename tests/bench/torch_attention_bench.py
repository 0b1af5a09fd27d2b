#!/usr/bin/env python3
"""Dense causal attention in PyTorch, one layer of the Llama-3.1-8B shape, for comparison with
prefill_attention_bench on the same GPU: cuDNN and FlashAttention behind scaled_dot_product_attention,
and a large bf16 matrix product as the ceiling. Random data; medians of CUDA event times.

    torch_attention_bench.py [--lengths 32768,65536,131072] [--head-dim 64]
"""

import argparse
import statistics

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

HEADS, KV_HEADS = 32, 8


def median_ms(run, warmups=2, runs=7):
    times = []
    for i in range(warmups + runs):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        if i >= warmups:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def gemm_rate(n=8192):
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / median_ms(lambda: a @ b, 5, 15) * 1e-9


def attention_ms(tokens, head_dim, backend):
    def tensor(heads):
        return torch.randn(1, heads, tokens, head_dim, device="cuda", dtype=torch.bfloat16)

    q, k, v = tensor(HEADS), tensor(KV_HEADS), tensor(KV_HEADS)
    try:
        with sdpa_kernel(backend), torch.no_grad():
            return median_ms(
                lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    except RuntimeError:  # this build has no grouped heads: expand them
        k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
        with sdpa_kernel(backend), torch.no_grad():
            return median_ms(lambda: scaled_dot_product_attention(q, k, v, is_causal=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="32768,65536,131072")
    parser.add_argument("--head-dim", type=int, default=128)
    args = parser.parse_args()
    lengths = [int(x) for x in args.lengths.split(",")]
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "cudnn",
          torch.backends.cudnn.version())
    ceiling = gemm_rate()
    print(f"bf16 product 8192^3: {ceiling:.0f} TFLOP/s")
    for tokens in lengths:
        for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION),
                              ("FlashAttention", SDPBackend.FLASH_ATTENTION)):
            ms = attention_ms(tokens, args.head_dim, backend)
            rate = 4 * args.head_dim * HEADS * tokens * (tokens + 1) / 2 / ms * 1e-9
            print(f"{tokens:6d} {name:<27s} {ms:9.3f} ms {rate:9.0f} TFLOP/s "
                  f"{100 * rate / ceiling:5.0f}%", flush=True)


if __name__ == "__main__":
    main()
