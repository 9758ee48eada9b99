"""What runs a graph, by ONNX Runtime or OpenVINO: tensors by name in, tensors in the graph's order out. `inputs` are
its inputs' names, `width` is the last dimension of its first output."""

import torch

from . import ONNX, OPENVINO


class OnnxGraph:
    """
    A graph that ONNX Runtime runs on the CPU.

    Args:
        path: Of the `.onnx` file, whose weights lie beside it.
        dtype: One of `dtypes`.

    Raises:
        OSError: ONNX Runtime cannot read it; the message has what it said.
    """

    files = (".onnx", ".onnx.data")
    dtypes = ("float32",)

    def __init__(self, path: str, dtype: str):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Of weights it would keep what their rounding to powers of two leaves over.
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        options.log_severity_level = 3  # errors, which come as exceptions too
        try:
            self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its own classes have no name in public
            raise OSError(f"ONNX Runtime cannot load {path}: {error}") from error
        self.run_options = onnxruntime.RunOptions()
        self.run_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")  # after each run
        self.inputs = {each.name for each in self.session.get_inputs()}
        self.width = self.session.get_outputs()[0].shape[-1]

    def __call__(self, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        given = {name: tensor.numpy(force=True) for name, tensor in inputs.items()}
        outputs = self.session.run(None, given, self.run_options)
        return [torch.from_numpy(output) for output in outputs]


class OpenVinoGraph:
    """As [`OnnxGraph`], of an `.xml` file and by OpenVINO. In bfloat16 it computes where the machine can."""

    files = (".xml", ".bin")
    dtypes = ("float32", "bfloat16")

    def __init__(self, path: str, dtype: str):
        import openvino

        settings = {
            # By itself it rounds where the machine has instructions for that.
            "INFERENCE_PRECISION_HINT": "bf16" if dtype == "bfloat16" else "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        try:
            graph = openvino.Core().compile_model(path, "CPU", settings)
        except RuntimeError as error:
            raise OSError(f"OpenVINO cannot load {path}: {error}") from error
        self.request = graph.create_infer_request()
        self.inputs = {each.any_name for each in graph.inputs}
        self.width = graph.outputs[0].partial_shape[-1].get_length()

    def __call__(self, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        # It reads them where they are, so that they lie in one piece.
        given = {name: tensor.contiguous().numpy(force=True) for name, tensor in inputs.items()}
        outputs = self.request.infer(given, share_inputs=True)
        return [torch.from_numpy(output) for output in outputs.to_tuple()]


RUNNERS = {ONNX: OnnxGraph, OPENVINO: OpenVinoGraph}
