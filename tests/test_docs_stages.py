"""
文档“课程与能力树”各页的命令都能运行。
Every command of the pages on curriculum and ability tree runs, on the models of `quickstart.py --smoke`.
"""

import pytest
from helpers_docs import STAGES, commands


@pytest.mark.parametrize("command", commands(*STAGES))
def test_a_command_of_these_pages_runs(command, newcomer):
    newcomer.run(command)
