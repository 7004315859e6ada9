"""
文档“经验与内存”各页的命令都能运行。
Every command of the pages on experience and memory runs, on the models of `quickstart.py --smoke`.
"""

import pytest
from helpers_docs import PROMPTS, commands


@pytest.mark.parametrize("command", commands(*PROMPTS))
def test_a_command_of_these_pages_runs(command, newcomer):
    newcomer.run(command)
