#!/usr/bin/env python3
"""PyTorch (and transformers' RoPE) as peers: see protocol.py.

torch           what a user calls: F.scaled_dot_product_attention, F.layer_norm, F.rms_norm, torch.mm, optim.AdamW, ...
torch_compile   the same through torch.compile (needs a C++ compiler)
torch_fused     AdamW(fused=True)
torch_complex   RoPE as a product of complex numbers
transformers    RoPE by transformers' apply_rotary_pos_emb

Operands are [B, T, H, d] in memory and handed to attention as the transposed view, as models do.  torch allocates its
results; with the environment of compare.py freed memory stays in the process, so no page is touched for the first time.
"""
from protocol import absent, main


def library(p):
    import torch

    torch.set_num_threads(p.threads)
    torch.manual_seed(p.seed)
    p.type = dict(fp32=torch.float32, fp64=torch.float64, fp16=torch.float16, bf16=torch.bfloat16)[p.dtype]
    return torch


def attention_operands(torch, p, grad):
    def operand(rows, heads):
        x = torch.randn(p.B, rows, heads, p.d).to(p.type).transpose(1, 2)
        return x.detach().requires_grad_(grad)

    return operand(p.T, p.H), operand(p.TK, p.HK), operand(p.TK, p.HK)


def attention(torch, p):
    """The call, and whether PyTorch has a kernel for it: windows need a dense mask."""
    mask, causal = None, bool(p.causal)
    i, j = torch.arange(p.T)[:, None] + p.TK - p.T, torch.arange(p.TK)
    if p.window:
        mask, causal = (j <= i) & (j >= i - p.window), False
    elif causal and p.decode and p.T > 1:
        mask, causal = j <= i, False
    elif p.decode:
        causal = False  # one query at the end sees every key
    grouped = p.HK != p.H
    return lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


def sdpa(p):
    torch = library(p)
    call, operands = attention(torch, p), attention_operands(torch, p, False)
    return inference(torch, call, operands)


def sdpa_fb(p):
    torch = library(p)
    call, operands = attention(torch, p), attention_operands(torch, p, True)
    upstream = torch.randn(p.B, p.T, p.H, p.d).to(p.type).transpose(1, 2)
    return lambda: torch.autograd.grad(call(*operands), operands, upstream)


def inference(torch, call, operands):
    def run():
        with torch.inference_mode():
            call(*operands)

    return run


def gemm(p):
    torch = library(p)
    a, b = torch.randn(p.M, p.K).to(p.type), torch.randn(p.K, p.N).to(p.type)
    out = torch.empty(p.M, p.N, dtype=p.type)
    return lambda: torch.mm(a, b, out=out)


def rows_function(torch, op, p):
    """The op on N x D operands and how many of them it takes."""
    F = torch.nn.functional
    one, zero = torch.ones(p.D, dtype=p.type), torch.zeros(p.D, dtype=p.type)
    target = torch.randint(p.D, (p.N,))
    return {
        "copy": (lambda x: x.clone(), 1),
        "softmax": (lambda x: torch.softmax(x, -1), 1),
        "layernorm": (lambda x: F.layer_norm(x, (p.D,), one, zero), 1),
        "rmsnorm": (lambda x: F.rms_norm(x, (p.D,), one, 1e-6), 1),
        "silu": (F.silu, 1),
        "swiglu": (lambda a, b: F.silu(a) * b, 2),
        "cross_entropy": (lambda x: F.cross_entropy(x, target), 1),
    }[op]


def rows(op, compiled):
    def build(p):
        torch = library(p)
        call, count = rows_function(torch, op, p)
        if compiled:
            call = torch.compile(call)
        return inference(torch, call, [torch.randn(p.N, p.D).to(p.type) for _ in range(count)])

    return build


def rows_fb(op, compiled):
    def build(p):
        torch = library(p)
        call, count = rows_function(torch, op, p)
        if compiled:
            call = torch.compile(call)
        operands = [torch.randn(p.N, p.D).to(p.type).requires_grad_(True) for _ in range(count)]
        upstream = torch.ones((), dtype=p.type) if op == "cross_entropy" else torch.randn(p.N, p.D).to(p.type)
        return lambda: torch.autograd.grad(call(*operands), operands, upstream)

    return build


def adamw(fused):
    def build(p):
        torch = library(p)
        weight = torch.randn(p.N, p.D).to(p.type).requires_grad_(True)
        weight.grad = torch.randn_like(weight)
        return torch.optim.AdamW([weight], **({"fused": True} if fused else {"foreach": True})).step

    return build


def rotation(torch, p):
    """q of all heads and k of one, [B, T, heads, d]; angles [T, d/2] in double."""
    frequency = 1e4 ** (-torch.arange(0, p.d, 2).double() / p.d)
    angle = torch.arange(p.T).double()[:, None] * frequency
    q, k = torch.randn(p.B, p.T, p.H, p.d).to(p.type), torch.randn(p.B, p.T, 1, p.d).to(p.type)
    return q, k, angle


def rope_transformers(p):
    torch = library(p)
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k, angle = rotation(torch, p)
    both = torch.cat([angle, angle], -1)[None]
    cos, sin = both.cos().to(p.type), both.sin().to(p.type)
    return inference(torch, lambda: apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin), ())


def rope_complex(p):
    torch = library(p)
    if p.dtype not in ("fp32", "fp64"):
        absent("torch has no complex numbers of 16 bits on the CPU")
    q, k, angle = rotation(torch, p)
    turn = torch.polar(torch.ones_like(angle), angle)[None, :, None]
    turn = turn.to(torch.complex64 if p.dtype == "fp32" else torch.complex128)

    def rotate(x):
        return torch.view_as_real(torch.view_as_complex(x.view(*x.shape[:-1], -1, 2)) * turn).flatten(3)

    return inference(torch, lambda: (rotate(q), rotate(k)), ())


ROWS = ["copy", "softmax", "layernorm", "rmsnorm", "silu", "swiglu", "cross_entropy"]
RIVALS = {
    "torch": {"sdpa": sdpa, "sdpa_fb": sdpa_fb, "gemm": gemm, "adamw": adamw(False)},
    "torch_compile": {},
    "torch_fused": {"adamw": adamw(True)},
    "torch_complex": {"rope": rope_complex},
    "transformers": {"rope": rope_transformers},
}
for name in ROWS:
    for rival, compiled in (("torch", False), ("torch_compile", True)):
        RIVALS[rival][name] = rows(name, compiled)
        if name != "copy":
            RIVALS[rival][name + "_fb"] = rows_fb(name, compiled)

if __name__ == "__main__":
    main(RIVALS)
