# SPDX-License-Identifier: Apache-2.0
"""What the documents say against the code: tables, commands, and links between the pages."""

import re
from pathlib import Path

import pytest

from quantvla_ros.cli import COMMANDS
from quantvla_ros.graph import arguments_markdown
from quantvla_ros.nodes.parameters import POLICY_NODE, markdown
from quantvla_ros.nodes.recording import RECORD_NODE
from quantvla_ros.sim.parameters import SIM_NODE

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / 'README.md', *(ROOT / 'quantvla_ros').rglob('README.md'),
                *(ROOT / 'models').rglob('*.md')])
LINK = re.compile(r'\]\((?!https?:)([^)\s]+)\)')
SPELLED = re.compile(r'(?:^|`|\s)quantvla ((?:bench )?[a-z][a-z-]*)')

# page -> what stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->` in it
TABLES = {
    ('README.md', 'parameters'): markdown(POLICY_NODE),
    ('README.md', 'arguments'): arguments_markdown(),
    ('README.md', 'record_node'): markdown(RECORD_NODE),
    ('quantvla_ros/sim/README.md', 'sim_node'): markdown(SIM_NODE),
}


def anchors(page):
    """Return the anchors of a page's headings, as they are made on code hosts."""
    heads = re.findall(r'^#+ (.*)$', page.read_text(), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', head).strip().lower().replace(' ', '-') for head in heads}


@pytest.mark.parametrize(('page', 'name'), TABLES)
def test_table_is_the_one_that_the_code_makes(page, name):
    text = (ROOT / page).read_text()
    _, begin, rest = text.partition(f'<!-- {name}:begin -->')
    block, end, _ = rest.partition(f'<!-- {name}:end -->')
    assert begin and end, f'{page} has no table {name}'
    assert block.strip() == TABLES[page, name].strip(), f'write the table again:\n{block}'


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_between_pages_leads_somewhere(page):
    for link in LINK.findall(page.read_text()):
        path, _, anchor = link.partition('#')
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f'{link} leads nowhere'
        assert not anchor or anchor in anchors(target), f'{link}: no such heading'


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_that_a_page_names_exists(page):
    for spelled in SPELLED.findall(page.read_text()):
        assert spelled in COMMANDS or spelled.split()[0] in COMMANDS, f'quantvla {spelled}'


def test_every_command_is_told_of_somewhere():
    told = ' '.join(page.read_text() for page in PAGES)
    assert [name for name in COMMANDS if f'quantvla {name}' not in told] == []


def test_every_room_has_its_page_listed_on_the_front_page():
    front = (ROOT / 'README.md').read_text()
    rooms = [page for page in PAGES if page.parent.parent.name == 'quantvla_ros']
    assert len(rooms) >= 6
    for page in rooms:
        assert f'({page.relative_to(ROOT)})' in front
