# SPDX-License-Identifier: Apache-2.0
"""`quantvla say`: give the policy a new instruction while it runs."""

from __future__ import annotations

import argparse
import os

from quantvla_ros.contract import load_contract
from quantvla_ros.graph import PROFILES, environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take the sentence and where to say it."""
    parser.add_argument('instruction', help='a sentence that the policy knows')
    parser.add_argument('--contract', default='libero_panda', help='names the topic')
    parser.add_argument('--namespace', default='', help='of the policy node')
    parser.add_argument('--dds', default='local', choices=[*PROFILES, 'none'],
                        help='as given to quantvla up; the robot graph has network')


def run(args: argparse.Namespace) -> int:
    """Say it; 1 when nobody listens or the policy does not take it."""
    os.environ.update(environment(args.dds))
    from quantvla_ros.nodes.operator import Operator

    topic = load_contract(args.contract).instruction_topic
    with Operator(args.namespace) as operator:
        listeners = operator.say(topic, args.instruction)
        if not listeners:
            print(f'nobody listens on {topic!r}; start `quantvla up` first, with the same '
                  'ROS_DOMAIN_ID and namespace')
            return 1
        if operator.policy.get('instruction') != args.instruction:
            print(f'said {args.instruction!r}; the policy still reports '
                  f'{operator.policy.get("instruction", "nothing")!r}')
            return 1
    print(f'the policy now follows: {args.instruction!r}')
    return 0
