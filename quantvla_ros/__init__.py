# SPDX-License-Identifier: Apache-2.0
"""Quantized Vision-Language-Action policies on integer kernels, as a ROS 2 node.

Import direction (held by test/unit/test_layers.py):
observation, action, contract, decode <- control; kernels <- quant <- policies <- calibration;
everything above <- nodes, sim, training <- graph, bench, cli.
"""

__version__ = '0.1.0'
