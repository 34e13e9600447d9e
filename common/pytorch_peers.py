#!/usr/bin/env python3
"""Puts PyTorch's own bars beside ours. Optional: nothing in this book needs it.

    make demo && PYTHON=python-with-torch make peers

Times the nine modules of the mha-implementations notebook, (8, 1024, 768) with 12 heads, forward (or with PASS=both forward and backward) on the CPU: ours, PyTorch
as installed, and PyTorch with MKL's fast path forced (on processors of another maker than Intel's, MKL takes a slow path unless
a preloaded function says otherwise). One run, interleaved round by round, medians. Writes build/demo/common/pytorch.tsv (or
pytorch_both.tsv), which the charts pick up, and prints the table.
"""
import os
import statistics
import subprocess
import sys
import tempfile
import time

BATCH, TOKENS, EMBED, HEADS = 8, 1024, 768, 12
BOTH = os.environ.get("PASS", "forward") == "both"
CHAPTER = {
    "wrapper": "03_multihead_wrapper", "split-heads": "04_packed_qkv", "packed-qkv": "04_packed_qkv",
    "einsum": "05_einsum_style", "sdpa": "07_flash_tiled", "sdpa-mask": "07_flash_tiled",
    "torch-mha": "04_packed_qkv", "torch-mha-noweights": "07_flash_tiled", "flex": "09_block_sparse",
}


def modules(torch):
    """The notebook's nine, written again: name -> a function of x."""
    nn, F = torch.nn, torch.nn.functional
    head_size = EMBED // HEADS
    causal = torch.triu(torch.ones(TOKENS, TOKENS), diagonal=1).bool()

    def masked_softmax(scores):
        return torch.softmax(scores.masked_fill(causal, -torch.inf) / head_size**0.5, dim=-1)

    def split(tensor):
        return tensor.view(BATCH, TOKENS, HEADS, head_size).transpose(1, 2)

    def merge(context):
        return context.transpose(1, 2).reshape(BATCH, TOKENS, EMBED)

    def linear(outputs=EMBED, bias=False):
        return nn.Linear(EMBED, outputs, bias=bias)

    def wrapper():
        heads = [[linear(head_size) for _ in range(3)] for _ in range(HEADS)]
        out_proj = linear(bias=True)

        def forward(x):
            outs = []
            for query, key, value in heads:
                q, k, v = query(x), key(x), value(x)
                outs.append(masked_softmax(q @ k.transpose(1, 2)) @ v)
            return out_proj(torch.cat(outs, dim=-1))
        return forward

    def split_heads():
        query, key, value, out_proj = linear(), linear(), linear(), linear(bias=True)

        def forward(x):
            q, k, v = split(query(x)), split(key(x)), split(value(x))
            return out_proj(merge(masked_softmax(q @ k.transpose(2, 3)) @ v))
        return forward

    def packed():
        qkv, proj = linear(3 * EMBED), linear(bias=True)

        def heads(x):
            return qkv(x).view(BATCH, TOKENS, 3, HEADS, head_size).permute(2, 0, 3, 1, 4)
        return heads, proj

    def packed_qkv():
        heads, proj = packed()

        def forward(x):
            q, k, v = heads(x)
            return proj(merge(masked_softmax(q @ k.transpose(-2, -1)) @ v))
        return forward

    def einsum():
        w_q, w_k, w_v = (torch.randn(EMBED, EMBED) for _ in range(3))
        out_proj = linear(bias=True)

        def forward(x):
            q, k, v = (split(torch.einsum("bnd,do->bno", x, w)) for w in (w_q, w_k, w_v))
            weights = masked_softmax(torch.einsum("bhnd,bhmd->bhnm", q, k))
            return out_proj(merge(torch.einsum("bhnm,bhmd->bhnd", weights, v)))
        return forward

    def sdpa(**options):
        heads, proj = packed()

        def forward(x):
            q, k, v = heads(x)
            return proj(merge(F.scaled_dot_product_attention(q, k, v, **options)))
        return forward

    def torch_mha(need_weights):
        mha = nn.MultiheadAttention(EMBED, HEADS, bias=False, batch_first=True)
        proj = linear(bias=True)

        def forward(x):
            return proj(mha(x, x, x, attn_mask=causal, need_weights=need_weights)[0])
        return forward

    def flex():
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        heads, proj = packed()
        mask = create_block_mask(lambda b, h, q, kv: q >= kv, None, None, TOKENS, TOKENS, device="cpu")

        def forward(x):
            q, k, v = heads(x)
            return proj(merge(flex_attention(q, k, v, block_mask=mask)))
        return forward

    return {
        "wrapper": wrapper, "split-heads": split_heads, "packed-qkv": packed_qkv, "einsum": einsum,
        "sdpa": lambda: sdpa(is_causal=True), "sdpa-mask": lambda: sdpa(attn_mask=causal),
        "torch-mha": lambda: torch_mha(True), "torch-mha-noweights": lambda: torch_mha(False), "flex": flex,
    }


