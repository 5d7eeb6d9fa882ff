"""The demo model in PyTorch, written for training on a CPU: Qwen3-MoE with tied embeddings.

What makes it fast there: matrix products in bf16 where the processor has them (master weights stay float32); tokens are
sorted by expert, and each expert is one product that writes into a slice of one output; permutations go backward as
permutations, not as scatter-adds; the loss is taken in chunks that fit a cache; elementwise operations are compiled.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

EPSILON = 1e-6
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{ 'User: ' + message.content | trim + '\\n' }}
{%- elif message.role == 'assistant' -%}
{{ 'Assistant: ' + message.content | trim + '<|endoftext|>\\n' }}
{%- else -%}
{{ message.content | trim + '\\n\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ 'Assistant:' }}
{%- endif -%}
"""
"""Conversations as they are in the corpus."""


def product_dtype() -> torch.dtype:
    """bf16 on a GPU and on a CPU with bf16 products; without them float32 is twice as fast."""
    bf16 = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if bf16 else torch.float32


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; ``dtype`` is what its products are computed in."""

    vocabulary: int = 8192
    hidden: int = 192
    layers: int = 8
    experts: int = 64
    top_k: int = 4
    width: int = 96
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32
    theta: float = 10000.0
    dtype: torch.dtype = field(default_factory=product_dtype)

    def config(self) -> dict:
        """The config.json of a Hugging Face folder."""
        return dict(
            architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", vocab_size=self.vocabulary,
            hidden_size=self.hidden, intermediate_size=self.width, moe_intermediate_size=self.width,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim, num_experts=self.experts, num_experts_per_tok=self.top_k, norm_topk_prob=True,
            decoder_sparse_step=1, mlp_only_layers=[], rms_norm_eps=EPSILON, rope_theta=self.theta,
            max_position_embeddings=2048, tie_word_embeddings=True, hidden_act="silu", torch_dtype="bfloat16",
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip

    @classmethod
    def read(cls, config: dict, dtype: torch.dtype) -> Shape:
        return cls(
            config["vocab_size"], config["hidden_size"], config["num_hidden_layers"], config["num_experts"],
            config["num_experts_per_tok"], config["moe_intermediate_size"], config["num_attention_heads"],
            config["num_key_value_heads"], config["head_dim"], config["rope_theta"], dtype,
        )  # fmt: skip


class GroupedProduct(torch.autograd.Function):
    """Rows sorted by expert times their expert's matrix: (rows, in) and (experts, in, out) give (rows, out)."""

    @staticmethod
    def forward(ctx, x: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x, weights)
        ctx.counts = counts
        out = x.new_empty(len(x), weights.shape[2])
        for part, result, weight in zip(x.split(counts), out.split(counts), weights.unbind(0), strict=True):
            if len(part):
                torch.mm(part, weight, out=result)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weights = ctx.saved_tensors
        grad, counts = grad.contiguous(), ctx.counts
        grad_x, grad_weights = torch.empty_like(x), torch.zeros_like(weights)
        parts = x.split(counts), grad.split(counts), grad_x.split(counts), weights.unbind(0), grad_weights.unbind(0)
        for part, grad_part, result, weight, grad_weight in zip(*parts, strict=True):
            if len(part):
                torch.mm(grad_part, weight.T, out=result)
                torch.mm(part.T, grad_part, out=grad_weight)
        return grad_x, grad_weights, None


@dataclass
class Routes:
    """Where every (token, choice) pair goes: slots sorted by expert, each expert's part padded to a multiple of ``PAD``."""

    PAD = 32
    """Few distinct sizes, so that oneDNN finds its bf16 kernels in its cache."""

    slots: Tensor
    """Slot of every pair."""
    pairs: Tensor
    """Pair in every slot; padding has the number of pairs."""
    counts: Tensor
    """Pairs of every expert."""
    sizes: list[int]
    """Slots of every expert."""
    top_k: int

    @classmethod
    def of(cls, ids: Tensor, experts: int) -> Routes:
        flat = ids.reshape(-1)
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=experts)
        sizes = (counts + cls.PAD - 1) // cls.PAD * cls.PAD
        shift = (sizes.cumsum(0) - sizes) - (counts.cumsum(0) - counts)
        targets = torch.arange(len(flat), device=flat.device) + shift[flat[order]]
        slots, pairs = torch.empty_like(order), order.new_full((int(sizes.sum()),), len(flat))
        slots[order], pairs[targets] = targets, order
        return cls(slots, pairs, counts, sizes.tolist(), ids.shape[1])


