"""What others do on the same card with the work of gpu_bench.cpp: PyTorch's bf16 and int8 matrix products (cuBLASLt) and its attention (FlashAttention).

  python3 rivals.py [FILE]      prints a table; FILE: the same as JSON

Skips with its reason where PyTorch or a card is missing. Weights are taken in turns, together more than four times the L2 cache. One CUDA graph a measurement, the middle
one of nine runs, as gpu_bench does it.
"""

import json
import sys

TRIES = 9


def skip(reason):
    print(f"skip {reason}")
    sys.exit(0)


try:
    import torch
except ImportError as error:
    skip(f"PyTorch is not here ({error})")
if not torch.cuda.is_available():
    skip("PyTorch finds no card")

properties = torch.cuda.get_device_properties(0)
L2_BYTES = getattr(properties, "L2_cache_size", 64 << 20)
rows = []


def copies(size):
    return max(2, min(1024, 4 * L2_BYTES // max(size, 1) + 2))


def time_us(count, repetition):
    """Microseconds of one of `count` repetitions, which are captured as one graph."""
    for i in range(3):
        repetition(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            repetition(i)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for i in range(TRIES + 1):
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if i > 0:
            times.append(begin.elapsed_time(end) * 1000 / count)
    return sorted(times)[len(times) // 2]


def add(part, what, measure, moved=0, operations=0):
    row = {"part": part, "what": what}
    try:
        us = measure()
        row.update(us=us, bytes=moved, operations=operations)
        rate = f"{moved / us / 1e3:9.1f} GB/s" if moved else ""
        print(f"{part:20} {what:44} {us:9.2f} us {rate} {operations / us / 1e6:9.2f} T/s")
    except Exception as error:  # a shape that this version does not take is a row that says so
        row["skipped"] = str(error).splitlines()[0]
        print(f"{part:20} {what:44} skip {row['skipped']}")
    rows.append(row)
    torch.cuda.empty_cache()


def bf16_product(rows_out, columns, tokens):
    size = rows_out * columns * 2
    weights = [torch.randn(rows_out, columns, device="cuda", dtype=torch.bfloat16) for _ in range(copies(size))]
    x = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(tokens, rows_out, device="cuda", dtype=torch.bfloat16)
    count = max(8, min(400, (4 << 30) // size))
    return time_us(count, lambda i: torch.matmul(x, weights[i % len(weights)].t(), out=out))


def int8_product(rows_out, columns, tokens):
    size = rows_out * columns
    weights = [torch.randint(-127, 127, (rows_out, columns), device="cuda", dtype=torch.int8) for _ in range(copies(size))]
    x = torch.randint(-127, 127, (tokens, columns), device="cuda", dtype=torch.int8)
    count = max(8, min(200, (4 << 30) // size))
    return time_us(count, lambda i: torch._int_mm(x, weights[i % len(weights)].t()))


def attention(heads, kv_heads, head_size, tokens, context, sequences):
    def make(count, length):
        return torch.randn(sequences, count, length, head_size, device="cuda", dtype=torch.bfloat16)

    size = 2 * sequences * kv_heads * context * head_size * 2
    caches = [(make(kv_heads, context), make(kv_heads, context)) for _ in range(copies(size) if tokens == 1 else 2)]
    q = make(heads, tokens)

    def run(i):
        k, v = caches[i % len(caches)]
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=tokens > 1, enable_gqa=heads != kv_heads)

    return time_us(max(4, min(200, (4 << 30) // size)) if tokens == 1 else 4, run)


print(f"{properties.name}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}")
for rows_out, columns in [(4096, 4096), (16384, 4096)]:
    for tokens in (1, 16, 64):
        moved = 2 * (rows_out * columns + tokens * (rows_out + columns))
        add("bf16 product", f"{columns} x {rows_out}, {tokens}", lambda: bf16_product(rows_out, columns, tokens), moved, 2 * rows_out * columns * tokens)
for rows_out in (4096, 14336):
    for tokens in (128, 512, 2048):
        operations = 2 * rows_out * 4096 * tokens
        add("bf16 product", f"4096 x {rows_out}, {tokens}", lambda: bf16_product(rows_out, 4096, tokens), 0, operations)
        add("int8 product", f"4096 x {rows_out}, {tokens} (one scale)", lambda: int8_product(rows_out, 4096, tokens), 0, operations)
for heads, kv_heads, head_size in [(9, 3, 64), (12, 2, 128), (32, 8, 128)]:
    for sequences, context in [(1, 1024), (1, 32768), (32, 1024), (32, 4096), (128, 1024)]:
        moved = 4 * sequences * kv_heads * context * head_size
        add("decode attention", f"D {head_size}, {heads}/{kv_heads} heads, {sequences} x {context}",
            lambda: attention(heads, kv_heads, head_size, 1, context, sequences), moved, 4 * sequences * heads * head_size * context)
    for tokens in (512, 2048, 8192):
        add("prefill attention", f"D {head_size}, {heads}/{kv_heads} heads, {tokens}",
            lambda: attention(heads, kv_heads, head_size, tokens, tokens, 1), 0, 2 * heads * head_size * tokens * (tokens + 1))

if len(sys.argv) > 1:
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        json.dump({"card": properties.name, "torch": torch.__version__, "cuda": torch.version.cuda, "rows": rows}, file, indent=1)
