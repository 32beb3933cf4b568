#!/usr/bin/env python3
"""ONNX Runtime's fused attention as a peer: see protocol.py.

onnxruntime     MultiHeadAttention where every query head has its own keys, [B, T, H*d] operands;
                decoding: GroupQueryAttention on a cache [B, HK, TK, d] that past and present share, which also writes
                the T new keys and values (as a decoder does), always causal at the bottom right.
fp32 only (the contrib operators compute in nothing else on the CPU).
"""
from protocol import absent, main


def session(p, node, inputs, outputs):
    import onnxruntime
    from onnx import helper

    graph = helper.make_graph([node], "attention", inputs, outputs)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = p.threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run_bound(session, inputs, outputs):
    """A call of the session on memory that stays the same: nothing is allocated or copied per call."""
    import onnxruntime

    binding = session.io_binding()
    for name, value in inputs.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value) if hasattr(value, "dtype") else value)
    for name, value in outputs.items():
        binding.bind_ortvalue_output(name, value)
    return lambda: session.run_with_iobinding(binding)


def sdpa(p):
    if p.dtype != "fp32" or p.window:
        absent("onnxruntime: fp32 without a window only")
    import numpy
    import onnxruntime
    from onnx import TensorProto, helper

    random = numpy.random.default_rng(p.seed)

    def normal(*shape):
        return random.standard_normal(shape, dtype=numpy.float32)

    def value(array):
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)

    def info(name, shape, kind=TensorProto.FLOAT):
        return helper.make_tensor_value_info(name, kind, shape)

    if not p.decode:
        if p.HK != p.H:
            absent("onnxruntime: MultiHeadAttention wants HK = H")
        q, kv, out = [p.B, p.T, p.H * p.d], [p.B, p.TK, p.H * p.d], [p.B, p.T, p.H * p.d]
        node = helper.make_node("MultiHeadAttention", ["q", "k", "v"], ["o"], domain="com.microsoft", num_heads=p.H,
                                unidirectional=int(p.causal))
        s = session(p, node, [info("q", q), info("k", kv), info("v", kv)], [info("o", out)])
        return run_bound(s, {"q": normal(*q), "k": normal(*kv), "v": normal(*kv)}, {"o": value(numpy.zeros(out, "f"))})

    if p.T > 1 and not p.causal:
        absent("onnxruntime: GroupQueryAttention is always causal")
    q, new, cache = [p.B, p.T, p.H * p.d], [p.B, p.T, p.HK * p.d], [p.B, p.HK, p.TK, p.d]
    node = helper.make_node("GroupQueryAttention", ["q", "k", "v", "past_k", "past_v", "last", "total"],
                            ["o", "new_k", "new_v"], domain="com.microsoft", num_heads=p.H, kv_num_heads=p.HK)
    s = session(p, node,
                [info("q", q), info("k", new), info("v", new), info("past_k", cache), info("past_v", cache),
                 info("last", [p.B], TensorProto.INT32), info("total", [1], TensorProto.INT32)],
                [info("o", q), info("new_k", cache), info("new_v", cache)])
    keys, values = value(normal(*cache)), value(normal(*cache))
    return run_bound(s, {"q": normal(*q), "k": normal(*new), "v": normal(*new), "past_k": keys, "past_v": values,
                         "last": numpy.full(p.B, p.TK - 1, numpy.int32), "total": numpy.array([p.TK], numpy.int32)},
                     {"o": value(numpy.zeros(q, "f")), "new_k": keys, "new_v": values})


if __name__ == "__main__":
    main({"onnxruntime": {"sdpa": sdpa}})
