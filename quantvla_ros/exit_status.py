# SPDX-License-Identifier: Apache-2.0
"""Exit statuses with a meaning of their own: what the shell and other commands go by."""

INTERRUPTED = 130  # Ctrl-C or SIGTERM ended the work, as shells have it
