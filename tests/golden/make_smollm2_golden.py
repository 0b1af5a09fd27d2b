"""Greedy continuations of SmolLM2-135M-Instruct by two other engines reading the same GGUF file.

    python make_smollm2_golden.py SmolLM2-135M-Instruct.Q4_1.gguf --document /usr/share/common-licenses/GPL-3

Writes smollm2_greedy.json. `greedy` and `margins` (the top logit minus the second) are the
`transformers` library's, in float32 on the dequantized weights, which is what this project computes.
`llama_cpp` is llama.cpp's continuation: it also quantizes activations, so it may leave the other one
where a margin is small; `llama_cpp_agrees` counts the tokens before that. Greedy means no stop at
end-of-answer tokens.
"""

import argparse
import hashlib
import importlib.metadata
import json
import pathlib

import llama_cpp
import numpy as np
import torch
import transformers

OUT = pathlib.Path(__file__).parent / "smollm2_greedy.json"
STEPS = 32
THREADS = 1
LONG_TOKENS = 4000  # of the document

CHAT = ("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n")
PROMPTS = {
    "completion": "The capital of France is",
    "code": "def fibonacci(n):\n    \"\"\"Returns the n-th Fibonacci number.\"\"\"\n",
    "numbers": "In 1969, Apollo 11 travelled about 1533225 km in 8 days. In 1972, Apollo 17",
    "chat": CHAT.format("Why is the sky blue? Answer in two sentences."),
}


def transformers_greedy(path, prompts):
    """Per prompt: ids and top-2 margins of STEPS greedy tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="sdpa").eval()
    result = {}
    for name, ids in prompts.items():
        out, margins = [], []
        with torch.no_grad():
            step = model(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
            for _ in range(STEPS):
                top = step.logits[0, -1].topk(2)
                out.append(top.indices[0].item())
                margins.append(round((top.values[0] - top.values[1]).item(), 4))
                step = model(torch.tensor([[out[-1]]]), past_key_values=step.past_key_values,
                             use_cache=True)
        result[name] = out, margins
    return result


def llama_greedy(path, document):
    """Per prompt: its token ids and STEPS greedy tokens."""
    # No repacked weights: that path uses AMX, and crashes on virtual machines that forbid it.
    defaults = llama_cpp.llama_model_default_params()
    defaults.use_extra_bufts = False
    llama_cpp.llama_cpp.llama_model_default_params = lambda: defaults
    llama = llama_cpp.Llama(str(path), n_ctx=4608, n_threads=THREADS,
                            n_threads_batch=THREADS, verbose=False)

    def tokenize(text):
        return llama.tokenize(text.encode(), add_bos=False, special=True)

    start = llama.detokenize(tokenize(document)[:LONG_TOKENS]).decode()
    prompts = PROMPTS | {"long": CHAT.format(
        start + "\n\nWhat is this document, and what does it allow?")}
    result = {}
    for name, text in prompts.items():
        ids = tokenize(text)
        llama.reset()
        llama.eval(ids)
        out = []
        for _ in range(STEPS):
            logits = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
            out.append(int(np.ctypeslib.as_array(logits, (llama.n_vocab(),)).argmax()))
            llama.eval([out[-1]])
        result[name] = ids, out, llama.detokenize(out).decode(errors="replace")
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=pathlib.Path)
    parser.add_argument("--document", type=pathlib.Path, required=True)
    args = parser.parse_args()
    llama = llama_greedy(args.gguf, args.document.read_text())
    prompts = {name: ids for name, (ids, _, _) in llama.items()}
    result = []
    for name, (greedy, margins) in transformers_greedy(args.gguf, prompts).items():
        ids, other, text = llama[name]
        agrees = next((i for i, (a, b) in enumerate(zip(greedy, other)) if a != b), STEPS)
        result.append({"name": name, "token_ids": ids, "greedy": greedy, "margins": margins,
                       "llama_cpp": other, "llama_cpp_agrees": agrees})
        print(f"{name}: {len(ids)} tokens, smallest margin {min(margins)}, llama.cpp agrees on "
              f"{agrees}: {text!r}")
        if agrees < STEPS:
            print(f"  and leaves where the margin is {margins[agrees]}")
    version = importlib.metadata.version
    json.dump({"file": args.gguf.name,
               "sha256": hashlib.sha256(args.gguf.read_bytes()).hexdigest(),
               "made_by": {p: version(p) for p in ["transformers", "torch", "llama_cpp_python"]},
               "prompts": result}, OUT.open("w"), separators=(",", ":"))


if __name__ == "__main__":
    main()
