# SPDX-License-Identifier: Apache-2.0
"""One table of commands; mistakes of the user end in a sentence, bugs in a traceback."""

import importlib
import sys
import types

import pytest

from quantvla_ros import cli


@pytest.fixture
def command(monkeypatch):
    def add(run):
        module = types.ModuleType('pretend_command')
        module.add_arguments = lambda parser: parser.add_argument('--count', type=int, default=1)
        module.run = run
        monkeypatch.setitem(sys.modules, 'pretend_command', module)
        monkeypatch.setitem(cli.COMMANDS, 'bench pretend', ('pretend_command', 'Pretend.'))

    return add


@pytest.mark.parametrize('name', sorted(cli.COMMANDS))
def test_every_command_in_the_table_can_be_imported_and_described(name):
    module = importlib.import_module(cli.COMMANDS[name][0])
    assert callable(module.add_arguments) and callable(module.run)
    assert cli.COMMANDS[name][1].endswith('.')


def test_help_lists_commands_without_importing_them(capsys):
    assert cli.main(['--help']) == 0
    assert 'quantvla COMMAND' in capsys.readouterr().out


def test_an_unknown_command_is_named(capsys):
    assert cli.main(['dance']) == 2
    assert "'dance' is not a command" in capsys.readouterr().err


def test_two_word_commands_take_their_options(command, capsys):
    command(lambda args: print('count', args.count))
    assert cli.main(['bench', 'pretend', '--count', '3']) == 0
    assert 'count 3' in capsys.readouterr().out


def test_what_the_user_can_mend_is_a_sentence(command, capsys):
    def run(args):
        raise ValueError('joint order: the checkpoint names 7 joints')

    command(run)
    assert cli.main(['bench', 'pretend']) == 2
    assert 'quantvla bench pretend: joint order' in capsys.readouterr().err


def test_ctrl_c_is_a_sentence(command, capsys):
    def run(args):
        raise KeyboardInterrupt

    command(run)
    assert cli.main(['bench', 'pretend']) == 130
    assert capsys.readouterr().err == 'quantvla bench pretend: interrupted\n'


def test_a_bug_keeps_its_traceback(command):
    def run(args):
        raise KeyError('bug')

    command(run)
    with pytest.raises(KeyError):
        cli.main(['bench', 'pretend'])