def work():
    """A worker: reads a module's name a line, times one forward pass, answers with milliseconds (nan where it cannot run)."""
    import warnings
    import torch
    warnings.filterwarnings("ignore")
    torch.manual_seed(123)
    x = torch.randn(BATCH, TOKENS, EMBED)
    makers, ready = modules(torch), {}
    if BOTH:
        x.requires_grad_()

    def run(name):
        if BOTH:
            x.grad = None
            ready[name](x).sum().backward()
        else:
            ready[name](x)

    with torch.set_grad_enabled(BOTH):
        for line in sys.stdin:
            name = line.strip()
            try:
                if name not in ready:
                    ready[name] = makers[name]()
                    run(name)  # warm
                start = time.perf_counter()
                run(name)
                answer = 1e3 * (time.perf_counter() - start)
            except Exception as problem:  # a module that this PyTorch lacks leaves a gap, not a stop
                if makers[name]:
                    print(f"{name}: {problem}", file=sys.stderr)
                makers[name] = None
                answer = float("nan")
            print(answer, flush=True)


def start_worker(preload):
    environment = dict(os.environ, LD_PRELOAD=preload) if preload else dict(os.environ)
    return subprocess.Popen([sys.executable, os.path.abspath(__file__), "--worker"], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True, env=environment)


def time_worker(worker, name):
    worker.stdin.write(name + "\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


def read_tsv(path):
    with open(path) as file:
        rows = [line.rstrip("\n").split("\t") for line in file]
    return [dict(zip(rows[0], row)) for row in rows[1:]]


def time_ours(build, name, folder):
    tsv = os.path.join(folder, "ours.tsv")
    if os.path.exists(tsv):
        os.remove(tsv)
    subprocess.run([f"{build}/{CHAPTER[name]}/run", "--kernel", name, "--batch", str(BATCH), "--tokens", str(TOKENS),
                    "--embed", str(EMBED), "--heads", str(HEADS), "--pass", "both" if BOTH else "forward", "--bench", "--repeat", "2", "--tsv", tsv],
                   check=True, stdout=subprocess.DEVNULL)
    row = read_tsv(tsv)[0]
    return float(row["ms_median"]), row["machine"]


def main():
    rounds = int(os.environ.get("ROUNDS", "5"))
    build = os.environ.get("BUILD", "build")
    out = os.path.join(build, "demo/common/pytorch_both.tsv" if BOTH else "demo/common/pytorch.tsv")
    os.makedirs(os.path.dirname(out), exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        source, library = os.path.join(folder, "fast.c"), os.path.join(folder, "fast.so")
        with open(source, "w") as file:
            file.write("int mkl_serv_intel_cpu_true(void) { return 1; }\n")
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
        workers = {"installed": start_worker(None), "forced": start_worker(library)}
        times = {}
        for turn in range(rounds):
            for name in CHAPTER:
                if sys.stderr.isatty():
                    print(f"\rround {turn + 1} of {rounds}: {name:24}", end="", file=sys.stderr)
                ours, machine = time_ours(build, name, folder)
                times.setdefault((name, "ours"), []).append(ours)
                for kind, worker in workers.items():
                    times.setdefault((name, kind), []).append(time_worker(worker, name))
        if sys.stderr.isatty():
            print(file=sys.stderr)
        for worker in workers.values():
            worker.stdin.close()
    median = {key: statistics.median(values) for key, values in times.items()}
    with open(out, "w") as file:
        file.write("machine\tkernel\tkernel_set\tms_median\tms_min\trepeats\n")
        for (name, kind), value in median.items():
            file.write(f"{machine}\t{name}\t{kind}\t{value:.3f}\t{min(times[name, kind]):.3f}\t{rounds}\n")
    print(f"{'':22}{'ours':>10}{'installed':>12}{'forced':>10}   PyTorch's time over ours")
    for i, name in enumerate(CHAPTER, 1):
        ours, installed, forced = (median[name, kind] for kind in ("ours", "installed", "forced"))
        print(f"{i} {name:20}{ours:10.1f}{installed:12.1f}{forced:10.1f}   {installed / ours:.2f} {forced / ours:.2f}")
    print(f"wrote {out}")


if __name__ == "__main__":
    work() if "--worker" in sys.argv else main()
