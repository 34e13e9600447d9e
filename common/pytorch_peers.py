#!/usr/bin/env python3
"""Puts PyTorch's own bars beside ours. Optional: nothing in this book needs it.

    make demo && PYTHON=python-with-torch make peers
    make gpu && PYTHON=python-with-torch DEVICE=cuda make peers      on a GPU

Times the nine modules of the mha-implementations notebook, (8, 1024, 768) with 12 heads, forward (or with PASS=both forward and backward) on the CPU: ours, PyTorch
as installed, and PyTorch with MKL's fast path forced (on processors of another maker than Intel's, MKL takes a slow path unless
a preloaded function says otherwise). One run, interleaved round by round, medians. Writes build/demo/common/pytorch.tsv (or
pytorch_both.tsv), which the charts pick up, and prints the table.

With DEVICE=cuda both run on the GPU, float32 without TF32, timed by its own events after the last-level cache was emptied
(build/gpu/common/pytorch_gpu.tsv or pytorch_gpu_both.tsv). Then PyTorch's attention alone, its backends one at a time, over the lengths of
make gpu, in float32 and bf16 (build/gpu/pytorch_attention.tsv). A backend that refuses is named with its reason, and leaves no row.
"""
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time

BATCH, TOKENS, EMBED, HEADS = 8, 1024, 768, 12
BOTH = os.environ.get("PASS", "forward") == "both"
DEVICE = os.environ.get("DEVICE", "cpu")
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
        mask = create_block_mask(lambda b, h, q, kv: q >= kv, None, None, TOKENS, TOKENS, device=DEVICE)

        def forward(x):
            q, k, v = heads(x)
            return proj(merge(flex_attention(q, k, v, block_mask=mask)))
        return forward

    return {
        "wrapper": wrapper, "split-heads": split_heads, "packed-qkv": packed_qkv, "einsum": einsum,
        "sdpa": lambda: sdpa(is_causal=True), "sdpa-mask": lambda: sdpa(attn_mask=causal),
        "torch-mha": lambda: torch_mha(True), "torch-mha-noweights": lambda: torch_mha(False), "flex": flex,
    }


def stopwatch(torch):
    """A function that runs another and returns its milliseconds: by this machine's clock, or by the GPU's events."""
    def on_cpu(run):
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)

    def on_gpu(run):
        cache.zero_()
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop)

    if DEVICE == "cpu":
        return on_cpu
    cache = torch.empty(2 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.uint8, device=DEVICE)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    return on_gpu


def time_backends(torch, lengths, head_sizes, tokens_in_all, width, repeats):
    """Rows of PyTorch's attention, (B,NH,T,HS) with B*T and NH*HS fixed: each backend alone, forward and backward."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    timed, rows = stopwatch(torch), []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH):
        refused = None
        for dtype, size, tokens, causal in itertools.product((torch.float32, torch.bfloat16), head_sizes, lengths, (False, True)):
            shape = (tokens_in_all // tokens, width // size, tokens, size)
            try:
                q, k, v, dout = (torch.randn(shape, dtype=dtype, device=DEVICE) for _ in range(4))
                for tensor in (q, k, v):
                    tensor.requires_grad_()
                forward, backward = [], []
                with sdpa_kernel(backend):
                    for turn in range(repeats + 1):
                        kept = []
                        forward.append(timed(lambda: kept.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal))))
                        backward.append(timed(lambda: torch.autograd.grad(kept[0], (q, k, v), dout)))
            except RuntimeError as problem:  # no such kernel for this, or out of memory
                refused = f"{backend.name}, {dtype}, heads of {size}: {str(problem).splitlines()[0]}"
                continue
            flops = 4 * shape[0] * shape[1] * tokens * tokens * size / (2 if causal else 1)
            for kind, ms, times in (("forward", forward, 1), ("backward", backward, 2.5)):
                median = statistics.median(ms[1:])  # the first was warm-up
                rows.append([backend.name, str(dtype).split(".")[1], kind, size, tokens, "causal" if causal else "none", f"{median:.4f}",
                             f"{1e-6 * times * flops / median:.1f}"])
        if refused:
            print(f"refused: {refused}", file=sys.stderr)
    return rows


def write_backends(path, machine):
    import torch
    rows = time_backends(torch, (1024, 2048, 4096, 8192, 16384), (64, 128), 16384, 2048, 20)
    with open(path, "w") as file:
        file.write("machine\tkernel\tdtype\tpass\thead_size\ttokens\tmask\tms_median\tgflops\n")
        for row in rows:
            file.write("\t".join([machine, *map(str, row)]) + "\n")
    print(f"wrote {path}")


def work():
    """A worker: reads a module's name a line, times one forward pass, answers with milliseconds (nan where it cannot run)."""
    import warnings
    import torch
    warnings.filterwarnings("ignore")
    torch.manual_seed(123)
    torch.set_default_device(DEVICE)
    timed = stopwatch(torch)
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
                answer = timed(lambda: run(name))
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
                    "--embed", str(EMBED), "--heads", str(HEADS), "--pass", "both" if BOTH else "forward", "--device", DEVICE, "--bench", "--repeat", "2", "--tsv", tsv],
                   check=True, stdout=subprocess.DEVNULL)
    row = read_tsv(tsv)[0]
    return float(row["ms_median"]), row["machine"]


def main():
    rounds = int(os.environ.get("ROUNDS", "5"))
    build = os.environ.get("BUILD", "build")
    folder_of = "demo" if DEVICE == "cpu" else "gpu"
    out = os.path.join(build, folder_of, "common", "pytorch" + ("" if DEVICE == "cpu" else "_gpu") + ("_both" if BOTH else "") + ".tsv")
    os.makedirs(os.path.dirname(out), exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        workers = {"installed": start_worker(None)}
        if DEVICE == "cpu":
            source, library = os.path.join(folder, "fast.c"), os.path.join(folder, "fast.so")
            with open(source, "w") as file:
                file.write("int mkl_serv_intel_cpu_true(void) { return 1; }\n")
            subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
            workers["forced"] = start_worker(library)
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
    print(f"{'':22}{'ours':>10}" + "".join(f"{kind:>12}" for kind in workers) + "   PyTorch's time over ours")
    for i, name in enumerate(CHAPTER, 1):
        ours, theirs = median[name, "ours"], [median[name, kind] for kind in workers]
        print(f"{i} {name:20}{ours:10.1f}" + "".join(f"{ms:12.1f}" for ms in theirs) + "  " + "".join(f" {ms / ours:.2f}" for ms in theirs))
    print(f"wrote {out}")
    if DEVICE == "cuda" and not BOTH:
        write_backends(os.path.join(build, "gpu", "pytorch_attention.tsv"), machine)


if __name__ == "__main__":
    work() if "--worker" in sys.argv else main()
