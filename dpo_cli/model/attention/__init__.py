"""Attention of packed rows: the kernels, their layouts, and which of them a model can use."""
