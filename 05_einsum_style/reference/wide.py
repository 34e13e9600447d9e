"""Writes wide.tsv and dropout.tsv beside itself: the notebook's einsum module where d_in is not d_out, without and with
dropout, as PyTorch computes it. Needed only to make those files again: python3 wide.py, with PyTorch."""
import math
import os
import torch
from torch import nn

D_IN, D_OUT, HEADS = 7, 12, 3


class EinsumAttention(nn.Module):
    """The draws are the notebook's: randn three times, out_proj, then other values for the three matrices."""

    def __init__(self, dropout):
        super().__init__()
        for name in "W_query", "W_key", "W_value":
            setattr(self, name, nn.Parameter(torch.randn(D_IN, D_OUT)))
        self.out_proj = nn.Linear(D_OUT, D_OUT)
        self.dropout = nn.Dropout(dropout)
        for W in self.W_query, self.W_key, self.W_value:
            nn.init.kaiming_uniform_(W, a=math.sqrt(5))

    def heads(self, x, W):
        B, T, _ = x.shape
        return torch.einsum("bnd,do->bno", x, W).view(B, T, HEADS, -1).transpose(1, 2)

    def forward(self, x):
        B, T, _ = x.shape
        q, k, v = (self.heads(x, W) for W in (self.W_query, self.W_key, self.W_value))
        scores = torch.einsum("bhnd,bhmd->bhnm", q, k) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(torch.triu(torch.ones(T, T), 1).bool(), -torch.inf)
        weights = self.dropout(torch.softmax(scores, -1))
        context = torch.einsum("bhnm,bhmd->bhnd", weights, v)
        return self.out_proj(context.transpose(1, 2).reshape(B, T, D_OUT))


def row(name, tensor, step):
    flat = tensor.detach().flatten()
    places = sorted({*range(0, flat.numel(), step), flat.numel() - 1})
    values = " ".join(f"[{i}]={flat[i]:.7g}" for i in places)
    return f"4\teinsum\t{name}\t{tuple(tensor.shape)}\t{flat.double().norm():.9g}\t{values}\n"


for dropout, name in (0.0, "wide.tsv"), (0.5, "dropout.tsv"):
    torch.manual_seed(123)
    x = torch.randn(2, 5, D_IN, requires_grad=True)
    module = EinsumAttention(dropout)
    out = module(x)
    (out.square().sum() / 2).backward()
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), name), "w") as file:
        file.write(f"# torch.manual_seed(123); x = randn(2,5,{D_IN}); the notebook's einsum module, d_in {D_IN}, d_out {D_OUT}, "
                   f"{HEADS} heads, dropout {dropout:g}; out = module(x).\n"
                   "# grad_ rows: (out.square().sum() / 2).backward(), so that the gradient of out is out itself.\n"
                   f"# PyTorch {torch.__version__} on a CPU, float32. Written by wide.py.\n"
                   "implementation\tkernel\ttensor\tshape\tl2\tindex=value ...\n")
        file.write(row("x", x, 13) + row("grad_x", x.grad, 13) + row("out", out, 3))
        for name in "W_query", "W_key", "W_value", "out_proj.weight", "out_proj.bias":
            parameter = module.get_parameter(name)
            step = {"out_proj.weight": 17, "out_proj.bias": 5}.get(name, 13)
            file.write(row(name, parameter, step) + row("grad_" + name, parameter.grad, step))
