"""
文档“数据与模型”各页的命令都能运行。
Every command of the pages on data and models runs, on the models of `quickstart.py --smoke`.
"""

import pytest
from helpers_docs import MODELS, commands


@pytest.mark.parametrize("command", commands(*MODELS))
def test_a_command_of_these_pages_runs(command, newcomer):
    newcomer.run(command)
