"""Lost: the tests that export models (`torch.export`, ONNX, ExecuTorch)."""


class ExportTesterMixin:
    pass
