"""Federated learning with small, private updates, as one Flower application."""

import os

__version__ = "0.1.0"

# Flower posts telemetry and looks for updates unless told otherwise before it is imported.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Asking whether there is a GPU must not initialize CUDA: the local engine forks afterwards.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
