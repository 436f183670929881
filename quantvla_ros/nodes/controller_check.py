# SPDX-License-Identifier: Apache-2.0
"""Ask the controller, through its own parameters, whether it is the one the contract means.

A forward controller of another joint order would send each number to the wrong joint, so that is
refused. Asks only a controller that is there and offers parameters; anything else stays unknown,
which the caller may log. Used within a transition, so it takes the answer by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rcl_interfaces.msg import ParameterType
from rcl_interfaces.srv import GetParameters
from rclpy.node import Node

from quantvla_ros.contract import Contract

ASKED = ('joints', 'interpolate_from_desired_state', 'open_loop_control')
READY_TIMEOUT_S = 0.2
ANSWER_TIMEOUT_S = 2.0
Wait = Callable[[Callable[[], bool], float], bool]


def controller_node(topic: str) -> str:
    """Return the name of the node behind a command topic: arm_controller of its ~/commands."""
    return topic.rpartition('/')[0]


def ask_controller(node: Node, topic: str, wait: Wait) -> dict[str, Any] | None:
    """Return the controller's values of ASKED that are set, or None when it cannot be asked."""
    name = controller_node(topic)
    if not name:
        return None
    client = node.create_client(GetParameters, f'{name}/get_parameters')
    try:
        if not wait(client.service_is_ready, READY_TIMEOUT_S):
            return None
        # One by one: a server answers nothing at all when one of the names is not declared.
        answers = {asked: _ask(client, asked, wait) for asked in ASKED}
    finally:
        node.destroy_client(client)
    return {asked: value for asked, value in answers.items() if value is not None}


def _ask(client: Any, name: str, wait: Wait) -> Any:
    """Return one parameter as a tuple of texts or a bool, None when it is neither."""
    kept: list[Any] = []

    def answered() -> bool:
        with client.handle:
            header, response = client.handle.take_response(GetParameters.Response)
        if header is not None:
            kept.append(response)
        return bool(kept)

    with client.handle:
        client.handle.send_request(GetParameters.Request(names=[name]))
    if not wait(answered, ANSWER_TIMEOUT_S) or not kept[0].values:
        return None
    value = kept[0].values[0]
    if value.type == ParameterType.PARAMETER_STRING_ARRAY:
        return tuple(value.string_array_value)
    return bool(value.bool_value) if value.type == ParameterType.PARAMETER_BOOL else None


def check_controller(contract: Contract, found: dict[str, Any]) -> list[str]:
    """Return warnings about a controller's parameters. Raises ValueError on other joints."""
    controller = contract.controller
    joints = found.get('joints')
    ordered = controller.kind == 'forward_command'
    if joints is not None:
        same = joints == controller.joints if ordered else set(joints) == set(controller.joints)
        if not same:
            raise ValueError(
                f'the controller of {controller.topic!r} moves {", ".join(joints)}; '
                f'controller.joints of the contract is {", ".join(controller.joints)}'
                + (', and their order counts' if ordered else '')
            )
    smooth = found.get('interpolate_from_desired_state', found.get('open_loop_control'))
    if not ordered and smooth is False:
        return [
            'the controller starts each trajectory from the measured pose; set its '
            'interpolate_from_desired_state (open_loop_control in older releases) to true for '
            'smooth motion'
        ]
    return []
