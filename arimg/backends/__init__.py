"""The same networks on other runtimes (extra `export`): ONNX Runtime and OpenVINO, on the CPU.

`ops` are the few operators that the graphs need, `graphs` builds a network from them once for both runtimes, and
`transformer` and `tokenizer` are the parts of a pipeline that run such a graph.
"""

EXPORTED = ("OnnxTransformer", "OnnxTokenizer", "OpenvinoTransformer", "OpenvinoTokenizer")
