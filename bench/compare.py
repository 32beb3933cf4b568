#!/usr/bin/env python3
"""Times bench_paired against its rivals, interleaved, and prints a markdown table.

    compare.py [GRID ...] [options]                 grids: attention backward decode window rope rows products short; see GRIDS
    compare.py --case "sdpa T=2048 d=128 causal=1"  one case instead (repeatable)

Every contestant is a process that runs the same case once per line it is sent and answers with its own time (processor
time at one thread, wall clock with more).  A round visits all contestants, starting one further each time; each runs a
burst of up to 15 calls (5 ms worth), of which the median counts.  ratio = rival's time / our time of the same round,
median over the rounds: above 1 we are faster.  The range is its 10th to 90th percentile.  Best times give GFLOP/s or GB/s.
Below 5 % nothing is claimed.  A rival that is not installed, or has no such op, is listed as absent.
"""
import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "peers"))
from protocol import ABSENT, Parameters  # noqa: E402

SCRIPTS = {"torch": "torch_peer.py", "torch_compile": "torch_peer.py", "torch_fused": "torch_peer.py",
           "torch_complex": "torch_peer.py", "transformers": "torch_peer.py",
           "onnxruntime": "onnxruntime_peer.py", "numpy": "numpy_peer.py"}
ATTENTION = ["torch", "onnxruntime"]
ROW_RIVALS = ["torch", "torch_compile"]
SHAPES = [(512, 64), (512, 128), (2048, 64), (2048, 128)]
GRIDS = {
    "attention": [(f"sdpa T={t} d={d} causal={c}", ATTENTION) for c in (0, 1) for t, d in SHAPES]
    + [("sdpa T=8192 d=64 causal=1", ATTENTION), ("sdpa T=2048 d=128 H=32 HK=8 causal=1", ["torch"])],
    "backward": [(f"sdpa_fb T={t} d={d} causal={c}", ["torch"]) for c in (0, 1) for t, d in SHAPES],
    "decode": [(f"sdpa T={t} TK={k} H=32 HK=8 d=128 causal=1", ATTENTION) for t in (1, 4) for k in (512, 4096, 32768)],
    "window": [("sdpa T=8192 d=64 window=256", ["torch"])],
    "rope": [("rope T=2048 H=8 d=64", ["transformers", "torch_complex"])],
    "rows": [(f"{op}{fb} N={n} D={d}", ROW_RIVALS) for op in ("softmax", "layernorm", "rmsnorm", "swiglu")
             for fb in ("", "_fb") for n, d in ((64, 1024), (2048, 4096))]
    + [(f"cross_entropy{fb} N=512 D=32000", ROW_RIVALS) for fb in ("", "_fb")]
    + [("adamw N=1024 D=1024", ["torch", "torch_fused"])],
    "products": [("gemm M=128 N=128 K=64", ["torch", "numpy"]), ("gemm M=1024 N=1024 K=1024", ["torch", "numpy"])],
    "short": [(f"sdpa T={t} d=64 causal={c}", ["eigen_products", *ATTENTION]) for c in (0, 1) for t in (16, 32, 64, 128, 256)],
}

# Freed memory stays in the process (no page of a result is touched for the first time), idle workers sleep.
FAIR = dict(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_=str(1 << 40), MALLOC_TOP_PAD_=str(256 << 20),
            OMP_WAIT_POLICY="PASSIVE", KMP_BLOCKTIME="0", GOMP_SPINCOUNT="0")
# Keeps the rivals that can be told so to AVX2, to compare with a -march=x86-64-v3 build of ours.  ONNX Runtime cannot.
AVX2 = dict(ATEN_CPU_CAPABILITY="avx2", MKL_ENABLE_INSTRUCTIONS="AVX2", ONEDNN_MAX_CPU_ISA="AVX2",
            OPENBLAS_CORETYPE="Haswell")


class Contestant:
    def __init__(self, name, command):
        self.name, self.times, self.reason = name, [], None
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        text=True, env={**os.environ, **FAIR})
        self.burst = 1
        first = self.call()
        if first is not None:
            first = min(first, self.call())
            self.burst = max(1, min(15, round(5 / first)))

    def call(self):
        """Milliseconds of one run; None if the process is gone, whose last line then says why."""
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
            return float(self.process.stdout.readline())
        except (BrokenPipeError, ValueError):
            text = self.process.stderr.read().strip() or "died"
            self.reason = text.splitlines()[-1]
            if self.process.wait() != ABSENT:
                sys.exit(f"{self.name}: {text}")
            return None

    def round(self):
        calls = [self.call() for _ in range(self.burst)]
        self.best = min(getattr(self, "best", math.inf), *calls, math.inf)
        self.times.append(statistics.median(calls))

    def close(self):
        if self.reason is None:
            self.process.stdin.close()
            self.process.wait()


