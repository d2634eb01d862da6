"""Kernels: attention and its column sums, by device, and packed linear layers."""
