"""Golden files for the checkpoint readers, made with the `gguf` and `safetensors` packages.

    python make_weights_golden.py [--smollm2 SmolLM2-135M-Instruct.Q4_1.gguf]

Writes into the folder `weights` beside this script:
  dequant.safetensors   per storage type T: T.raw (U8, rows of blocks), T.f32 (their values)
  types.gguf            a metadata value of every type
  <arch>.gguf, <arch>.safetensors   a random one-layer model and its tensors under canonical names
and smaller files of the same kinds into ../fuzz/corpus, as seeds for the fuzzers.
With --smollm2 also prints sums over a real file, for a check by hand against the C++ reader.
"""

import argparse
import pathlib

import gguf
import numpy as np
from safetensors.numpy import save_file

OUT = pathlib.Path(__file__).parent / "weights"
CORPUS = pathlib.Path(__file__).parent.parent / "fuzz" / "corpus"
TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"]
ARCHITECTURES = ["llama", "qwen2", "qwen3", "pangu-embedded"]
# Byte offsets of the half-precision fields in a block of each format.
HALVES = {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q4_K": [0, 2],
          "Q5_K": [0, 2], "Q6_K": [208]}


def random_halves(rng, n):
    """Finite halves: mostly the size of real scales, some subnormal, zero or large."""
    x = (rng.standard_normal(n) * 0.02).astype(np.float16)
    x[rng.integers(0, n, n // 8)] = np.float16(0)
    x[rng.integers(0, n, n // 8)] = np.float16(3e-7)
    x[rng.integers(0, n, n // 8)] = np.float16(-6e4)
    return x


def dequant_golden(rng):
    out = {}
    rows = 4
    for name in TYPES:
        qtype = gguf.GGMLQuantizationType[name]
        block, size = gguf.GGML_QUANT_SIZES[qtype]
        if name == "F32":
            raw = rng.standard_normal((rows, 40)).astype(np.float32).view(np.uint8)
        elif name == "F16":
            raw = random_halves(rng, rows * 40).reshape(rows, 40).view(np.uint8)
        elif name == "BF16":
            raw = (rng.standard_normal((rows, 40)).astype(np.float32).view(np.uint32) >> 16)
            raw = raw.astype(np.uint16).view(np.uint8)
        else:
            # Random bytes reach every bit of every field; only the scales must be finite.
            blocks = 2 if block == 256 else 3
            raw = rng.integers(0, 256, (rows * blocks, size), dtype=np.uint8)
            for at in HALVES[name]:
                raw[:, at:at + 2] = random_halves(rng, rows * blocks).reshape(-1, 1).view(np.uint8)
            raw = raw.reshape(rows, blocks * size)
        out[f"{name}.raw"] = np.ascontiguousarray(raw)
        out[f"{name}.f32"] = gguf.dequantize(raw, qtype).reshape(rows, -1)
    save_file(out, OUT / "dequant.safetensors", metadata={"made_by": f"gguf {version('gguf')}"})


def version(package):
    import importlib.metadata
    return importlib.metadata.version(package)


def types_golden(path):
    w = gguf.GGUFWriter(path, "llama")
    w.add_uint8("t.uint8", 200)
    w.add_int8("t.int8", -100)
    w.add_uint16("t.uint16", 60000)
    w.add_int16("t.int16", -30000)
    w.add_uint32("t.uint32", 4000000000)
    w.add_int32("t.int32", -2000000000)
    w.add_uint64("t.uint64", 2**63 + 5)
    w.add_int64("t.int64", -2**40)
    w.add_float32("t.float32", 0.5)
    w.add_float64("t.float64", 0.1)
    w.add_bool("t.bool", True)
    w.add_string("t.string", "grüße")
    w.add_array("t.strings", ["", "a", "bc"])
    w.add_array("t.ints", [1, -2, 3])
    w.add_array("t.floats", [0.25, -1.5])
    w.add_array("t.bools", [True, False])
    w.add_custom_alignment(64)
    w.add_tensor("a", np.arange(6, dtype=np.float32).reshape(2, 3))
    w.add_tensor("b", np.arange(5, dtype=np.float32))
    close(w)


def close(w):
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def interleave(w, heads):
    """Rows of q or k from half-split to interleaved-pair RoPE order, as llama.cpp's converter does."""
    d = w.shape[0] // heads
    return w.reshape(heads, 2, d // 2, -1).swapaxes(1, 2).reshape(w.shape)


# hidden, ffn, heads, kv heads, head_dim, vocabulary
SMALL = (32, 48, 4, 2, 8, 40)
TINY = (8, 12, 2, 1, 4, 6)


def model_golden(rng, arch, gguf_path, safetensors_path, dims=SMALL, q_type="Q8_0"):
    """Matrices of the layer are F16 but for q, everything else F32, in both files."""
    hidden, ffn, heads, kv_heads, head_dim, vocab = dims
    if arch == "qwen3":
        head_dim *= 2
    linear = {"attn_q": ("self_attn.q_proj", heads * head_dim, hidden),
              "attn_k": ("self_attn.k_proj", kv_heads * head_dim, hidden),
              "attn_v": ("self_attn.v_proj", kv_heads * head_dim, hidden),
              "attn_output": ("self_attn.o_proj", hidden, heads * head_dim),
              "ffn_gate": ("mlp.gate_proj", ffn, hidden), "ffn_up": ("mlp.up_proj", ffn, hidden),
              "ffn_down": ("mlp.down_proj", hidden, ffn)}
    biased = {"llama": ["attn_q", "attn_k", "attn_v"], "qwen2": ["attn_q", "attn_k", "attn_v"],
              "qwen3": [], "pangu-embedded": ["attn_q", "attn_k", "attn_v", "attn_output"]}[arch]
    expected = {}
    w = gguf.GGUFWriter(gguf_path, arch)
    w.add_name(f"tiny {arch}")
    w.add_block_count(1)
    w.add_context_length(512)
    w.add_embedding_length(hidden)
    w.add_feed_forward_length(ffn)
    w.add_head_count(heads)
    w.add_head_count_kv(kv_heads)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(5e5)
    w.add_rope_dimension_count(head_dim)
    w.add_key_length(head_dim)
    w.add_value_length(head_dim)
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_token_list([f"t{i}" for i in range(vocab - 2)] + ["<|im_end|>", "<|eot_id|>"])
    w.add_token_types([1] * (vocab - 2) + [3, 1])
    if arch == "qwen2":
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(4.0)
        w.add_rope_scaling_orig_ctx_len(512)

    def add(name, canonical, value, heads_of_rows=0, qtype=None):
        stored = interleave(value, heads_of_rows) if heads_of_rows else value
        if qtype is not None:
            stored = gguf.quantize(stored, qtype)
            back = gguf.dequantize(stored, qtype)
            if heads_of_rows:  # undo the order on the dequantized values
                d = value.shape[0] // heads_of_rows
                back = back.reshape(heads_of_rows, d // 2, 2, -1).swapaxes(1, 2)
            value = back.reshape(value.shape)
        w.add_tensor(name, np.ascontiguousarray(stored), raw_dtype=qtype)
        half = qtype == gguf.GGMLQuantizationType.F16
        expected[canonical] = np.ascontiguousarray(value.astype(np.float16) if half else value)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    add("token_embd.weight", "model.embed_tokens.weight", normal(vocab, hidden))
    add("output_norm.weight", "model.norm.weight", normal(hidden))
    if arch == "pangu-embedded":
        add("output.weight", "lm_head.weight", normal(vocab, hidden))
    if arch == "llama":
        w.add_tensor("rope_freqs.weight", np.array([1, 1, 2, 8][-(head_dim // 2):], dtype=np.float32))
    layer = "model.layers.0."
    add("blk.0.attn_norm.weight", layer + "input_layernorm.weight", normal(hidden))
    add("blk.0.ffn_norm.weight", layer + "post_attention_layernorm.weight", normal(hidden))
    if arch == "qwen3":
        add("blk.0.attn_q_norm.weight", layer + "self_attn.q_norm.weight", normal(head_dim))
        add("blk.0.attn_k_norm.weight", layer + "self_attn.k_norm.weight", normal(head_dim))
    for name, (canonical, rows, columns) in linear.items():
        order = {"attn_q": heads, "attn_k": kv_heads}.get(name, 0) if arch == "llama" else 0
        qtype = gguf.GGMLQuantizationType[q_type if name == "attn_q" else "F16"]
        add(f"blk.0.{name}.weight", f"{layer}{canonical}.weight", normal(rows, columns), order, qtype)
        if name in biased:
            add(f"blk.0.{name}.bias", f"{layer}{canonical}.bias", normal(rows), order)
    close(w)
    save_file(expected, safetensors_path)


def tokenizer_seed(path):
    w = gguf.GGUFWriter(path, "llama")
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("qwen2")
    w.add_token_list(["a", "b", "ab", "<|im_end|>"])
    w.add_token_types([1, 1, 1, 3])
    w.add_token_merges(["a b"])
    w.add_token_scores([0.0, -1.0, -2.0, 0.0])
    w.add_bos_token_id(3)
    w.add_eos_token_id(3)
    w.add_add_bos_token(False)
    w.add_add_space_prefix(True)
    w.add_chat_template("{{ messages }}")
    close(w)


def k_quant_seed(rng, path):
    """A llama whose matrices are of the block formats, with the rows of 256 that they need."""
    w = gguf.GGUFWriter(path, "llama")
    hidden, ffn, head_dim, vocab = 256, 2, 2, 2
    w.add_block_count(1)
    w.add_context_length(16)
    w.add_embedding_length(hidden)
    w.add_feed_forward_length(ffn)
    w.add_head_count(1)
    w.add_key_length(head_dim)
    w.add_value_length(head_dim)
    w.add_layer_norm_rms_eps(1e-5)

    def blocks(name, rows, columns, kind):
        qtype = gguf.GGMLQuantizationType[kind]
        block, size = gguf.GGML_QUANT_SIZES[qtype]
        raw = rng.integers(0, 256, (rows, columns // block * size), dtype=np.uint8)
        w.add_tensor(name, raw, raw_dtype=qtype)

    blocks("token_embd.weight", vocab, hidden, "Q6_K")
    blocks("output.weight", vocab, hidden, "Q5_K")
    for name in ["output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"]:
        w.add_tensor(f"{name}.weight", np.ones(hidden, dtype=np.float32))
    blocks("blk.0.attn_q.weight", head_dim, hidden, "Q4_K")
    blocks("blk.0.attn_k.weight", head_dim, hidden, "Q5_0")
    blocks("blk.0.attn_v.weight", head_dim, hidden, "Q5_1")
    w.add_tensor("blk.0.attn_output.weight", np.zeros((hidden, head_dim), dtype=np.float16))
    blocks("blk.0.ffn_gate.weight", ffn, hidden, "Q4_0")
    blocks("blk.0.ffn_up.weight", ffn, hidden, "Q4_1")
    w.add_tensor("blk.0.ffn_down.weight", np.zeros((hidden, ffn), dtype=np.float16))
    close(w)


def seeds(rng):
    gguf_dir, safetensors_dir = CORPUS / "gguf_fuzz", CORPUS / "safetensors_fuzz"
    for folder in [gguf_dir, safetensors_dir]:
        folder.mkdir(parents=True, exist_ok=True)
    types_golden(gguf_dir / "types")
    tokenizer_seed(gguf_dir / "tokenizer")
    k_quant_seed(rng, gguf_dir / "k_quants")
    for arch in ARCHITECTURES:
        # Rows of 8 elements are too short for blocks of 32.
        model_golden(rng, arch, gguf_dir / arch, safetensors_dir / arch, TINY, "F16")
    save_file({"a": np.zeros((2, 0), np.float32), "b": np.arange(3), "c": np.ones(2, np.float16),
               "d": np.ones(3, np.int32), "e": np.array(7, np.uint8)},
              safetensors_dir / "types", metadata={"key": "value"})


def print_sums(path):
    for t in gguf.GGUFReader(path).tensors[:8]:
        x = gguf.dequantize(t.data, t.tensor_type).astype(np.float64)
        print(f"{t.name} {t.tensor_type.name} sum {x.sum():.9g} squares {(x * x).sum():.9g}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2")
    args = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    rng = np.random.default_rng(1)
    dequant_golden(rng)
    types_golden(OUT / "types.gguf")
    for arch in ARCHITECTURES:
        model_golden(rng, arch, OUT / f"{arch}.gguf", OUT / f"{arch}.safetensors")
    seeds(rng)
    for path in [*OUT.iterdir(), *CORPUS.glob("gguf_fuzz/*"), *CORPUS.glob("safetensors_fuzz/*")]:
        path.chmod(0o644)
    if args.smollm2:
        print_sums(args.smollm2)


if __name__ == "__main__":
    main()
