#!/usr/bin/env python3
"""Makes tests/golden/text: small vocabularies in every supported format, and the ids that the reference libraries
(`tokenizers`, `sentencepiece`) give for a few thousand lines.

  make_text_golden.py                        rewrite tests/golden/text
  make_text_golden.py --gguf FILE --out DIR  the same lines with a real GGUF byte-level vocabulary, for comparison by
                                             hand: writes DIR/ids.bin (and what llama-cpp-python says, if installed)

Needs tokenizers, sentencepiece, transformers; --gguf needs gguf. The lines are our own sentences (text_samples.py),
mixed by a fixed random seed. Formats: lines.txt has one line per text, bytes of no printable character as \\xHH;
NAME.ids has, per line, a LEB128 count and as many LEB128 ids.
"""

import argparse
import json
import os
import random
import sys
import unicodedata

import sentencepiece as spm
import text_samples as samples
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

HERE = os.path.dirname(os.path.abspath(__file__))
OUT = os.path.join(HERE, "text")

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + REST
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + REST


def make_lines():
    rng = random.Random(20261122)
    scripts = [s for group in samples.SCRIPTS.values() for s in group]
    lines = [s.encode() for s in samples.PROSE + samples.CODE + scripts + samples.EMOJI]
    lines += [o.encode() for o in samples.ODD] + [b"x " + o.encode() + b" y" for o in samples.ODD]
    lines += samples.BROKEN + [b"", b" ", b"  ", b"   a", b"a   ", b" a  b   c ", b"\n", b"\n\n\n", b"\t x", b"0", b"1234567890"]

    def words(text):
        return text.split(" ")

    def prose():
        a, b = words(rng.choice(samples.PROSE)), words(rng.choice(samples.PROSE))
        return " ".join(a[: rng.randint(1, 3)] + b[-rng.randint(1, 3) :])

    def code():
        indent = rng.choice(["", "  ", "    ", "\t", "\t\t", "            "])
        text = rng.choice(samples.CODE)
        at = rng.randint(0, len(text) // 2)
        return indent + text[at : at + rng.randint(6, 24)]

    def script():
        parts = rng.sample(scripts, rng.randint(1, 2))
        cut = [p[at : at + rng.randint(1, 5)] for p in parts for at in [rng.randint(0, len(p) - 1)]]
        return rng.choice(["", " ", "  ", ", "]).join(cut)

    def odd():
        return "".join(rng.choice([rng.choice(samples.ODD), rng.choice(words(rng.choice(samples.PROSE))), " "]) for _ in range(rng.randint(2, 5)))

    def emoji():
        return rng.choice(["", "so "]) + rng.choice(samples.EMOJI)

    def numbers():
        return rng.choice(["", "x=", " "]) + "".join(rng.choice("0123456789.,- ") for _ in range(rng.randint(1, 16)))

    def run():
        return rng.choice(["a", " ", "\n", "\t", "-", "=", "1", "é", "中", "😀", "\u0301", "ab", " a", "\r\n", "a\u0301"]) * rng.choice([2, 3, 5, 8, 13, 32])

    def broken():
        text = bytearray(rng.choice([prose(), script(), emoji()]).encode())
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(text) + 1)
            text[at:at] = rng.choice(samples.BROKEN)
        return bytes(text[: rng.randint(1, 20)])

    def noise():
        return "".join(chr(rng.choice([rng.randrange(0x20, 0x250), rng.randrange(0x250, 0xD800), rng.randrange(0xE000, 0x1F9FF)])) for _ in range(rng.randint(1, 4)))

    kinds = [(prose, 350), (code, 200), (script, 420), (odd, 250), (emoji, 30), (numbers, 110), (run, 90), (broken, 220), (noise, 110)]
    for make, count in kinds:
        for _ in range(count):
            line = make()
            lines.append(line if isinstance(line, bytes) else line.encode())
    return lines


def training_text():
    rng = random.Random(7)
    scripts = [s for group in samples.SCRIPTS.values() for s in group]
    # Prose and code dominate; letters of every script appear, few of their words do.
    return (samples.PROSE * 3 + samples.CODE * 2 + scripts + samples.EMOJI + ["    " * k + "x" for k in range(1, 6)]
            + ["%d" % rng.randrange(10**6) for _ in range(40)] + ["\n" * k for k in range(1, 5)] + ["a" * 64, "-" * 64, "=" * 40]
            + [l.decode() for l in make_lines() if l.isascii() and b"\x00" not in l][:900])


