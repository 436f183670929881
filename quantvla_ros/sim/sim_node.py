# SPDX-License-Identifier: Apache-2.0
"""LIBERO's Panda as a ROS 2 robot: joint states, cameras, controllers, episodes.

Wires quantvla_ros.sim.robot to topics and decides nothing. In real time one thread runs physics
and joint states, one renders, the executor takes commands and services. In lockstep the executor
does everything in turn, so that the same commands give the same states to the last bit.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import rclpy
from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, ClockType
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions
from rosgraph_msgs.msg import Clock as ClockMessage
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Float64MultiArray, String
from std_srvs.srv import Trigger
from trajectory_msgs.msg import JointTrajectory

from quantvla_ros.action import NS_PER_S
from quantvla_ros.contract import load_contract
from quantvla_ros.nodes.names import COMMAND, LATCHED, ROBOT_DESCRIPTION, SENSOR
from quantvla_ros.nodes.parameters import check, declare, read
from quantvla_ros.nodes.pictures import image_message, jpeg_message, stamp
from quantvla_ros.nodes.signals import STOP
from quantvla_ros.sim.cameras import CameraLoop, CameraRig, Snapshot, View, check_views
from quantvla_ros.sim.controller_rules import read_message
from quantvla_ros.sim.pacing import Pacer
from quantvla_ros.sim.parameters import SIM_NODE, problems
from quantvla_ros.sim.robot import Episode, SimRobot
from quantvla_ros.sim.urdf import JOINTS, optical_frame, robot_description

STATE_SIZE = 128  # numbers in ~/state: qpos padded with zeros, since tasks differ in size
STATE_HZ = 20.0  # of ~/state, and of what is sent again while lockstep waits
FIRST_PICTURE_S = 20.0  # of a new scene, on a machine that does much else
EPISODE_PERIOD_S = 1.0  # ~/episode at least this often, in simulated time
SIM_TIME_START_NS = NS_PER_S  # a stamp of 0 means "not stamped" to everyone
TRAJECTORY_TOPIC = 'arm_controller/joint_trajectory'
FORWARD_TOPIC = 'arm_controller/commands'


class SimNode(Node):
    """The simulated robot on the graph."""

    def __init__(self, **options: Any) -> None:
        super().__init__('sim_node', **options)
        declare(self, SIM_NODE)
        values = read(self, SIM_NODE)
        self._raise_problems(values)
        self.contract = load_contract(values['contract'])
        self.lockstep = values['mode'] == 'lockstep'
        self._sim_time = (self.lockstep or values['clock']
                          or bool(self.get_parameter('use_sim_time').value)
                          or values['pace'] < 1.0)
        self._sim_ns = SIM_TIME_START_NS
        kind = values['controller']
        self.robot = SimRobot(
            self.contract, self.contract.controller.kind if kind == 'contract' else kind,
            values['interpolate_from_desired_state'], values['allow_partial_joints'],
            values['max_texture'])
        self._period_ns = round(self.robot.period_s * NS_PER_S)
        self._pacer = Pacer(self.robot.period_s / values['pace'], time.monotonic_ns)
        self._stop = threading.Event()
        self.failed = False
        self._newest: Snapshot | None = None  # written by physics, read by cameras
        self._periods = 0
        self._last_camera_ns = 0
        self._pictures: dict[str, np.ndarray] = {}
        self._views = [View(c.name, values['camera.width'] or c.width,
                            values['camera.height'] or c.height) for c in self.contract.cameras]
        self._rig = CameraRig(self._views)
        # of lockstep: GL contexts belong to one thread
        self._painter = ThreadPoolExecutor(max_workers=1, thread_name_prefix='cameras')
        self._physics = threading.Thread(target=self._run_physics, name='physics', daemon=True)
        self._cameras = CameraLoop(
            self._rig, lambda: self._newest, self._wanted_cameras,
            lambda: float(self.get_parameter('camera.rate_hz').value), self._publish_picture,
            lambda: self._fail('cameras'))
        self._make_publishers(values)
        self._start_episode()
        self._make_inputs()
        self.add_on_set_parameters_callback(self._check_parameters)

    # -- set-up ----------------------------------------------------------------------------------

    def _raise_problems(self, values: dict[str, Any]) -> None:
        found = problems(values)
        if found:
            raise ValueError('; '.join(found))

    def _make_publishers(self, values: dict[str, Any]) -> None:
        contract = self.contract
        self._joints_pub = self.create_publisher(JointState, contract.joints.topic, COMMAND)
        self._description_pub = self.create_publisher(String, ROBOT_DESCRIPTION, LATCHED)
        self._episode_pub = self.create_publisher(String, '~/episode', LATCHED)
        self._state_pub = self.create_publisher(Float64MultiArray, '~/state', COMMAND)
        self._instruction_pub = self.create_publisher(
            String, contract.instruction_topic, LATCHED) if values['publish_instruction'] else None
        self._clock_pub = self.create_publisher(
            ClockMessage, '/clock', SENSOR) if self._sim_time else None
        self._raw_pubs, self._jpeg_pubs = {}, {}
        for camera in contract.cameras:
            compressed = camera.type.endswith('CompressedImage')
            if camera.encoding not in ('rgb8', 'bgr8', 'jpeg'):
                raise ValueError(f'camera {camera.name!r}: the simulated robot sends rgb8, bgr8 '
                                 f'or jpeg, not {camera.encoding}')
            if not compressed:
                self._raw_pubs[camera.name] = self.create_publisher(Image, camera.topic, SENSOR)
            topic = camera.topic if compressed else f'{camera.topic}/compressed'
            self._jpeg_pubs[camera.name] = self.create_publisher(CompressedImage, topic, SENSOR)

    def _make_inputs(self) -> None:
        contract, qos = self.contract, COMMAND
        own = contract.controller.topic
        if self.robot.kind == 'forward_command':
            topic = own if contract.controller.kind == 'forward_command' else FORWARD_TOPIC
            self.create_subscription(Float64MultiArray, topic, self._on_forward, qos)
        else:
            topic = own if contract.controller.kind == 'joint_trajectory' else TRAJECTORY_TOPIC
            self.create_subscription(JointTrajectory, topic, self._on_trajectory, qos)
        if contract.gripper.kind == 'topic':
            self.create_subscription(
                Float64MultiArray, contract.gripper.topic, self._on_gripper, qos)
        self.create_service(Trigger, '~/reset', self._on_reset)
        self.create_service(Trigger, '~/success', self._on_success)
        self.create_service(Trigger, '~/step', self._on_step)
        if self.lockstep:
            self.create_timer(1.0 / STATE_HZ, self._send_again,
                              clock=Clock(clock_type=ClockType.STEADY_TIME))

    def start(self) -> None:
        """Let time run."""
        if self.lockstep:
            self._send_again()
            return
        self._pacer.restart()
        self._physics.start()
        self._cameras.start()

    def stop(self) -> None:
        """Stop the threads; may be called twice."""
        self._stop.set()
        if self._physics.is_alive():
            self._physics.join()
        self._cameras.stop()
        if self.lockstep:
            self._painter.submit(self._rig.close).result()
            self._painter.shutdown()

    # -- time ------------------------------------------------------------------------------------

    def now_ns(self) -> int:
        """Return the time that stamps carry: simulated when /clock is published."""
        return self._sim_ns if self._sim_time else self.get_clock().now().nanoseconds

    def _run_physics(self) -> None:
        """Keep real time; the one thread that moves the robot."""
        try:
            while not self._stop.wait(self._pacer.wait_s()):
                self._advance()
                self._pacer.done()
        except Exception:  # the border of a thread: say it and end the node
            self._fail('physics')

    def _advance(self) -> None:
        """Run one control period and publish what it showed."""
        wrong = self.robot.advance(self.now_ns())
        if wrong is not None:
            self.get_logger().error(f'COMMAND VIOLATION: {wrong}; the arm holds',
                                    throttle_duration_sec=1.0)
        self._sim_ns += self._period_ns
        self._periods += 1
        now = self.now_ns()
        self._newest = self.robot.snapshot(now)
        self._publish_state(now)
        if self._periods % max(1, round(EPISODE_PERIOD_S / self.robot.period_s)) == 0 or (
                self.robot.succeeded_at is not None and not self._announced):
            self._publish_episode()

    def _publish_state(self, now: int) -> None:
        if self._clock_pub is not None:
            self._clock_pub.publish(ClockMessage(clock=stamp(now)))
        positions, velocities = self.robot.joint_state()
        message = JointState(name=list(JOINTS), position=positions.tolist(),
                             velocity=velocities.tolist())
        message.header.stamp = stamp(now)
        self._joints_pub.publish(message)
        every = max(1, round(1.0 / STATE_HZ / self.robot.period_s))
        if self._periods % every == 0 and self._state_pub.get_subscription_count():
            assert self._newest is not None
            qpos = self._newest.qpos
            padded = [*qpos.tolist(), *[0.0] * (STATE_SIZE - len(qpos))]
            self._state_pub.publish(Float64MultiArray(data=padded))

    # -- lockstep --------------------------------------------------------------------------------

    def _step(self) -> None:
        """Move on by one period, and render when a picture is due in simulated time."""
        self._advance()
        rate = float(self.get_parameter('camera.rate_hz').value)
        if self._sim_ns - self._last_camera_ns >= NS_PER_S / rate - self._period_ns // 2:
            self._render_now()

    def _render_now(self) -> None:
        """Render the present in a thread of its own and wait for it.

        A pair of pictures can take longer than a receiver's patience with joint states, which
        is wall time even here: so the present is repeated meanwhile.
        """
        assert self._newest is not None
        rendering = self._painter.submit(self._rig.render, self._newest, self._wanted_cameras())
        while not wait([rendering], timeout=1.0 / STATE_HZ).done:
            self._repeat()
        self._pictures, self._last_camera_ns = rendering.result(), self._newest.stamp_ns
        self._send_pictures()

    def _send_again(self) -> None:
        """Repeat the present while time stands still, so that nothing looks silent."""
        now = self.now_ns()
        if self._newest is None or self._newest.stamp_ns != now:
            self._newest = self.robot.snapshot(now)
        if set(self._wanted_cameras()) - set(self._pictures):
            self._render_now()
        self._repeat()

    def _repeat(self) -> None:
        self._publish_state(self.now_ns())
        self._send_pictures()

    def _send_pictures(self) -> None:
        for name, picture in self._pictures.items():
            self._publish_picture(name, picture, self._last_camera_ns)

    # -- inputs ----------------------------------------------------------------------------------

    def _on_forward(self, message: Float64MultiArray) -> None:
        self._say_refusal(self.robot.receive_forward(message.data))

    def _on_trajectory(self, message: JointTrajectory) -> None:
        self._say_refusal(self.robot.receive_trajectory(read_message(message), self.now_ns()))

    def _on_gripper(self, message: Float64MultiArray) -> None:
        reason = self.robot.receive_gripper(message.data)
        if reason is not None:
            self.get_logger().error(f'gripper command refused: {reason}')

    def _say_refusal(self, reason: str | None) -> None:
        if reason is not None:
            self.get_logger().error(f'command refused: {reason}', throttle_duration_sec=1.0)
        if self.lockstep:
            self._step()

    def _check_parameters(self, changed: list[Any]) -> SetParametersResult:
        # suite and task are checked together at ~/reset: a client sets them one after the other
        found = check({parameter.name: parameter.value for parameter in changed}, SIM_NODE)
        return SetParametersResult(successful=not found, reason='; '.join(found))

    def _on_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        try:
            self._start_episode()
        except ValueError as error:
            response.message = str(error)
            return response
        assert self.robot.world is not None
        model = self.robot.world.model
        # twice: the first picture of a scene takes up to a second, and is old when it comes
        if not all(self._cameras.wait_for(model, self.now_ns(), FIRST_PICTURE_S)
                   for _ in range(2)):
            self.get_logger().warning(f'no picture of the new scene within {FIRST_PICTURE_S:g} s')
        self._pacer.restart()
        if self.lockstep:
            self._sim_ns += self._period_ns  # stamps must grow across a reset
            self._pictures = {}
            self._send_again()
        response.success, response.message = True, self._report()
        return response

    def _on_success(
        self, request: Trigger.Request, response: Trigger.Response
    ) -> Trigger.Response:
        response.success = self.robot.success_now()
        response.message = self._report()
        return response

    def _on_step(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        response.success = self.lockstep
        response.message = 'time runs by itself in mode realtime; ~/step is for lockstep'
        if self.lockstep:
            self._step()
            response.message = self._report()
        return response

    # -- episodes --------------------------------------------------------------------------------

    def _start_episode(self) -> None:
        values = read(self, SIM_NODE)
        episode = Episode(values['suite'], values['task'], values['init'], values['seed'],
                          values['lighting'])
        self.robot.start(episode, self.get_logger().info)
        assert self.robot.world is not None
        check_views(self._views, self.robot.world)
        self._description_pub.publish(String(data=robot_description(self.robot.world)))
        instruction = self.robot.world.scene.instruction
        if self._instruction_pub is not None:
            self._instruction_pub.publish(String(data=instruction))
        self._announced = False
        self._publish_episode()
        self.get_logger().info(
            f'{episode.suite} task {episode.task}, start {episode.init}: {instruction!r}')

    def _report(self) -> str:
        report = self.robot.report()
        report['mode'] = 'lockstep' if self.lockstep else 'realtime'
        factor, pace = self._pacer.real_time_factor(), self.get_parameter('pace').value
        report['real_time_factor'] = None if factor is None else factor * pace
        report['pictures'] = self._cameras.pictures
        return json.dumps(report)

    def _publish_episode(self) -> None:
        text = self._report()
        self._announced = json.loads(text)['success']
        self._episode_pub.publish(String(data=text))

    # -- cameras ---------------------------------------------------------------------------------

    def _wanted_cameras(self) -> list[str]:
        """Name the cameras that somebody listens to: a picture costs 30 to 60 ms of a core."""
        return [
            view.name for view in self._views
            if self._jpeg_pubs[view.name].get_subscription_count()
            or (view.name in self._raw_pubs
                and self._raw_pubs[view.name].get_subscription_count())
        ]

    def _publish_picture(self, name: str, picture: np.ndarray, stamp_ns: int) -> None:
        frame = optical_frame(name)
        if name in self._raw_pubs and self._raw_pubs[name].get_subscription_count():
            encoding = self.contract.camera(name).encoding
            self._raw_pubs[name].publish(image_message(picture, encoding, frame, stamp_ns))
        if self._jpeg_pubs[name].get_subscription_count():
            quality = int(self.get_parameter('camera.jpeg_quality').value)
            self._jpeg_pubs[name].publish(jpeg_message(picture, quality, frame, stamp_ns))

    def _fail(self, what: str) -> None:
        """Record that a thread has died; main ends the process with status 1."""
        self.failed = True
        self.get_logger().fatal(f'{what} stopped:\n{traceback.format_exc()}')


def main(argv: list[str] | None = None) -> int:
    """Run the simulated robot until SIGINT or SIGTERM; return the exit status."""
    STOP.install()
    # 0.5 ms instead of 5 bounds how long Python work of one thread keeps the physics waiting
    sys.setswitchinterval(0.0005)
    rclpy.init(args=argv, signal_handler_options=SignalHandlerOptions.NO)
    try:
        node = SimNode()
    except (ValueError, FileNotFoundError) as error:
        sys.stderr.write(f'sim_node: {error}\n')
        rclpy.try_shutdown()
        return 2
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        node.start()
        while not STOP and not node.failed and rclpy.ok():
            executor.spin_once(timeout_sec=0.1)
    finally:
        # a second Ctrl-C may fall into the interpreter's own end, where only "ignore" is kept
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        node.stop()
        executor.remove_node(node)
        node.destroy_node()
        rclpy.try_shutdown()
    return int(node.failed)


if __name__ == '__main__':
    sys.exit(main())
