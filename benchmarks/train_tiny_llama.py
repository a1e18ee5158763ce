"""Trains tiny-llama: grouped-query attention, 4,096-token byte-level BPE; 16 layers x 256 as it ships.

usage: train_tiny_llama.py TEXT HELDOUT OUT SECONDS [LAYERS HIDDEN_SIZE]

CPU: bfloat16 autocast, eager attention (the backward pass of sdpa is slow there).
Muon for the hidden matrices, AdamW for embeddings and norms: about half the
tokens that AdamW alone needed for the same loss.
"""

import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT, HELDOUT, OUT, SECONDS = sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4])
LAYERS, HIDDEN_SIZE = map(int, sys.argv[5:7] or (16, 256))
LENGTH, BATCH, PEAK = 192, 24, 3e-3
torch.manual_seed(0)
Path(OUT).mkdir(parents=True, exist_ok=True)

text, held = Path(TEXT).read_text(encoding="utf-8"), Path(HELDOUT).read_text(encoding="utf-8")
bpe = Tokenizer(models.BPE())
bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bpe.decoder = decoders.ByteLevel()
bpe.train_from_iterator(
    (text[i : i + 100_000] for i in range(0, len(text), 100_000)),
    trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ),
)
PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>").save_pretrained(OUT)


def encode(s):
    return np.array(
        [t for i in range(0, len(s), 200_000) for t in bpe.encode(s[i : i + 200_000]).ids], dtype=np.int64
    )


train_ids, held_ids = encode(text), encode(held)
config = LlamaConfig(
    vocab_size=4096,
    hidden_size=HIDDEN_SIZE,
    intermediate_size=HIDDEN_SIZE * 5 // 2,
    num_hidden_layers=LAYERS,
    num_attention_heads=HIDDEN_SIZE // 32,
    num_key_value_heads=HIDDEN_SIZE // 64,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=1,
    rope_theta=10000.0,
)
model = LlamaForCausalLM._from_config(config, attn_implementation="eager")


def perplexity(n):
    model.eval()
    n = min(n, len(held_ids) // LENGTH)
    x = torch.from_numpy(held_ids[: n * LENGTH].reshape(n, LENGTH))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        loss = sum(model(b, labels=b).loss.item() * len(b) for b in x.split(16)) / n
    model.train()
    return math.exp(loss)


hidden = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
other = [p for n, p in model.named_parameters() if p.dim() < 2 or "embed" in n]
optimizers = [
    torch.optim.Muon(hidden, lr=PEAK, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
    torch.optim.AdamW(other, lr=PEAK, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
]
rng, step, used = np.random.default_rng(0), 0, 0.0
while used < SECONDS:
    began, left = time.time(), 1 - used / SECONDS
    for o in optimizers:
        for g in o.param_groups:
            g["lr"] = PEAK * min(1, (step + 1) / 60) * min(1.0, left / 0.6 + 0.005)
    starts = rng.integers(0, len(train_ids) - LENGTH - 1, BATCH)
    x = torch.from_numpy(np.stack([train_ids[i : i + LENGTH] for i in starts]))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x, labels=x).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for o in optimizers:
        o.step()
        o.zero_grad(set_to_none=True)
    used += min(time.time() - began, 8.0)
    step += 1
    if step % 50 == 0:
        print(
            step,
            f"loss {loss.item():.3f}",
            f"{step * BATCH * LENGTH / used:.0f} tokens/s",
            f"{used:.0f} s",
            flush=True,
        )
print("held-out perplexity", perplexity(10**6), "after", step * BATCH * LENGTH, "tokens")
model.to(torch.bfloat16).save_pretrained(OUT)
