"""Writes files in the format of tests/golden/entropy_reference for policy_check.

An independent NumPy reading of EntropyInfer's whole-prompt rule (arXiv 2606.09508), for shapes that
the released code's own files do not cover. Needs numpy and safetensors.

  python make_policy_golden.py OUT_DIR            # the checked-in small ones
  python make_policy_golden.py OUT_DIR --random N # N random ones
"""

import argparse
import os

import numpy as np
from safetensors.numpy import save_file


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def block_masses(c, q, k):
    """p [kv_heads, M, N]: softmax of box scores over the blocks of strictly earlier segments."""
    n, S, B, group = c["tokens"], c["segment_size"], c["block_size"], c["heads"] // c["kv_heads"]
    M = -(-n // S)
    N = (M - 1) * S // B
    p = np.zeros((c["kv_heads"], M, N), np.float32)
    bounds = k[: N * B].reshape(N, B, c["kv_heads"], c["head_dim"])
    high, low = bounds.max(1, initial=-1e30), bounds.min(1, initial=1e30)
    for s in range(M):
        rows = q[s * S : (s + 1) * S]
        center = (rows.max(0) + rows.min(0)) / 2
        visible = s * S // B
        for kv in range(c["kv_heads"]):
            heads = center[kv * group : (kv + 1) * group]
            a = np.maximum(heads @ high[:visible, kv].T, heads @ low[:visible, kv].T).mean(0)
            if visible:
                p[kv, s, :visible] = softmax(a)
            elif N:
                p[kv, s] = 1 / N
    return p


def segment_budgets(c, entropy):
    """Blocks of each segment: the maximum over kv heads."""
    n, S, B, base = c["tokens"], c["segment_size"], c["block_size"], np.float32(c["base_budget"])
    delta, alpha = np.float32(c["delta_t"]), np.float32(c["alpha"])
    M = entropy.shape[1]
    N = (M - 1) * S // B
    counts = np.zeros((entropy.shape[0], M), np.int64)
    for kv, h in enumerate(entropy):
        b, rigid = base, bool((h[1:] < np.float32(c["e_t"])).all())
        for s in range(1, M):
            change = delta
            if s > 1:
                change = np.clip((h[s] - h[s - 1]) / (h[s - 1] + np.float32(1e-9)), 0, 1 + delta)
            b = np.clip(b + alpha * base * (change - delta), base, 3 * base)
            tokens = base if rigid else b
            counts[kv, s] = min(int(tokens // B), s * S // B, N - n % S // B - 1)
    return counts.max(0)


def attention(c, q, k, v, order, counts):
    n, S, B = c["tokens"], c["segment_size"], c["block_size"]
    group = c["heads"] // c["kv_heads"]
    M = -(-n // S)
    out = np.zeros_like(q)
    for s in range(M):
        begin, end = s * S, min(n, (s + 1) * S)
        for h in range(c["heads"]):
            kv = h // group
            mask = np.zeros((end - begin, n), bool)
            if begin < c["threshold_len"] or s == M - 1:
                mask[:, :begin] = True
            for j in order[kv, s, : counts[s]]:
                mask[:, j * B : (j + 1) * B] = True
            mask[:, begin:end] = np.tri(end - begin, dtype=bool)
            x = q[begin:end, h].astype(np.float64) @ k[:, kv].T / np.sqrt(c["head_dim"])
            out[begin:end, h] = softmax(np.where(mask, x, -np.inf)) @ v[:, kv]
    return out


def compress(c, q, k, v):
    """Kept rows of each kv head, best first, then the window."""
    n, W, kernel = c["tokens"], c["window_size"], c["pooling_kernel"]
    group = c["heads"] // c["kv_heads"]
    if n <= c["kv_budget"]:
        return k, v
    rows_k, rows_v = [], []
    causal = np.arange(n)[None] <= np.arange(n - W, n)[:, None]
    for kv in range(c["kv_heads"]):
        x = np.einsum("whd,nd->hwn", q[n - W :, kv * group : (kv + 1) * group].astype(np.float64), k[:, kv])
        mass = softmax(np.where(causal, x / np.sqrt(c["head_dim"]), -np.inf)).mean((0, 1))[: n - W]
        near = np.lib.stride_tricks.sliding_window_view(np.pad(mass, kernel // 2), kernel)
        pooled = near.mean(-1) if c["pooling"] == "avgpool" else near.max(-1)
        best = np.argsort(-pooled, kind="stable")[: c["kv_budget"] - W]
        kept = np.concatenate([best, np.arange(n - W, n)])
        rows_k.append(k[kept, kv])
        rows_v.append(v[kept, kv])
    return np.stack(rows_k, 1), np.stack(rows_v, 1)


def spoil(tensors):
    """One error of each kind: policy_check must find all of them."""
    tensors["p"][0, 1, 0] += 0.01
    tensors["entropy"][0, 1] += 0.01
    tensors["segment_blocks"][-1] -= 1
    tensors["order"][0, 2, 0] = tensors["order"][0, 2, 1]
    tensors["out"][-1] += 0.01
    tensors["compressed_k_gqa"][0] += 1


def make(path, c, rng, scale, spoiled=False):
    common = rng.standard_normal(c["head_dim"])
    lean = lambda shape: rng.standard_normal(shape + (1,)) * common * 0.2

    def draw(heads, share):
        shape = (c["tokens"], heads)
        x = rng.standard_normal(shape + (c["head_dim"],)) + share * lean(shape)
        return (scale * x).astype(np.float16)

    q, k, v = draw(c["heads"], 1), draw(c["kv_heads"], 1), draw(c["kv_heads"], 0)
    qf, kf, vf = (x.astype(np.float32) for x in (q, k, v))
    p = block_masses(c, qf, kf)
    entropy = -(p * np.log(p + np.float32(1e-9))).sum(-1).astype(np.float32)
    counts = segment_budgets(c, entropy)
    order = np.argsort(-p, -1, kind="stable")[:, :, : counts.max()]
    compressed = compress(c, qf, kf, vf)
    tensors = {
        "q": q, "k": k, "v": v, "p": p, "entropy": entropy,
        "segment_blocks": counts.astype(np.int32), "order": order.astype(np.int32),
        "out": attention(c, qf, kf, vf, order, counts),
        "compressed_k_gqa": compressed[0], "compressed_v_gqa": compressed[1],
    }
    tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    if spoiled:
        spoil(tensors)
    save_file(tensors, path, {name: str(value) for name, value in c.items()})


def settings(**changes):
    c = dict(tokens=166, heads=7, kv_heads=1, head_dim=8, segment_size=32, block_size=4,
             threshold_len=32, base_budget=32, e_t=1e-5, delta_t=0.4, alpha=0.5, window_size=8,
             kv_budget=48, pooling="avgpool", pooling_kernel=5)
    c.update(changes)
    return c


SMALL = {
    "block4_group7": (settings(), 0.6),
    "block32_group1_maxpool": (settings(heads=2, kv_heads=2, segment_size=96, block_size=32, tokens=297,
                                        base_budget=96, pooling="maxpool", pooling_kernel=7), 1.0),
    "one_segment": (settings(tokens=41, heads=8, kv_budget=64), 1.0),
    "spoiled": (settings(heads=4, kv_heads=2, block_size=8), 0.6),
}


def random_settings(rng):
    kv_heads, B = int(rng.integers(1, 4)), int(rng.choice([4, 8, 12, 16, 24, 32]))
    S = B * int(rng.integers(2, 12))
    W = int(rng.integers(1, 40))
    tokens = int(rng.integers(W + 1, 12 * S + W))
    return settings(
        tokens=tokens, kv_heads=kv_heads, heads=kv_heads * int(rng.integers(1, 9)),
        head_dim=int(rng.choice([16, 40, 64, 128])), segment_size=S, block_size=B,
        threshold_len=int(rng.integers(0, 3 * S)), base_budget=int(rng.integers(B, 4 * S)),
        e_t=float(rng.choice([1e-5, 1e-3, 0.5])), delta_t=float(rng.choice([0.1, 0.2, 0.4])),
        alpha=float(rng.choice([0.5, 1.0])), window_size=W, kv_budget=W + int(rng.integers(4, 200)),
        pooling=str(rng.choice(["avgpool", "maxpool"])), pooling_kernel=int(rng.choice([1, 3, 5, 7])))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("--random", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    os.makedirs(args.out, exist_ok=True)
    if args.random:
        for i in range(args.random):
            path = os.path.join(args.out, f"random{args.seed}_{i}.safetensors")
            make(path, random_settings(rng), rng, float(rng.choice([0.3, 1.0, 1.5])))
        return
    for name, (c, scale) in SMALL.items():
        path = os.path.join(args.out, name + ".safetensors")
        make(path, c, rng, scale, spoiled=name == "spoiled")


if __name__ == "__main__":
    main()
