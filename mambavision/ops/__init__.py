"""Operators of the network: the selective scan and the short convolution over tokens, with their native kernels."""

from mambavision.ops.selective_scan import choose_backend, selective_scan, selective_scan_tokens

__all__ = ["choose_backend", "selective_scan", "selective_scan_tokens"]
