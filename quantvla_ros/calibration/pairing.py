# SPDX-License-Identifier: Apache-2.0
"""Messages of a bag, one by one, into the moments at which a policy could have looked.

Uses the builder of the live node: the newest of each input, decoded by the same code. A moment
comes when every camera has sent a new picture; it is used when the stamps of its parts are as
close together as the contract demands of a live robot. Opens no file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from quantvla_ros.action import NS_PER_S
from quantvla_ros.builder import ObservationBuilder
from quantvla_ros.calibration.bags_files import BagError
from quantvla_ros.contract import Contract
from quantvla_ros.decode import DecodeError
from quantvla_ros.observation import Observation

JOINTS = 'joint states'
MISMATCH = ('encoding', 'size', 'names', 'width', 'stamp')  # the contract or the robot is wrong


def camera_key(name: str) -> str:
    """The name of a camera among all inputs."""
    return f'camera {name!r}'


class Pairing:
    """Feed it messages in their order; where take says so, look at the observation.

    rejected: reason -> how many messages or moments could not be used, and why.
    """

    def __init__(
        self, contract: Contract, max_back_s: float, max_age_s: Mapping[str, float]
    ) -> None:
        self.builder = ObservationBuilder(contract)
        self.rejected: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()  # input -> messages
        self._contract = contract
        self._max_back_s = max_back_s
        self._max_age_s = max_age_s  # camera or joint states -> s behind the newest of these
        self._stamps: dict[str, int] = {}  # input -> stamp of its last message
        self._new: set[str] = set()  # cameras with a picture that no moment has used
        self._usable: set[str] = set()  # inputs that have sent something good
        self._instructed = True

    def await_instruction(self) -> None:
        """Use no moment before the first instruction, which the bag is known to hold."""
        self._instructed = False

    def take_instruction(self, text: str) -> None:
        """Change what is asked from now on."""
        self.builder.instruction = text
        self._instructed = True

    def take_joints(self, message: Any) -> None:
        """Take a JointState. Raises BagError."""
        self._put(JOINTS, lambda: self.builder.put_joints(message))

    def take_vector(self, name: str, message: Any, received_ns: int) -> None:
        """Take a Float64MultiArray. Raises BagError."""
        self._put(f'vector {name!r}',
                  lambda: self.builder.put_vector(name, message, received_ns))

    def take_camera(self, name: str, message: Any, received_ns: int) -> bool:
        """Take a picture; return whether this is a moment to look. Raises BagError."""
        if self._put(camera_key(name), lambda: self.builder.put_camera(name, message)):
            self._new.add(name)
        if len(self._new) < len(self._contract.cameras):
            return False
        self._new.clear()
        return self._usable_moment(received_ns)

    def look(self) -> Observation | None:
        """Return the observation of this moment, None where a picture cannot be decoded.

        Raises BagError when no picture of that camera ever could.
        """
        try:
            found = self.builder.build()
        except DecodeError as error:
            self._refuse('pictures', error)
            return None
        self._usable.add('pictures')
        return found

    def _put(self, who: str, put: Any) -> bool:
        self.counts[who] += 1
        try:
            stamp_ns = put()
        except DecodeError as error:
            self._refuse(who, error)
            return False
        self._usable.add(who)
        last_ns = self._stamps.get(who, stamp_ns)
        self._stamps[who] = stamp_ns
        if stamp_ns >= last_ns:
            return True
        back_s = (last_ns - stamp_ns) / NS_PER_S
        if back_s > self._max_back_s:
            raise BagError(
                f'{who}: the stamps go back by {back_s:.3f} s; the clock was set while recording, '
                'or two recordings were joined. Calibrate on a bag of one recording'
            )
        self.rejected[f'{who}: the stamp went back'] += 1
        return False

    def _refuse(self, who: str, error: DecodeError) -> None:
        if error.kind in MISMATCH and who not in self._usable:
            raise BagError(f'{error}. The bag and the contract are of different robots, or '
                           'the driver was set otherwise when it was recorded') from error
        self.rejected[f'{who}: {error.kind}'] += 1

    def _usable_moment(self, received_ns: int) -> bool:
        """Whether every part is there and, by its stamp, fresh beside the newest of them.

        A vector has no stamp but that of its receipt, which is compared with that of now.
        """
        if not self._instructed:
            self.rejected['before the first instruction'] += 1
            return False
        if self.builder.missing():
            self.rejected['before the first message of every input'] += 1
            return False
        newest_ns = max(self._stamps[who] for who in self._max_age_s)
        ages = {who: (newest_ns - self._stamps[who], max_age_s)
                for who, max_age_s in self._max_age_s.items()}
        for vector in self._contract.vectors:
            who = f'vector {vector.name!r}'
            ages[who] = (received_ns - self._stamps[who], vector.max_age_s)
        old = [who for who, (age_ns, most_s) in ages.items() if age_ns > most_s * NS_PER_S]
        for who in old:
            self.rejected[f'{who}: older than max_age_s beside the others'] += 1
        return not old
