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

make speed asks for any case by our own options, a line each (--serve): "installed --kernel simd --heads 8 --tokens 4096 --causal
--pass backward --threads 2". The answer is the fastest, the median and the slowest time in milliseconds, or "refused" with a reason.
"""
import argparse
import itertools
import os
import signal
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


def modules(torch, BATCH=BATCH, TOKENS=TOKENS, EMBED=EMBED, HEADS=HEADS):
    """The notebook's nine, written again: name -> a function that makes a function of x."""
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


def options_of(line):
    """Our command line's options, as far as a case of make speed has them, with ./run's defaults."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    for name in ("--kernel", "--mask", "--bias", "--dout"):
        parser.add_argument(name)
    for name, value in (("--batch", 1), ("--tokens", 1024), ("--key-tokens", 0), ("--embed", 0), ("--heads", 12), ("--kv-heads", 0),
                        ("--head-size", 64), ("--lengths", 0), ("--threads", 0), ("--repeat", 1)):
        parser.add_argument(name, type=int, default=value)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--dropout", type=float, default=0)
    parser.add_argument("--dtype", default="f32")
    parser.add_argument("--pass", dest="kind", default="forward")
    o = parser.parse_args(line.split())
    o.key_tokens = o.key_tokens or o.tokens
    o.kv_heads = o.kv_heads or o.heads
    return o


def module_run(torch, o):
    """One pass through a module, as a function without arguments; both: out.sum() back to x and the parameters."""
    x = torch.randn(o.batch, o.tokens, o.embed, requires_grad=o.kind != "forward")
    module = modules(torch, o.batch, o.tokens, o.embed, o.heads)[o.kernel]()

    def run():
        with torch.set_grad_enabled(o.kind != "forward"):
            out = module(x)
            if o.kind != "forward":
                x.grad = None
                out.sum().backward()
    return run


def attention(torch, o):
    """PyTorch's counterpart of an attention kernel: a function of q, k, v, and a bias or None."""
    F = torch.nn.functional
    allowed = None
    if o.lengths:
        allowed = (torch.arange(o.key_tokens) < o.lengths).view(1, 1, 1, -1)
    if o.kernel == "materialised":
        def materialised(q, k, v, bias):
            scores = q @ k.transpose(-2, -1) / o.head_size**0.5
            return torch.softmax(scores, dim=-1) @ v
        return materialised
    if o.mask and o.mask != "causal":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        name, width = o.mask.split(":")
        if name != "window" or o.tokens != o.key_tokens:
            raise NotImplementedError(f"no counterpart of --mask {o.mask}")
        if o.kind != "forward":
            raise NotImplementedError("flex_attention has no backward pass on a CPU")
        mask = create_block_mask(lambda b, h, q, kv: (q >= kv) & (q - kv < int(width)), None, None, o.tokens, o.tokens, device=DEVICE)
        compiled = torch.compile(flex_attention)
        return lambda q, k, v, bias: compiled(q, k, v, block_mask=mask)
    return lambda q, k, v, bias: F.scaled_dot_product_attention(
        q, k, v, attn_mask=allowed if bias is None else bias, dropout_p=o.dropout, is_causal=o.causal or o.mask == "causal",
        enable_gqa=o.kv_heads < o.heads)


def core_run(torch, o):
    """One pass of attention as a function without arguments; backward: torch.autograd.grad of a forward that is done before."""
    dtype = torch.bfloat16 if o.dtype == "bf16" else torch.float32
    q = torch.randn(o.batch, o.heads, o.tokens, o.head_size, dtype=dtype)
    k, v = (torch.randn(o.batch, o.kv_heads, o.key_tokens, o.head_size, dtype=dtype) for _ in range(2))
    bias = torch.randn(1, o.heads, o.tokens, o.key_tokens, dtype=dtype) if o.bias else None
    function = attention(torch, o)
    if o.kind == "forward":
        def forward():
            with torch.no_grad():
                function(q, k, v, bias)
        return forward
    inputs = [tensor.requires_grad_() for tensor in (q, k, v, bias) if tensor is not None]
    dout = torch.randn_like(q)
    out = function(q, k, v, bias)
    return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)


