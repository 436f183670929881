# SPDX-License-Identifier: Apache-2.0
"""A policy node under test, served by a thread of its own, and the contract that it reads."""

import threading

from fault_policies import SweepPolicy
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter
from robot import CONTRACT, PATIENCE_S

from quantvla_ros.nodes.policy_node import PolicyNode
from quantvla_ros.nodes.signals import StopRequest

# Wide enough for a machine that does much else; each test narrows what it claims.
CALM = {
    'guard.max_tick_gap_s': 2.0, 'guard.hold_s': 0.2, 'guard.start_ramp_s': 0.2,
    'guard.start_speed': 0.5, 'freshness.clock_jump_s': 0.5, 'freshness.wait_s': 20.0,
    'guard.estop_cooldown_s': 0.05, 'inference.timeout_s': 1.0, 'policy_process': False,
}


class Spun:
    """A node in a thread of its own executor."""

    def __init__(self, node):
        self.node = node
        self.executor = SingleThreadedExecutor()
        self.executor.add_node(self.node)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._thread.start()

    def _spin(self):
        while not self._end.is_set():
            self.executor.spin_once(timeout_sec=0.05)

    def end(self):
        self._end.set()
        self._thread.join(PATIENCE_S)


class Served(Spun):
    """A policy node in a thread of its own executor."""

    def __init__(self, contract_path, **values):
        overrides = {**CALM, 'contract': str(contract_path), **values}
        self.stop_request = StopRequest()
        super().__init__(PolicyNode(
            namespace='/robot', use_global_arguments=False, stop=self.stop_request,
            parameter_overrides=[Parameter(name, value=v) for name, v in overrides.items()],
        ))

    def do(self, work):
        """Run work on the executor's thread, as a service does, and return what it returns."""
        done, kept = threading.Event(), []

        def task():
            kept.append(work())
            done.set()

        self.executor.create_task(task)
        assert done.wait(PATIENCE_S), 'the executor is stuck'
        return kept[0]

    def up(self):
        """Configure and activate."""
        assert self.do(self.node.trigger_configure).name == 'SUCCESS'
        assert self.do(self.node.trigger_activate).name == 'SUCCESS'
        return self

    def close(self):
        SweepPolicy.released.set()
        self.end()
        self.node.tear_down()
        self.executor.remove_node(self.node)
        self.node.destroy_node()


def make_contract(folder, kind):
    path = folder / f'{kind}.yaml'
    path.write_text(CONTRACT.replace('KIND', kind))
    return path
