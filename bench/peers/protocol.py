"""What every peer of bench_paired speaks, so that all contestants of a comparison are treated alike.

    PEER.py RIVAL OP key=value ... [threads=N]

builds one case, then runs it once for every line on standard input and prints its time in milliseconds: processor
time at threads=1, wall clock with more.  Keys and defaults are those of bench_paired.  Exit code 3 with one line on
standard error: this rival is absent here (library not installed, or it does not offer the op).
"""
import os
import sys
import time

DEFAULTS = dict(B=1, H=8, HK=0, T=512, TK=0, d=64, causal=0, window=0, dtype="fp32", N=4096, D=1024, M=1024, K=1024,
                L=4096, S=16, seed=0, threads=1)
ABSENT = 3


def absent(reason):
    print(reason, file=sys.stderr)
    sys.exit(ABSENT)


class Parameters:
    """Keys as attributes; `set_keys` remembers which ones were given."""

    def __init__(self, arguments):
        self.__dict__.update(DEFAULTS)
        for argument in arguments:
            key, _, text = argument.partition("=")
            if key not in DEFAULTS:
                sys.exit(f"unknown key {key}; known: {' '.join(DEFAULTS)}")
            setattr(self, key, type(DEFAULTS[key])(text))
        self.HK = self.HK or self.H
        self.TK = self.TK or self.T

    @property
    def decode(self):
        return self.T <= 16 and self.TK >= 512


def main(rivals):
    """rivals: {name: {op: function(Parameters) -> callable}}; a builder may raise ImportError or call absent()."""
    if len(sys.argv) < 3:
        sys.exit(f"usage: {sys.argv[0]} RIVAL OP key=value ...; rivals: {' '.join(rivals)}")
    rival, op, p = sys.argv[1], sys.argv[2], Parameters(sys.argv[3:])
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(p.threads)
    if rival not in rivals:
        sys.exit(f"unknown rival {rival}; known: {' '.join(rivals)}")
    if op not in rivals[rival]:
        absent(f"{rival} has no {op}")
    try:
        run = rivals[rival][op](p)
    except ImportError as error:
        absent(f"not installed: {error}")
    for _ in range(3):
        run()
    clock = time.process_time if p.threads == 1 else time.perf_counter
    for _ in sys.stdin:
        start = clock()
        run()
        print(f"{(clock() - start) * 1e3:.6f}", flush=True)