def work():
    """A worker: reads a case a line, times it, answers with the fastest, median and slowest milliseconds, or "refused" with the reason."""
    import warnings
    import torch
    warnings.filterwarnings("ignore")
    torch.manual_seed(123)
    torch.set_default_device(DEVICE)
    timed = stopwatch(torch)
    all_threads = torch.get_num_threads()
    ready = {}  # modules, warm; an attention's tensors would fill the memory, and are made anew
    for line in sys.stdin:
        try:
            o = options_of(line)
            torch.set_num_threads(o.threads or all_threads)
            module = o.kernel in CHAPTER
            run = ready.get(line) or (module_run if module else core_run)(torch, o)
            if line not in ready and (module or o.mask or o.repeat > 1):
                run()  # warm, and compiled where it is; a single long run need not be
            if module:
                ready[line] = run
            times = [timed(run) for _ in range(o.repeat)]
            answer = f"{min(times):.4f} {statistics.median(times):.4f} {max(times):.4f}"
        except (Exception, SystemExit) as problem:  # what this PyTorch lacks leaves a gap, not a stop
            answer = "refused " + (" ".join(str(problem).split()) or type(problem).__name__)[:120]
        print(answer, flush=True)


def start_worker(kind, folder):
    """PyTorch "installed" or "forced"; folder: where the library goes that forces MKL's fast path."""
    environment = dict(os.environ, TORCHINDUCTOR_COMPILE_THREADS="1")
    if kind == "forced":
        source, library = os.path.join(folder, "fast.c"), os.path.join(folder, "fast.so")
        with open(source, "w") as file:
            file.write("int mkl_serv_intel_cpu_true(void) { return 1; }\n")
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
        environment["LD_PRELOAD"] = library
    return subprocess.Popen([sys.executable, os.path.abspath(__file__), "--worker"], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True, env=environment)


def ask(worker, case):
    """A worker's answer; "" if it ended."""
    try:
        worker.stdin.write(case + "\n")
        worker.stdin.flush()
        return worker.stdout.readline().strip()
    except BrokenPipeError:
        return ""


def time_worker(worker, case):
    answer = ask(worker, case)
    if not answer or answer.startswith("refused"):
        print(f"{case}: {answer or 'the worker ended'}", file=sys.stderr)
        return float("nan")
    return float(answer.split()[1])


def serve():
    """Reads "installed OPTIONS" or "forced OPTIONS" a line, answers as the worker of that kind does; "failed" if that ended."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    workers = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for line in sys.stdin:
                kind, _, case = line.strip().partition(" ")
                if kind not in workers:
                    workers[kind] = start_worker(kind, folder)
                answer = ask(workers[kind], case)
                if not answer:
                    del workers[kind]
                print(answer or "failed", flush=True)
        finally:
            for worker in workers.values():
                worker.kill()


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
    module = f"--batch {BATCH} --tokens {TOKENS} --embed {EMBED} --heads {HEADS} --pass {'both' if BOTH else 'forward'}"
    with tempfile.TemporaryDirectory() as folder:
        workers = {kind: start_worker(kind, folder) for kind in (("installed", "forced") if DEVICE == "cpu" else ("installed",))}
        times = {}
        for turn in range(rounds):
            for name in CHAPTER:
                if sys.stderr.isatty():
                    print(f"\rround {turn + 1} of {rounds}: {name:24}", end="", file=sys.stderr)
                ours, machine = time_ours(build, name, folder)
                times.setdefault((name, "ours"), []).append(ours)
                for kind, worker in workers.items():
                    times.setdefault((name, kind), []).append(time_worker(worker, f"--kernel {name} {module}"))
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
    work() if "--worker" in sys.argv else serve() if "--serve" in sys.argv else main()
