# SPDX-License-Identifier: Apache-2.0
"""How the shipped policy was made."""
