# SPDX-License-Identifier: Apache-2.0
"""Parameters that change while a policy is loaded: what is taken over, and what is a wish.

Owns the rule that a parameter never lies: precision, calibration and shadow read what runs. To set
them is a wish; it is refused at once with its reason when it cannot come true, and the value
follows when it has. Other live parameters are taken over as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from rcl_interfaces.msg import SetParametersResult
from rclpy.parameter import Parameter

from quantvla_ros.nodes import parameters
from quantvla_ros.nodes.exchange import LOADED
from quantvla_ros.nodes.serving import Serving

WISHES = (*LOADED, 'shadow')


class LiveParameters:
    """The parameter callbacks of a policy node. serving: what serves now, None for nothing."""

    def __init__(self, node: Any, serving: Callable[[], Serving | None]) -> None:
        self._node, self._serving = node, serving
        self._wish: dict[str, Any] = {}  # set by the callback before, for the one after
        self._telling = False
        # Humble has no callback before a set: a wish then reads as fulfilled until the next
        # tell(), 50 ms at most.
        if hasattr(node, 'add_pre_set_parameters_callback'):
            node.add_pre_set_parameters_callback(self._before)
        node.add_on_set_parameters_callback(self._on_set)

    def _before(self, changed: Sequence[Any]) -> list[Any]:
        self._wish = {}
        if self._serving() is None or self._telling:
            return list(changed)
        self._wish = {item.name: item.value for item in changed if item.name in WISHES}
        return [self._node.get_parameter(item.name) if item.name in WISHES else item
                for item in changed]

    def _on_set(self, changed: Sequence[Any]) -> SetParametersResult:
        wished, self._wish = self._wish, {}
        values = {**{item.name: item.value for item in changed}, **wished}
        loaded = self._node.state_label != 'unconfigured'
        problems = parameters.check(values, loaded=loaded)
        serving = self._serving()
        if not problems and serving is not None and not self._telling:
            live = {name: value for name, value in values.items() if name in serving.values}
            problems = self._obey(serving, live)
        return SetParametersResult(successful=not problems, reason='; '.join(problems))

    def _obey(self, serving: Serving, values: dict[str, Any]) -> list[str]:
        """Take over live values; return why a wish among them is refused."""
        exchange, shadowing = serving.exchange, serving.shadowing
        assert exchange is not None and shadowing is not None, 'serving'
        before = dict(serving.values)
        serving.values.update({k: v for k, v in values.items() if k not in WISHES})
        wish = replace(exchange.swap.wish, **{k: values[k] for k in LOADED if k in values})
        asked = any(name in values for name in LOADED)
        shadow = str(values.get('shadow', shadowing.wish))
        try:
            if asked:
                exchange.check(wish)
            if shadow not in ('', shadowing.wish):
                exchange.check_shadow(shadow)
        except (ValueError, FileNotFoundError) as error:
            serving.values.update(before)
            return [str(error)]
        serving.limiter.speed_scale = serving.values['limits.speed_scale']
        if asked and exchange.swap.request(wish):
            self._node.get_logger().info(
                f'{wish} is wished; {exchange.swap.running} runs until then')
        shadowing.request(shadow, lambda: exchange.make_shadow(shadow))
        return []

    def tell(self, serving: Serving) -> None:
        """Let the parameters say what runs."""
        assert serving.exchange is not None and serving.shadowing is not None, 'serving'
        running = serving.exchange.swap.running
        truth = {name: getattr(running, name) for name in LOADED}
        truth['shadow'] = serving.shadowing.running
        if all(self._node.get_parameter(name).value == value for name, value in truth.items()):
            return
        self._telling = True
        self._node.set_parameters_atomically(
            [Parameter(name, value=value) for name, value in truth.items()])
        self._telling = False
