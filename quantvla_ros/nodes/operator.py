# SPDX-License-Identifier: Apache-2.0
"""What a person at the robot does, as calls: start an episode, enable, stop, give an instruction.

Talks to sim_node and policy_node by topic and service like any other tool. Spins in the calling
thread; every wait has an end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import rclpy
from rcl_interfaces.srv import SetParametersAtomically
from rclpy.executors import SingleThreadedExecutor
from std_msgs.msg import String
from std_srvs.srv import SetBool, Trigger

from quantvla_ros.nodes.names import LATCHED

SERVICE_S = 30.0


class NoAnswer(ValueError):  # noqa: N818  (a sentence for the user)
    """Something on the graph did not answer in time."""


class Operator:
    """A node of its own context, so that it can live beside anything else in the process."""

    def __init__(
        self,
        namespace: str = '',
        stop: Callable[[], bool] = lambda: False,
        sim_time: bool = False,
    ) -> None:
        self._stop = stop
        self._context = rclpy.Context()
        self._context.init(args=[])
        self._node = rclpy.create_node(
            'quantvla_operator', namespace=namespace, context=self._context,
            parameter_overrides=[rclpy.Parameter('use_sim_time', value=sim_time)])
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._node)
        self._clients: dict[str, Any] = {}  # by service; finding one takes a while
        self.policy: dict[str, Any] = {}  # the last policy_node/status
        self.episode: dict[str, Any] = {}  # the last sim_node/episode
        self._node.create_subscription(String, 'policy_node/status', self._on_policy, LATCHED)
        self._node.create_subscription(String, 'sim_node/episode', self._on_episode, LATCHED)

    def __enter__(self) -> Operator:
        return self

    def __exit__(self, *_: object) -> None:
        self._node.destroy_node()
        self._context.shutdown()

    def _on_policy(self, message: String) -> None:
        self.policy = json.loads(message.data)

    def _on_episode(self, message: String) -> None:
        self.episode = json.loads(message.data)

    def now_ns(self) -> int:
        """Return the time by the node's clock, which stamps of a bag carry too."""
        return int(self._node.get_clock().now().nanoseconds)

    def hear(self, kind: Any, topic: str, callback: Callable[[Any], None], qos: Any) -> None:
        """Listen to one more topic while spinning."""
        self._node.create_subscription(kind, topic, callback, qos)

    # waiting -------------------------------------------------------------------------------

    def spin(self, seconds: float = 0.05) -> None:
        """Take what has come."""
        self._executor.spin_once(timeout_sec=seconds)

    def wait(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Spin until the condition holds; False when the time is over or the user stops."""
        end = time.monotonic() + timeout_s
        while not condition():
            if self._stop() or time.monotonic() > end:
                return False
            self.spin()
        return True

    def _call(self, kind: Any, name: str, request: Any) -> Any:
        if name not in self._clients:
            self._clients[name] = self._node.create_client(kind, name)
        client = self._clients[name]
        if not self.wait(client.service_is_ready, SERVICE_S):
            raise NoAnswer(f'nobody offers the service {name}; is the node running?')
        future = client.call_async(request)
        if not self.wait(future.done, SERVICE_S):
            client.remove_pending_request(future)
            raise NoAnswer(f'{name} did not answer within {SERVICE_S:g} s')
        return future.result()

    # acting --------------------------------------------------------------------------------

    def enable(self) -> str:
        """Let the policy move; return '' or why it does not."""
        reply = self._call(SetBool, 'policy_node/enable', SetBool.Request(data=True))
        return '' if reply.success else reply.message

    def disable(self) -> None:
        """Bring the arm to rest."""
        self._call(SetBool, 'policy_node/enable', SetBool.Request(data=False))

    def set_parameters(self, node: str, **values: bool | int | float | str) -> str:
        """Set parameters of a node as a whole; return '' or why they were refused."""
        request = SetParametersAtomically.Request(parameters=[
            rclpy.Parameter(name.replace('__', '.'), value=value).to_parameter_msg()
            for name, value in values.items()])
        reply = self._call(
            SetParametersAtomically, f'{node}/set_parameters_atomically', request)
        return '' if reply.result.successful else reply.result.reason

    def start_episode(self, suite: str, task: int, init: int, seed: int = 0) -> dict[str, Any]:
        """Reset the simulated robot to a start and return its report. Raises ValueError."""
        reason = self.set_parameters('sim_node', suite=suite, task=task, init=init, seed=seed)
        if reason:
            raise ValueError(reason)
        reply = self._call(Trigger, 'sim_node/reset', Trigger.Request())
        if not reply.success:
            raise ValueError(reply.message)
        self.episode = json.loads(reply.message)
        return self.episode

    def say(self, topic: str, text: str, timeout_s: float = 5.0) -> int:
        """Publish an instruction and return how many listeners took it."""
        publisher = self._node.create_publisher(String, topic, LATCHED)
        self.wait(lambda: publisher.get_subscription_count() > 0, timeout_s)
        count = publisher.get_subscription_count()
        if count:
            publisher.publish(String(data=text))
            self.wait(lambda: self.policy.get('instruction') == text, timeout_s)
        return count
