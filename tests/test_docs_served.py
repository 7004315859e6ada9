"""
文档“远处的教师”一页的命令都能运行：服务器启动一次，其余命令里的地址换成它的。
Every command of the page on served teachers runs, on the models of `quickstart.py --smoke`. The page's server is started
once, at a free port, which the other commands get instead of 8000.
"""

import json
import shlex
import shutil
import subprocess

import pytest
from helpers_docs import SERVED, commands
from test_serve import Server

COMMANDS = commands(*SERVED)


@pytest.fixture(scope="module")
def server(newcomer):
    [command] = [command for command in COMMANDS if "scripts/serve.py" in command]
    words = shlex.split(command)
    server = Server(*words[words.index("--weights") + 1:], cwd=newcomer.folder)
    yield server
    server.stop()


@pytest.mark.parametrize("command", [command for command in COMMANDS if "scripts/serve.py" not in command])
def test_a_command_of_this_page_runs(command, newcomer, server):
    command = command.replace("http://127.0.0.1:8000", server.root)
    if not command.startswith("curl"):
        return newcomer.run(command)
    if not shutil.which("curl"):
        pytest.skip("there is no curl here")
    printed = subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout
    assert "error" not in json.loads(printed) and "teacher" in printed
