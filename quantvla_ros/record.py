# SPDX-License-Identifier: Apache-2.0
"""`quantvla record`: the record graph from the command line, `quantvla up record` in short."""

from __future__ import annotations

import argparse

from quantvla_ros import up


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take the arguments of the record graph."""
    parser.set_defaults(graph='record')
    up.add_assignments(parser)


def run(args: argparse.Namespace) -> int:
    """Record until Ctrl-C."""
    return up.run(args)
