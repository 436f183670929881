# SPDX-License-Identifier: Apache-2.0
"""Integer kernels for NVIDIA GPUs, in Triton. Importing it needs neither Triton nor a GPU."""