def quantile(values, share):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def work(case):
    """Work of one call and its unit: flop for products, the bytes that must move for the rest."""
    op, *keys = case.split()
    p = Parameters(keys)
    size = dict(fp32=4, fp64=8, fp16=2, bf16=2)[p.dtype]
    if op == "sdpa" and p.decode:
        return 2 * p.B * p.HK * p.TK * p.d * size, "GB/s"
    if op.startswith("sdpa"):
        pairs = p.T * p.TK
        if p.window:
            pairs = sum(min(p.window, i) + 1 for i in range(p.TK - p.T, p.TK))
        elif p.causal:
            pairs /= 2
        return 4 * p.B * p.H * p.d * pairs * (3.5 if op.endswith("_fb") else 1), "GFLOP/s"
    if op == "gemm":
        return 2 * p.M * p.N * p.K, "GFLOP/s"
    if op == "rope":
        return 2 * p.B * p.T * (p.H + 1) * p.d * size, "GB/s"
    streams = {"swiglu": 3, "cross_entropy": 1, "adamw": 7, "softmax_fb": 5, "layernorm_fb": 5, "rmsnorm_fb": 5,
               "silu_fb": 5, "swiglu_fb": 8, "cross_entropy_fb": 3}.get(op, 2)
    return streams * p.N * p.D * size, "GB/s"


def run_case(case, rivals, ours, options):
    arguments = case.split() + [f"threads={options.threads}"]
    contestants = [Contestant(name, [path, *arguments]) for name, path in ours]
    for rival in rivals:
        if rival == "eigen_products":  # the same program: attention as two Eigen products and a soft-max
            contestants.append(Contestant(rival, [ours[0][1], arguments[0] + "_eigen", *arguments[1:]]))
            continue
        contestants.append(Contestant(rival, [options.python, str(HERE / "peers" / SCRIPTS[rival]), rival, *arguments]))
    present = [c for c in contestants if c.reason is None]
    per_round = sum(c.call() * c.burst for c in present) / 1e3
    rounds = max(5, min(options.rounds, int(options.budget * len(present) / max(per_round, 1e-6))))
    for round_number in range(rounds):
        shift = round_number % len(present)
        for contestant in present[shift:] + present[:shift]:
            contestant.round()
    for contestant in contestants:
        contestant.close()
    amount, unit = work(case)
    us = contestants[0]
    rows = []
    for c in contestants:
        row = dict(case=case, threads=options.threads, name=c.name, reason=c.reason, unit=unit, rounds=rounds)
        if c.reason is None:
            ratios = [theirs / ours for theirs, ours in zip(c.times, us.times)]
            row.update(best_ms=c.best, median_ms=statistics.median(c.times), rate=amount / c.best * 1e-6,
                       ratio=statistics.median(ratios), low=quantile(ratios, 0.1), high=quantile(ratios, 0.9))
        rows.append(row)
    return rows


def table_rows(rows):
    us = rows[0]
    for row in rows[1:]:
        left = f"| {row['case']} | {us['best_ms']:.3g} / {us['median_ms']:.3g} | {us['rate']:.3g} {us['unit']} | {row['name']} "
        if row["reason"] is not None:
            yield left + f"| absent: {row['reason'][:60]} | | |"
        else:
            yield left + (f"| {row['best_ms']:.3g} / {row['median_ms']:.3g} | **{row['ratio']:.2f}** "
                          f"| {row['low']:.2f} .. {row['high']:.2f} |")


