# SPDX-License-Identifier: Apache-2.0
"""The simulated robot: LIBERO's Panda in plain MuJoCo."""
