# SPDX-License-Identifier: Apache-2.0
"""Let `python -m quantvla_ros` do what the `quantvla` command does."""

import sys

from quantvla_ros.cli import main

sys.exit(main())