def escape(line):
    """Printable characters as they are, all other bytes as \\xHH."""
    out = ""
    for c in line.decode("utf-8", errors="surrogateescape"):
        raw = c.encode("utf-8", errors="surrogateescape")
        out += c if c.isprintable() and c != "\\" and not unicodedata.combining(c) else "".join("\\x%02x" % b for b in raw)
    return out


def varint(value):
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def pack(rows):
    return b"".join(varint(len(ids)) + b"".join(map(varint, ids)) for ids in rows)


def lossy(line):
    return line.decode("utf-8", errors="replace")


def byte_level(name, split, specials, normalizer=None, ignore_merges=False, user_defined=(), bos=None):
    tok = Tokenizer(models.BPE())
    if normalizer is not None:
        tok.normalizer = normalizer
    tok.pre_tokenizer = split
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, special_tokens=[])
    tok.train_from_iterator(training_text(), trainer)
    if ignore_merges:
        # As Llama 3 has: whole words that no merges lead to.
        data = json.loads(tok.to_str())
        data["model"]["ignore_merges"] = True
        vocab = data["model"]["vocab"]
        for word in ["Ġentropy", "Ġharbour", "Ġchapter", "Ġtonnes", "Ġsentences"]:
            vocab.setdefault(word, len(vocab))
        tok = Tokenizer.from_str(json.dumps(data))
    tok.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    tok.add_tokens([AddedToken(s, special=False, normalized=False) for s in user_defined])
    if bos is not None:
        tok.post_processor = processors.Sequence([
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tok.token_to_id(bos))])])
    data = json.loads(tok.to_str())
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    with open(os.path.join(OUT, name + ".json"), "w", encoding="utf-8") as f:
        f.write(text)
    return Tokenizer.from_str(text)


def isolated(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)])


def make_byte_level():
    chatml = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return {
        "llama3": byte_level("llama3", isolated(LLAMA3), ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
                             ignore_merges=True, bos="<|begin_of_text|>"),
        "qwen2": byte_level("qwen2", isolated(QWEN2), chatml, normalizer=normalizers.NFC(), user_defined=["<tool_call>", "</tool_call>", "<think>", "</think>"]),
        "smollm": byte_level("smollm", pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                               pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)]), chatml),
        "gpt2": byte_level("gpt2", pre_tokenizers.ByteLevel(add_prefix_space=False), ["<|endoftext|>"]),
    }


def nfkc_rules():
    """NFKC and the spaces of sentencepiece's nmt_nfkc, for what occurs in the lines: the library's own table has 240 kB."""
    spaces = [0x9, 0xA, 0xC, 0xD, 0x1680, *range(0x200B, 0x2010), 0x2028, 0x2029, 0x2581, 0xFEFF, 0xFFFD]
    dropped = [*range(0x1, 0x9), 0xB, *range(0xE, 0x20), 0x7F, 0x8F, 0x9F]
    basic = {chr(c): " " for c in spaces} | {chr(c): "" for c in dropped}
    rules = dict(basic)
    text = "".join(map(lossy, make_lines()))
    # A letter and the marks (or Hangul parts) that go onto it are one entry, as are all its beginnings.
    for at in range(len(text)):
        end = at + 1
        while end < len(text) and end < at + 4 and (unicodedata.combining(text[end]) or 0x1160 <= ord(text[end]) < 0x1200):
            end += 1
        for key in [text[at:k] for k in range(at + 1, end + 1)]:
            target = "".join(basic.get(c, c) for c in unicodedata.normalize("NFKC", key))
            if "\0" not in key and target not in (key, "".join(rules.get(c, c) for c in key)):
                rules[key] = target
    return "".join("%s\t%s\n" % tuple(" ".join("%X" % ord(c) for c in side) for side in rule) for rule in sorted(rules.items()))


def train_sp(name, texts=None, rules=None, **options):
    corpus, table = os.path.join(OUT, "corpus.tmp"), os.path.join(OUT, "rules.tmp")
    if rules is not None:
        with open(table, "w", encoding="ascii") as f:
            f.write(rules)
        options["normalization_rule_tsv"] = table
    with open(corpus, "w", encoding="utf-8") as f:
        f.write("\n".join(t.replace("\n", " ") for t in texts or training_text()))
    spm.SentencePieceTrainer.train(input=corpus, model_prefix=os.path.join(OUT, name), character_coverage=0.98, num_threads=1,
                                   minloglevel=2, max_sentence_length=4096, **options)
    for path in [corpus, table]:
        if os.path.exists(path):
            os.remove(path)
    os.remove(os.path.join(OUT, name + ".vocab"))
    return spm.SentencePieceProcessor(model_file=os.path.join(OUT, name + ".model"))


