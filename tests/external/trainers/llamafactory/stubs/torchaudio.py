"""LLaMA-Factory imports torchaudio, of which no build may fit torch on a CPU. Nothing here has sound."""
