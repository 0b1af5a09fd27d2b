"""Tiny random models of every family and their logits, from the `transformers` library.

    python make_model_golden.py

Writes models/<name>/config.json, model.safetensors (BF16) and golden.safetensors: token_ids (I32, [n])
and logits (F32, [n, vocab]) at positions 0..n-1, computed in float32 with eager attention. Weights are
bf16 values, so a float32 engine starts from the same numbers. openPangu-Embedded, which the library
lacks, is computed by the NumPy model below, which must first agree with the library on a Llama.
"""

import json
import math
import pathlib

import gguf
import numpy as np
import torch
import transformers
from safetensors.torch import save_file

OUT = pathlib.Path(__file__).parent / "models"
TOKENS = 144  # two pages of 64 and a part

COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2}

# The rope fields are in the spellings of transformers 4 (the first two) and 5.
MODELS = {
    # group 3, head_dim 64 that is not hidden / heads, tied, Llama 3 rope scaling
    "llama_llama3": COMMON | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "hidden_size": 12, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 100,
        "max_position_embeddings": 512, "tie_word_embeddings": True, "rope_theta": 500000.0,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
    # group 7, biases on q, k and v, YaRN
    "qwen2_yarn": COMMON | {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
        "hidden_size": 14, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 48,
        "max_position_embeddings": 256, "tie_word_embeddings": False, "rope_theta": 1000000.0,
        "use_sliding_window": False, "sliding_window": 128,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    # group 2, head_dim 128, norms on q and k
    "qwen3": COMMON | {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3",
        "hidden_size": 12, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 42,
        "max_position_embeddings": 512, "tie_word_embeddings": True, "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
    # group 1, untied, linear rope scaling, in two shards
    "llama_linear": COMMON | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "hidden_size": 20, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 44,
        "max_position_embeddings": 512, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    # group 1, head_dim 64 = hidden / heads, biases on q, k, v and o
    "pangu_embedded": COMMON | {
        "architectures": ["PanguEmbeddedForCausalLM"], "model_type": "PanguEmbedded", "bias": True,
        "hidden_size": 64, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 40,
        "max_position_embeddings": 512, "tie_word_embeddings": False, "rope_theta": 16000000.0},
}


def head_dim_of(c):
    return c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]


def random_weights(c, generator):
    """Large enough that attention is far from uniform and every tensor moves the logits."""
    hidden, ffn, d = c["hidden_size"], c["intermediate_size"], head_dim_of(c)
    q, kv = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
    family = c["architectures"][0]

    def normal(*shape, scale=1.0, mean=0.0):
        return (torch.randn(*shape, generator=generator) * scale + mean).to(torch.bfloat16)

    # Tied: small, or every token would mostly predict itself.
    embedding_scale = 0.2 if c["tie_word_embeddings"] else 1.0
    w = {"model.embed_tokens.weight": normal(c["vocab_size"], hidden, scale=embedding_scale),
         "model.norm.weight": normal(hidden, scale=0.2, mean=1.0)}
    if not c["tie_word_embeddings"]:
        w["lm_head.weight"] = normal(c["vocab_size"], hidden, scale=hidden ** -0.5)
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for norm in ["input_layernorm", "post_attention_layernorm"]:
            w[f"{at}{norm}.weight"] = normal(hidden, scale=0.2, mean=1.0)
        if family.startswith("Qwen3"):
            for norm in ["q_norm", "k_norm"]:
                w[f"{at}self_attn.{norm}.weight"] = normal(d, scale=0.3, mean=1.2)
        for name, rows, columns in [
                ("self_attn.q_proj", q, hidden), ("self_attn.k_proj", kv, hidden),
                ("self_attn.v_proj", kv, hidden), ("self_attn.o_proj", hidden, q),
                ("mlp.gate_proj", ffn, hidden), ("mlp.up_proj", ffn, hidden),
                ("mlp.down_proj", hidden, ffn)]:
            w[f"{at}{name}.weight"] = normal(rows, columns, scale=1.3 * columns ** -0.5)
            bias = name.startswith("self_attn") and (
                family.startswith("Pangu") or (family.startswith("Qwen2") and "o_proj" not in name))
            if bias:
                w[f"{at}{name}.bias"] = normal(rows, scale=0.5)
    return w


def transformers_logits(folder, ids, dtype=torch.float32):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0]


def numpy_logits(c, weights, ids):
    """Attention, norms and MLP of a Llama with optional biases, written from the equations."""
    w = {name: t.to(torch.float64).numpy() for name, t in weights.items()}
    heads, kv_heads, d = c["num_attention_heads"], c["num_key_value_heads"], head_dim_of(c)
    rope = c.get("rope_parameters", c)
    n = len(ids)
    angles = np.outer(np.arange(n) / rope.get("factor", 1.0),
                      rope["rope_theta"] ** (-np.arange(0, d, 2) / d))
    cos, sin = np.cos(angles), np.sin(angles)  # [n, d/2]
    causal = np.tril(np.ones((n, n), dtype=bool))

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + c["rms_norm_eps"]) * w[name]

    def linear(x, name):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0.0)

    def rotate(x):  # [n, heads, d]; the first half of a head pairs with the second
        a, b = x[..., :d // 2], x[..., d // 2:]
        co, si = cos[:, None], sin[:, None]
        return np.concatenate([a * co - b * si, b * co + a * si], -1)

    x = w["model.embed_tokens.weight"][ids]
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        y = norm(x, at + "input_layernorm.weight")
        q = rotate(linear(y, at + "self_attn.q_proj").reshape(n, heads, d))
        k = rotate(linear(y, at + "self_attn.k_proj").reshape(n, kv_heads, d))
        v = linear(y, at + "self_attn.v_proj").reshape(n, kv_heads, d)
        out = np.empty((n, heads, d))
        for h in range(heads):
            kv = h // (heads // kv_heads)
            scores = np.where(causal, q[:, h] @ k[:, kv].T / math.sqrt(d), -np.inf)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, h] = p / p.sum(-1, keepdims=True) @ v[:, kv]
        x = x + linear(out.reshape(n, heads * d), at + "self_attn.o_proj")
        y = norm(x, at + "post_attention_layernorm.weight")
        gate, up = linear(y, at + "mlp.gate_proj"), linear(y, at + "mlp.up_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * up, at + "mlp.down_proj")
    x = norm(x, "model.norm.weight")
    head = w["model.embed_tokens.weight"] if c["tie_word_embeddings"] else w["lm_head.weight"]
    return x @ head.T


def save_weights(folder, weights, shards):
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(weights)
    index = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i * len(names) // shards:(i + 1) * len(names) // shards]
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
        index |= {name: file for name in part}
    size = sum(t.numel() * 2 for t in weights.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=1) + "\n")