def make_sp():
    user = ["<sep>", "[unused9]", "[unused10]", "    "]
    llama = dict(normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, allow_whitespace_only_pieces=True)
    return {
        # Llama 2's settings.
        "sp_bpe": train_sp("sp_bpe", model_type="bpe", vocab_size=800, byte_fallback=True, user_defined_symbols=user, **llama),
        # Normalization by a table, as the library's defaults have, and bytes.
        "sp_unigram": train_sp("sp_unigram", rules=nfkc_rules(), model_type="unigram", vocab_size=900, byte_fallback=True,
                               user_defined_symbols=user, hard_vocab_limit=False),
        # No bytes: unknown text is the unknown token; no dummy prefix.
        "sp_unigram_unk": train_sp("sp_unigram_unk", model_type="unigram", vocab_size=240, byte_fallback=False, add_dummy_prefix=False,
                                   normalization_rule_name="identity", hard_vocab_limit=False, texts=samples.PROSE + samples.SCRIPTS["greek"]),
        "sp_bpe_unk": train_sp("sp_bpe_unk", model_type="bpe", vocab_size=400, byte_fallback=False, normalization_rule_name="identity",
                               texts=samples.PROSE + samples.CODE + samples.SCRIPTS["cyrillic"]),
    }


def make_marked_json(sp):
    """A tokenizer.json of Llama 2's kind: the same pieces, with merges instead of scores."""
    vocab = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    plain = [i for i in range(sp.vocab_size()) if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i)) and sp.get_score(i) != 0 or i > 300]
    merges = []
    for i in plain:
        piece = sp.id_to_piece(i)
        splits = [(piece[:k], piece[k:]) for k in range(1, len(piece)) if piece[:k] in vocab and piece[k:] in vocab]
        merges += [(sp.get_score(i), vocab[a], vocab[b], a, b) for a, b in splits]
    merges.sort(key=lambda m: (-m[0], m[1], m[2]))
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[(a, b) for *_, a, b in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tok.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in ["<unk>", "<s>", "</s>"]])
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    text = json.dumps(json.loads(tok.to_str()), ensure_ascii=False, separators=(",", ":"))
    with open(os.path.join(OUT, "llama2.json"), "w", encoding="utf-8") as f:
        f.write(text)
    return Tokenizer.from_str(text)


# Texts of one character, in one piece for most vocabularies.
RUNS = [("llama3", "a", 8 << 20), ("qwen2", " ", 1 << 20), ("smollm", "7", 1 << 20), ("gpt2", "-", 1 << 18), ("llama2", "a", 1 << 18),
        ("sp_bpe", "a", 1 << 20), ("sp_unigram", "a", 1 << 20), ("qwen2", "\u0301", 1 << 18), ("llama3", "\U0001F600", 1 << 16)]


def fnv(ids):
    value = 0xCBF29CE484222325
    for i in ids:
        value = (value ^ i) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value


def write(name, data):
    with open(os.path.join(OUT, name), "wb") as f:
        f.write(data)


def special_lines(specials):
    rng = random.Random(3)
    out = []
    for _ in range(60):
        parts = [rng.choice(specials + ["user\n", " hi ", "", "<|", "|>", "Hello", "\n", "é"]) for _ in range(rng.randint(1, 7))]
        out.append("".join(parts))
    return out


def make_goldens():
    os.makedirs(OUT, exist_ok=True)
    lines = make_lines()
    write("lines.txt", "".join(escape(l) + "\n" for l in lines).encode())
    hf = make_byte_level()
    sp = make_sp()
    hf["llama2"] = make_marked_json(sp["sp_bpe"])
    encode = {}
    for name, tok in hf.items():
        # Control tokens in text stay text, which is what Encode does unless told otherwise.
        tok.encode_special_tokens = True
        encode[name] = lambda text, tok=tok: tok.encode(text, add_special_tokens=False).ids
    for name, tok in sp.items():
        encode[name] = lambda text, tok=tok: tok.encode(text)
    for name, fn in encode.items():
        write(name + ".ids", pack([fn(lossy(l)) for l in lines]))
        if name in hf:
            hf[name].encode_special_tokens = False
    rows = []
    for name in ["llama3", "qwen2", "smollm", "gpt2"]:
        added = [t.content for t in hf[name].get_added_tokens_decoder().values()]
        for text in special_lines(added):
            rows.append({"vocabulary": name, "text": text, "ids": hf[name].encode(text, add_special_tokens=False).ids})
    write("special.json", json.dumps(rows, ensure_ascii=True, separators=(",", ":")).encode())
    runs = []
    for name, char, count in RUNS:
        if name in hf:
            hf[name].encode_special_tokens = True
        ids = encode[name](char * count)
        runs.append({"vocabulary": name, "unit": char, "repeat": count, "ids": len(ids), "fnv": str(fnv(ids))})
    write("runs.json", json.dumps(runs, ensure_ascii=True, indent=1).encode() + b"\n")
    make_fuzz_corpus()
    print(len(lines), "lines,", sum(os.path.getsize(os.path.join(OUT, f)) for f in os.listdir(OUT)), "bytes")