def draw(rows, path):
    """One line per pair on a logarithmic axis: a dot at the median ratio, a bar over its range, a rule at 1."""
    rows = [r for r in rows if r["reason"] is None and r["ratio"] != 1]
    if not rows:
        return
    left, width, step = 400, 420, 20
    low, high = min(0.5, *(r["low"] for r in rows)), max(2.0, *(r["high"] for r in rows))
    height = step * len(rows) + 50

    def x(ratio):
        return left + width * (math.log(ratio) - math.log(low)) / (math.log(high) - math.log(low))

    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 60}" height="{height}" '
           'font-family="sans-serif" font-size="12">', '<rect width="100%" height="100%" fill="white"/>']
    for tick in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64):
        if low <= tick <= high:
            colour = "#333" if tick == 1 else "#ddd"
            svg.append(f'<line x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="10" y2="{height - 35}" stroke="{colour}"/>'
                       f'<text x="{x(tick):.1f}" y="{height - 20}" text-anchor="middle">{tick:g}</text>')
    for i, r in enumerate(rows):
        y = 20 + step * i
        colour = "#1a7f37" if r["ratio"] >= 1 else "#c0392b"
        svg.append(f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{r["case"]}, {r["name"]}</text>'
                   f'<line x1="{x(r["low"]):.1f}" x2="{x(r["high"]):.1f}" y1="{y}" y2="{y}" stroke="{colour}" '
                   f'stroke-width="3" stroke-opacity="0.4"/><circle cx="{x(r["ratio"]):.1f}" cy="{y}" r="4" fill="{colour}"/>')
    svg.append(f'<text x="{left + width / 2}" y="{height - 4}" text-anchor="middle">'
               'time of the rival / our time (above 1: we are faster)</text></svg>')
    Path(path).write_text("\n".join(svg) + "\n")


def versions(python):
    query = ("import importlib.metadata as m\nfor n in ('torch', 'onnxruntime', 'transformers', 'numpy'):\n"
             "  try: print(n, m.version(n), end=', ')\n  except m.PackageNotFoundError: pass")
    return subprocess.run([python, "-c", query], capture_output=True, text=True).stdout.strip(", ")


def cpu():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grids", nargs="*", metavar="GRID", help=" ".join(GRIDS))
    parser.add_argument("--case", action="append", default=[], help='"OP key=value ..." instead of a grid')
    parser.add_argument("--rivals", help="comma-separated; default: those of the grid, or all that have the op")
    parser.add_argument("--ours", action="append", default=[], metavar="NAME=PATH",
                        help="a bench_paired; the first is the yardstick, further ones (other flags) run as rivals")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has the rivals")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=61, help="at most")
    parser.add_argument("--budget", type=float, default=4, help="seconds per contestant and case")
    parser.add_argument("--core", type=int, default=(os.cpu_count() or 1) - 1, help="core of one-thread runs")
    parser.add_argument("--avx2", action="store_true", help="keep PyTorch and numpy to AVX2 (ours: by its build)")
    parser.add_argument("--svg", help="draw the ratios into this file")
    parser.add_argument("--json", help="write every row into this file")
    options = parser.parse_args()

    ours = [tuple(o.split("=", 1)) for o in options.ours]
    ours = ours or [("eigenblocks", str(HERE.parent / "build" / "bench" / "bench_paired"))]
    for _, path in ours:
        if not os.access(path, os.X_OK):
            sys.exit(f"{path} is not there: build the benchmarks first, or name one with --ours NAME=PATH")
    unknown = [g for g in options.grids if g not in GRIDS]
    if unknown:
        sys.exit(f"unknown grid {unknown[0]}; known: {' '.join(GRIDS)}")
    cases = [(case, None) for case in options.case]
    for grid in options.grids or ([] if cases else ["attention", "decode"]):
        cases += GRIDS[grid]
    if options.threads == 1:
        os.sched_setaffinity(0, {options.core})

    if options.avx2:
        os.environ.update(AVX2)

    print(f"{cpu()}; {platform.system()}; {versions(options.python)}; {options.threads} thread(s); load {os.getloadavg()[0]:.1f}\n")
    print(f"| case | {ours[0][0]} ms, best / median | best | rival | its ms | ratio | 10-90 % |\n|---|---|---|---|---|---|---|",
          flush=True)
    everything = []
    for case, rivals in cases:
        if options.rivals is not None:
            rivals = [r for r in options.rivals.split(",") if r]
        elif rivals is None:
            rivals = ["torch", "onnxruntime"] if case.startswith("sdpa") else ["torch"]
        rows = run_case(case, rivals, ours, options)
        everything += rows
        for line in table_rows(rows):
            print(line, flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(everything, indent=1) + "\n")
    if options.svg:
        draw(everything, options.svg)


if __name__ == "__main__":
    main()