def with_zero_row(x: Tensor) -> Tensor:
    return torch.cat((x, x.new_zeros(1, x.shape[1])))


class Spread(torch.autograd.Function):
    """Tokens to slots; padding is zero."""

    @staticmethod
    def forward(ctx, x: Tensor, routes: Routes) -> Tensor:
        ctx.routes = routes
        return with_zero_row(x).index_select(0, routes.pairs // routes.top_k)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        routes = ctx.routes
        return grad.index_select(0, routes.slots).view(-1, routes.top_k, grad.shape[1]).sum(1), None


class Gather(torch.autograd.Function):
    """Slots to pairs."""

    @staticmethod
    def forward(ctx, x: Tensor, routes: Routes) -> Tensor:
        ctx.routes = routes
        return x.index_select(0, routes.slots)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return with_zero_row(grad).index_select(0, ctx.routes.pairs), None


class ChunkedLoss(torch.autograd.Function):
    """Summed cross-entropy of the tied output layer; gradients are made in the forward pass, a chunk of rows at a time."""

    CHUNK = 128

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        total, grad_x = x.new_zeros((), dtype=torch.float32), torch.empty_like(x) if wanted else None
        grad_weight = torch.zeros(weight.shape, device=x.device) if wanted else None
        for start in range(0, len(x), ChunkedLoss.CHUNK):
            part, target = x[start : start + ChunkedLoss.CHUNK], targets[start : start + ChunkedLoss.CHUNK, None]
            scores = (part @ weight.T).float()
            scale = scores.logsumexp(-1, keepdim=True)
            total += (scale - scores.gather(1, target)).sum()
            if wanted:
                scores.sub_(scale).exp_()
                grad = scores.scatter_add_(1, target, -torch.ones_like(scale)).to(x.dtype)
                torch.mm(grad, weight, out=grad_x[start : start + ChunkedLoss.CHUNK])
                grad_weight += grad.T @ part
        ctx.save_for_backward(grad_x, grad_weight)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad.to(grad_x.dtype), (grad_weight * grad).to(grad_x.dtype), None


compiled = partial(torch.compile, dynamic=True)


@compiled
def normalised(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON) * weight


@compiled
def rotated(x: Tensor, weight: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Heads normalised, then turned by their position."""
    x = x.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON) * weight
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat((-second, first), -1) * sine


@compiled
def gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return normalised(x, self.weight)


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = s = shape
        self.attention_norm, self.ffn_norm = Norm(s.hidden), Norm(s.hidden)
        self.q = nn.Linear(s.hidden, s.heads * s.head_dim, bias=False)
        self.k = nn.Linear(s.hidden, s.kv_heads * s.head_dim, bias=False)
        self.v = nn.Linear(s.hidden, s.kv_heads * s.head_dim, bias=False)
        self.o = nn.Linear(s.heads * s.head_dim, s.hidden, bias=False)
        self.q_norm, self.k_norm = Norm(s.head_dim), Norm(s.head_dim)
        self.router = nn.Linear(s.hidden, s.experts, bias=False)
        self.gate_up = nn.Parameter(torch.randn(s.experts, s.hidden, 2 * s.width) * 0.02)
        self.down = nn.Parameter(torch.randn(s.experts, s.width, s.hidden) * 0.02 / math.sqrt(2 * s.layers))

    def attention(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        s, (batch, length, _) = self.shape, x.shape
        h = self.attention_norm(x).to(s.dtype)
        weight = torch.cat((self.q.weight, self.k.weight, self.v.weight)).to(s.dtype)
        sizes = s.heads * s.head_dim, s.kv_heads * s.head_dim, s.kv_heads * s.head_dim
        q, k, v = (part.view(batch, length, -1, s.head_dim) for part in F.linear(h, weight).split(sizes, -1))
        q = rotated(q, self.q_norm.weight, cosine, sine).transpose(1, 2)
        k = rotated(k, self.k_norm.weight, cosine, sine)
        k, v = (part.repeat_interleave(s.heads // s.kv_heads, 2).transpose(1, 2) for part in (k, v.float()))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, -1)
        return F.linear(y.to(s.dtype), self.o.weight.to(s.dtype)).float()

    def experts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(output, balance loss, z-loss)."""
        s = self.shape
        normed = self.ffn_norm(x).view(-1, s.hidden)
        logits = self.router(normed)
        probabilities = logits.softmax(-1)
        weights, ids = probabilities.topk(s.top_k, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        routes = Routes.of(ids, s.experts)
        h = Spread.apply(normed.to(s.dtype), routes)
        h = gated(GroupedProduct.apply(h, self.gate_up.to(s.dtype), routes.sizes))
        y = GroupedProduct.apply(h, self.down.to(s.dtype), routes.sizes)
        y = Gather.apply(y, routes).view(-1, s.top_k, s.hidden)
        out = (weights.to(s.dtype)[:, None, :] @ y).view_as(x).float()
        balance = s.experts * (probabilities.mean(0) * (routes.counts.float() / ids.numel())).sum()
        return out, balance, (logits.logsumexp(-1) ** 2).mean()


class Model(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.hidden)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(summed cross-entropy, mean balance loss, mean z-loss); targets below zero do not count."""
        s = self.shape
        frequencies = s.theta ** (-torch.arange(0, s.head_dim, 2, device=ids.device).float() / s.head_dim)
        angles = torch.outer(torch.arange(ids.shape[1], device=ids.device).float(), frequencies).repeat(1, 2)
        cosine, sine = angles.cos()[:, None], angles.sin()[:, None]
        x = self.embedding(ids)
        balance = z_loss = x.new_zeros(())
        for block in self.blocks:
            x = x + block.attention(x, cosine, sine)
            out, block_balance, block_z = block.experts(x)
            x, balance, z_loss = x + out, balance + block_balance, z_loss + block_z
        h, kept = self.norm(x).view(-1, s.hidden), targets.reshape(-1)
        if (kept < 0).any():
            h, kept = h[kept >= 0], kept[kept >= 0]
        loss = ChunkedLoss.apply(h.to(s.dtype), self.embedding.weight.to(s.dtype), kept)
        return loss, balance / s.layers, z_loss / s.layers


def tensors_of(model: Model) -> dict[str, Tensor]:
    """The model's tensors under their Hugging Face names; expert matrices are views."""
    width = model.shape.width
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
        for expert in range(model.shape.experts):
            names = f"{prefix}mlp.experts.{expert}."
            tensors[names + "gate_proj.weight"] = block.gate_up[expert, :, :width].T
            tensors[names + "up_proj.weight"] = block.gate_up[expert, :, width:].T
            tensors[names + "down_proj.weight"] = block.down[expert].T
    return tensors


def save(model: Model, folder: Path, tokenizer: Path) -> None:
    """A Hugging Face folder in bf16."""
    folder.mkdir(exist_ok=True)
    halves = {name: t.detach().to("cpu", torch.bfloat16).contiguous() for name, t in tensors_of(model).items()}
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.shape.config(), indent=1))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    shutil.copyfile(tokenizer, folder / "tokenizer.json")


@torch.no_grad()
def load(folder: Path, dtype: torch.dtype = torch.float32) -> Model:
    """A model from a Hugging Face folder."""
    model = Model(Shape.read(json.loads((folder / "config.json").read_text()), dtype))
    stored = load_file(folder / "model.safetensors")
    for name, tensor in tensors_of(model).items():
        tensor.copy_(stored[name])
    return model.eval()