def make_fuzz_corpus():
    """Small files of every kind that the loader takes, for tests/fuzz/tokenizer_json_fuzz.cc to start from."""
    out = os.path.join(HERE, "..", "fuzz", "corpus", "tokenizer_json_fuzz")
    os.makedirs(out, exist_ok=True)

    def trim(name, new_name, vocab_size, merges):
        with open(os.path.join(OUT, name + ".json"), encoding="utf-8") as f:
            data = json.load(f)
        model = data["model"]
        model["vocab"] = {t: i for t, i in model["vocab"].items() if i < vocab_size}
        model["merges"] = [m for m in model["merges"] if "".join(m) in model["vocab"] and m[0] in model["vocab"] and m[1] in model["vocab"]][:merges]
        with open(os.path.join(out, new_name), "w", encoding="utf-8") as f:
            json.dump(data, f, ensure_ascii=False, separators=(",", ":"))

    for name in ["llama3", "qwen2", "smollm", "gpt2"]:
        trim(name, name + ".json", 262, 6)
    trim("llama2", "llama2.json", 320, 20)
    texts = ["aa ab abc <s> b c a b c abab", "cab bac abba"] * 20
    train_sp("small_bpe", texts, model_type="bpe", vocab_size=272, byte_fallback=True, user_defined_symbols=["<sep>"],
             normalization_rule_name="identity")
    train_sp("small_unigram", texts, model_type="unigram", vocab_size=16, byte_fallback=False, normalization_rule_name="identity", hard_vocab_limit=False)
    for name in ["small_bpe", "small_unigram"]:
        os.replace(os.path.join(OUT, name + ".model"), os.path.join(out, name + ".model"))


def compare_gguf(path, out):
    """Ids of the same lines by the `tokenizers` library for a GGUF vocabulary of kind gpt2/smollm or qwen2."""
    from gguf import GGUFReader

    def field(name):
        f = reader.fields[name]
        return f.contents()

    reader = GGUFReader(path)
    tokens, merges, pre = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.merges"), field("tokenizer.ggml.pre")
    types = field("tokenizer.ggml.token_type")
    vocab = {t: i for i, t in enumerate(tokens)}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(m.split(" ", 1)) for m in merges]))
    if pre == "smollm":
        tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    elif pre == "qwen2":
        tok.normalizer = normalizers.NFC()
        tok.pre_tokenizer = isolated(QWEN2)
    else:
        sys.exit("unsupported pre " + pre)
    tok.add_tokens([AddedToken(t, special=False, normalized=False) for t, k in zip(tokens, types) if k == 4])
    tok.encode_special_tokens = True
    lines = make_lines()
    os.makedirs(out, exist_ok=True)
    rows = [tok.encode(lossy(l), add_special_tokens=False).ids for l in lines]
    with open(os.path.join(out, "ids.bin"), "wb") as f:
        f.write(pack(rows))
    try:
        import llama_cpp
    except ImportError:
        print("llama-cpp-python is not installed: not compared")
        return
    llm = llama_cpp.Llama(path, vocab_only=True, verbose=False)
    differ = [i for i, l in enumerate(lines) if llm.tokenize(lossy(l).encode(), add_bos=False, special=False) != rows[i]]
    print("llama.cpp differs from tokenizers on", len(differ), "of", len(lines), "lines:", [lossy(lines[i]) for i in differ[:20]])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gguf")
    parser.add_argument("--out")
    args = parser.parse_args()
    if args.gguf:
        compare_gguf(args.gguf, args.out or sys.exit("--gguf needs --out"))
    else:
        make_goldens()


if __name__ == "__main__":
    main()
