#!/usr/bin/env bash
# 安装所需，运行全部测试。 Install what is needed and run all tests:  bash test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")"
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
exec .venv/bin/python -m pytest tests -n auto --dist loadfile "$@"