def llama3_factors(c):
    """What rope_freqs.weight holds: the divisors of the inverse frequencies."""
    s, d = c["rope_scaling"], head_dim_of(c)
    original = s["original_max_position_embeddings"]
    out = []
    for i in range(0, d, 2):
        wavelength = 2 * math.pi * c["rope_theta"] ** (i / d)
        if wavelength < original / s["high_freq_factor"]:
            out.append(1.0)
        elif wavelength > original / s["low_freq_factor"]:
            out.append(s["factor"])
        else:
            smooth = (original / wavelength - s["low_freq_factor"]) / (
                s["high_freq_factor"] - s["low_freq_factor"])
            out.append(1 / ((1 - smooth) / s["factor"] + smooth))
    return np.array(out, dtype=np.float32)


def save_gguf(path, c, weights):
    """The same Llama as llama.cpp stores it: matrices BF16, vectors F32, q and k permuted, the rope
    scaling as a tensor."""
    d = head_dim_of(c)
    w = gguf.GGUFWriter(path, "llama")
    w.add_name("llama_llama3")
    w.add_block_count(c["num_hidden_layers"])
    w.add_context_length(c["max_position_embeddings"])
    w.add_embedding_length(c["hidden_size"])
    w.add_feed_forward_length(c["intermediate_size"])
    w.add_head_count(c["num_attention_heads"])
    w.add_head_count_kv(c["num_key_value_heads"])
    w.add_key_length(d)
    w.add_value_length(d)
    w.add_rope_dimension_count(d)
    w.add_rope_freq_base(c["rope_theta"])
    w.add_layer_norm_rms_eps(c["rms_norm_eps"])
    w.add_vocab_size(c["vocab_size"])
    w.add_bos_token_id(c["bos_token_id"])
    w.add_eos_token_id(c["eos_token_id"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c["num_hidden_layers"])
    w.add_tensor("rope_freqs.weight", llama3_factors(c))
    for name, tensor in weights.items():
        value = tensor.to(torch.float32).numpy()
        heads = {"q_proj": c["num_attention_heads"],
                 "k_proj": c["num_key_value_heads"]}.get(name.split(".")[-2])
        if heads:
            value = value.reshape(heads, 2, d // 2, -1).swapaxes(1, 2).reshape(value.shape)
        qtype = None
        if value.ndim == 2:
            qtype = gguf.GGMLQuantizationType.BF16
            value = gguf.quantize(value, qtype)
        w.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")),
                     np.ascontiguousarray(value), raw_dtype=qtype)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def largest_difference(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.abs(a - b).max() / np.abs(b).max()


def plain_rope_differs(folder, config, ids, logits):
    """Whether the rope scaling matters at these lengths: otherwise the golden file proves nothing."""
    rope = config.get("rope_scaling") or config["rope_parameters"]
    if rope.get("rope_type") == "default":
        return True
    plain = {k: v for k, v in config.items() if k not in ("rope_scaling", "rope_parameters")}
    plain["rope_theta"] = config.get("rope_theta") or rope["rope_theta"]
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(json.dumps(plain))
    try:
        return largest_difference(transformers_logits(folder, ids), logits) > 1e-2
    finally:
        (folder / "config.json").write_text(text)


def main():
    for seed, (name, config) in enumerate(MODELS.items()):
        generator = torch.Generator().manual_seed(seed)
        folder = OUT / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        weights = random_weights(config, generator)
        save_weights(folder, weights, 2 if name == "llama_linear" else 1)
        ids = torch.randint(3, config["vocab_size"], (TOKENS,), generator=generator).tolist()
        if name == "pangu_embedded":
            logits = torch.from_numpy(numpy_logits(config, weights, ids)).to(torch.float32)
            note = "float64 NumPy model"
        else:
            logits = transformers_logits(folder, ids)
            assert plain_rope_differs(folder, config, ids, logits)
            exact = transformers_logits(folder, ids, torch.float64)
            note = f"float32 and float64 differ by {largest_difference(logits, exact):.1e} of max"
        if name == "llama_linear":
            difference = largest_difference(numpy_logits(config, weights, ids), logits)
            note += f"; the NumPy model by {difference:.1e}"
            assert difference < 1e-5, note
        if name == "llama_llama3":
            save_gguf(folder / "model.gguf", config, weights)
        save_file({"token_ids": torch.tensor(ids, dtype=torch.int32), "logits": logits.contiguous()},
                  folder / "golden.safetensors",
                  metadata={"transformers": transformers.__version__, "torch": torch.__version__})
        for path in folder.iterdir():
            path.chmod(0o644)
        entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
        print(f"{name}: max|logit| {logits.abs().max():.2f}, mean entropy {entropy:.2f}; {note}")


if __name__ == "__main__":
    main()
