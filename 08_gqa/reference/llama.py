"""Makes llama.tsv: PyTorch's values for the module of chapter 8. Needed only to make them again:

    python3 08_gqa/reference/llama.py > 08_gqa/reference/llama.tsv
"""
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

B, T, C, C_OUT, NH, NKV, THETA = 2, 10, 48, 96, 6, 2, 500000.0
HS = C_OUT // NH


def rotate(x):  # (B, heads, T, HS), as transformers' apply_rotary_pos_emb
    inv_freq = 1.0 / THETA ** (torch.arange(0, HS, 2, dtype=torch.float32) / HS)
    angle = torch.outer(torch.arange(T, dtype=torch.float32), inv_freq)
    cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
    half = torch.cat((-x[..., HS // 2 :], x[..., : HS // 2]), -1)
    return x * cos + half * sin


torch.manual_seed(123)
x = torch.randn(B, T, C, requires_grad=True)
q_proj, k_proj, v_proj = (nn.Linear(C, n * HS, bias=False) for n in (NH, NKV, NKV))
o_proj = nn.Linear(NH * HS, C_OUT, bias=False)
q, k, v = (p(x).view(B, T, -1, HS).transpose(1, 2) for p in (q_proj, k_proj, v_proj))
q, k = rotate(q), rotate(k)
out = o_proj(scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2))
again = scaled_dot_product_attention(
    q, k.repeat_interleave(NH // NKV, 1), v.repeat_interleave(NH // NKV, 1), is_causal=True)
assert torch.allclose(out, o_proj(again.transpose(1, 2).flatten(2)), atol=1e-6)

print(f"# manual_seed(123); x = randn({B},{T},{C}); q_proj, k_proj, v_proj, o_proj without bias; {NH} heads, {NKV} key/value")
print(f"# heads of {HS}, rope theta {THETA:g}, causal; out ({B},{T},{C_OUT}). PyTorch {torch.__version__} on a CPU, float32. Memory order.")
for row in out.reshape(-1, C_OUT):
    print("\t".join(f"{value:.7g}" for value in row.tolist()))

dout = torch.randn(B, T, C_OUT)
(out * dout).sum().backward()
print("# Gradients of (out * dout).sum(), dout = randn as out, drawn behind the parameters: L2 norm, first row, last row.")
named = {"x": x, "q_proj": q_proj.weight, "k_proj": k_proj.weight, "v_proj": v_proj.weight, "o_proj": o_proj.weight}
for name, tensor in named.items():
    rows = tensor.grad.reshape(-1, tensor.shape[-1])
    print("\t".join([name] + [f"{value:.7g}" for value in [rows.norm().item(), *rows[0].tolist(), *rows[-1].tolist()]]))
