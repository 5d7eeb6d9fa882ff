"""Train the demo model on a CPU within a time budget. usage: train.py WORK --minutes 74

Two lessons made it 5 to 8 times faster: take the stacked expert weights apart once per step (indexing them per expert makes
the backward pass quadratic in the experts), and flush denormals.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

HIDDEN, LAYERS, EXPERTS, TOP_K, WIDTH = 192, 8, 64, 4, 96
HEADS, KV_HEADS, HEAD_DIM, THETA, EPSILON, VOCABULARY = 6, 2, 32, 10000.0, 1e-6, 4096
BATCH, LENGTH, PEAK_RATE, WARM_UP = 16, 256, 2e-3, 100
BALANCE, Z_LOSS = 0.01, 1e-3
HELD_OUT = 0.005
"""Share of the token stream, at its end, that is not trained on."""


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, EPSILON)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat((-second, first), -1) * sine


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = Norm(HIDDEN), Norm(HIDDEN)
        self.q = nn.Linear(HIDDEN, HEADS * HEAD_DIM, bias=False)
        self.k = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.v = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.o = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)
        self.q_norm, self.k_norm = Norm(HEAD_DIM), Norm(HEAD_DIM)
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 2 * WIDTH) * 0.02)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) * 0.02 / math.sqrt(2 * LAYERS))

    def attention(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        batch, length, _ = x.shape
        h = self.attention_norm(x)
        q = rotate(self.q_norm(self.q(h).view(batch, length, HEADS, HEAD_DIM)).transpose(1, 2), cosine, sine)
        k = rotate(self.k_norm(self.k(h).view(batch, length, KV_HEADS, HEAD_DIM)).transpose(1, 2), cosine, sine)
        v = self.v(h).view(batch, length, KV_HEADS, HEAD_DIM).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o(y.transpose(1, 2).reshape(batch, length, HEADS * HEAD_DIM))

    def experts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(output, balance loss, z-loss); tokens are sorted by expert, so every expert is one matmul."""
        h = self.ffn_norm(x).reshape(-1, HIDDEN)
        logits = self.router(h)
        probabilities = logits.softmax(-1)
        weights, ids = probabilities.topk(TOP_K, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        flat = ids.reshape(-1)
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=EXPERTS)
        tokens = order // TOP_K
        gate_up, down, outputs = self.gate_up.unbind(0), self.down.unbind(0), []
        for expert, part in enumerate(h[tokens].split(counts.tolist())):
            if len(part):
                gate, up = (part @ gate_up[expert]).chunk(2, -1)
                outputs.append((F.silu(gate) * up) @ down[expert])
        weighted = torch.cat(outputs) * weights.reshape(-1)[order][:, None]
        balance = EXPERTS * (probabilities.mean(0) * (counts.float() / flat.numel())).sum()
        out = torch.zeros_like(h).index_add_(0, tokens, weighted).view_as(x)
        return out, balance, (logits.logsumexp(-1) ** 2).mean()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = Norm(HIDDEN)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        self.frequencies = THETA ** (-torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(cross-entropy, mean balance loss, mean z-loss)."""
        angles = torch.outer(torch.arange(ids.shape[1]).float(), self.frequencies).repeat(1, 2)
        cosine, sine = angles.cos(), angles.sin()
        x, balance, z_loss = self.embedding(ids), torch.zeros(()), torch.zeros(())
        for block in self.blocks:
            x = x + block.attention(x, cosine, sine)
            out, block_balance, block_z = block.experts(x)
            x, balance, z_loss = x + out, balance + block_balance, z_loss + block_z
        logits = self.norm(x).view(-1, HIDDEN) @ self.embedding.weight.T
        return F.cross_entropy(logits, targets.reshape(-1)), balance / LAYERS, z_loss / LAYERS


def save(model: Model, folder: Path, tokenizer: Path) -> None:
    """A Hugging Face folder in bf16."""
    folder.mkdir(exist_ok=True)
    tensors = {"model.embed_tokens.weight": model.embedding.weight, "model.norm.weight": model.norm.weight}
    for layer, block in enumerate(model.blocks):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "input_layernorm.weight": block.attention_norm.weight,
            prefix + "post_attention_layernorm.weight": block.ffn_norm.weight,
            prefix + "self_attn.q_norm.weight": block.q_norm.weight,
            prefix + "self_attn.k_norm.weight": block.k_norm.weight,
            prefix + "mlp.gate.weight": block.router.weight,
        }
        for name in "qkvo":
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = getattr(block, name).weight
        for expert in range(EXPERTS):
            names = f"{prefix}mlp.experts.{expert}."
            tensors[names + "gate_proj.weight"] = block.gate_up[expert, :, :WIDTH].T
            tensors[names + "up_proj.weight"] = block.gate_up[expert, :, WIDTH:].T
            tensors[names + "down_proj.weight"] = block.down[expert].T
    halves = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    config = dict(
        architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", vocab_size=VOCABULARY, hidden_size=HIDDEN,
        intermediate_size=WIDTH, moe_intermediate_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, num_experts=EXPERTS, num_experts_per_tok=TOP_K, norm_topk_prob=True,
        decoder_sparse_step=1, mlp_only_layers=[], rms_norm_eps=EPSILON, rope_theta=THETA, max_position_embeddings=2048,
        tie_word_embeddings=True, hidden_act="silu", torch_dtype="bfloat16", bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    shutil.copy(tokenizer, folder / "tokenizer.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--minutes", type=float, default=74)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    torch.set_num_threads(arguments.threads)
    data = np.memmap(arguments.work / "tokens.bin", np.uint16, "r")
    border = int(len(data) * (1 - HELD_OUT))
    train, held_out, rng = data[:border], data[border:], np.random.default_rng(0)
    model = Model()
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1, betas=(0.9, 0.95), fused=True)

    def batch(source: np.ndarray) -> tuple[Tensor, Tensor]:
        starts = rng.integers(0, len(source) - LENGTH - 1, BATCH)
        rows = torch.from_numpy(np.stack([source[i : i + LENGTH + 1] for i in starts]).astype(np.int64))
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    began, step = time.time(), 0
    while (done := (time.time() - began) / 60 / arguments.minutes) < 1:
        rate = PEAK_RATE * min(1, (step + 1) / WARM_UP) * (1 if done < 0.5 else max(0.03, 2 * (1 - done)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, balance, z_loss = model(*batch(train))
        (loss + BALANCE * balance + Z_LOSS * z_loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 50 == 0:
            print(f"{done:6.1%} step {step} loss {loss.item():.3f} balance {balance.item():.3f}", flush=True)
            save(model, arguments.work / "checkpoint", arguments.work / "tokenizer.json")
    model.eval()
    with torch.no_grad():
        print("held-out loss", np.mean([model(*batch(held_out))[0].item() for _ in range(20)]))
    save(model, arguments.work / "checkpoint", arguments.work / "tokenizer.json")


if __name__ == "__main__":
    main()
