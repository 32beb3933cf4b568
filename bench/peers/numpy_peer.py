#!/usr/bin/env python3
"""numpy's matrix product (its own OpenBLAS) as a peer: see protocol.py."""
import os

from protocol import absent, main


def gemm(p):
    if p.dtype not in ("fp32", "fp64"):
        absent("numpy multiplies fp32 and fp64 only")
    os.environ["OPENBLAS_NUM_THREADS"] = str(p.threads)
    import numpy

    random = numpy.random.default_rng(p.seed)
    kind = numpy.float32 if p.dtype == "fp32" else numpy.float64
    a, b = random.standard_normal((p.M, p.K)).astype(kind), random.standard_normal((p.K, p.N)).astype(kind)
    out = numpy.empty((p.M, p.N), kind)
    return lambda: numpy.matmul(a, b, out=out)


if __name__ == "__main__":
    main({"numpy": {"gemm": gemm}})
