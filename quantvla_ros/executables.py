# SPDX-License-Identifier: Apache-2.0
"""The one table of executables; `python -m quantvla_ros.executables NAME` starts one.

Imports nothing of the package before a name is chosen, because setup.py reads the table before the
package or its dependencies are installed.
"""

import importlib
import sys

EXECUTABLES = {
    'policy_node': 'quantvla_ros.nodes.policy_node',
    'calibration_node': 'quantvla_ros.nodes.calibration_node',
    'record_node': 'quantvla_ros.nodes.record_node',
    'sim_node': 'quantvla_ros.sim.sim_node',
}


def main() -> int:
    """Run the node named first; what follows are its own arguments."""
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ''
    if name not in EXECUTABLES:
        print(f'{name!r} is no executable; known are {", ".join(EXECUTABLES)}', file=sys.stderr)
        return 2
    return int(importlib.import_module(EXECUTABLES[name]).main() or 0)


if __name__ == '__main__':
    sys.exit(main())
