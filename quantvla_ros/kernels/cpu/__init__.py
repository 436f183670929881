# SPDX-License-Identifier: Apache-2.0
"""C++ integer kernels behind a small C ABI, one library per instruction set."""
