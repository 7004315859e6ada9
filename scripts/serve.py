"""
服务：用 OpenAI 的协议提供一个或几个模型；别的机器上的学生可以拿它作教师。
Serve models with OpenAI's protocol: for clients, for the page at /, and as teachers of students
elsewhere.

    python scripts/serve.py --weights teacher=out/full_sft_128.pth student=out/full_dist_64.pth
    curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \\
        -d '{"model": "student", "messages": [{"role": "user", "content": "3 plus 4?"}]}'

serving/api.py lists what a request may say. Ctrl-C and SIGTERM finish what is running.
"""

import os
import socket
import sys
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # not only scripts/

from interop.checkpoint import load_model
from model.generate import column_major
from runtime.args import by_name, checking_input, make_parser, parse_args
from runtime.precision import pick_device


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--weights", nargs="+", required=True, metavar="[NAME=]PATH",
        help="models, in any known format, and their names in requests; default: the file's name")
    add("--host", default="127.0.0.1",
        help="address to listen at; 0.0.0.0 lets other machines in and needs --api_key_env")
    add("--port", type=int, default=8000, help="port to listen at; 0: a free one, which is printed")
    add("--api_key_env", default=None, metavar="VARIABLE",
        help="environment variable with the key that clients must send")
    add("--max_concurrency", type=int, default=16, help="answers generated at a time, per model")
    add("--max_waiting", type=int, default=64, help="answers that may wait, per model; more: 429")
    add("--device", default="auto", help="auto, cpu, cuda, ...")
    args = parse_args(parser, port="[0, 65535]", concurrency="[1, inf)", waiting="[1, inf)")
    try:
        import uvicorn

        from serving.api import make_app
        from serving.page import add_page
    except ImportError as error:
        sys.exit(f"serving needs {error.name}: pip install fastapi uvicorn")
    from serving.engine import Engine

    with checking_input():
        key = os.environ.get(args.api_key_env, "").strip() if args.api_key_env else None
        if args.api_key_env and not key:
            raise ValueError("--api_key_env: no such environment variable, or it is empty")
        if args.host not in ("127.0.0.1", "localhost", "::1") and not key:
            raise ValueError(f"--host {args.host} lets others in: give a key with --api_key_env")
        try:
            listening = socket.create_server((args.host, args.port), reuse_port=False)
        except OSError as error:
            reason = error.strerror.split(" (")[0]
            raise ValueError(f"--port {args.port} at {args.host}: {reason}. Another server may run "
                             "there; --port 0 takes a free one") from None
        engines = {}
        for name, path in by_name(args.weights).items():
            model, tokenizer = load_model(path, pick_device(args.device))
            engines[name] = Engine(name, column_major(model.eval()), tokenizer,
                                   args.max_concurrency, args.max_waiting)
    host, port = listening.getsockname()[:2]
    print(f"{', '.join(engines)} at http://{host}:{port}/v1 and a page at http://{host}:{port}",
          flush=True)
    app = make_app(engines, key)
    add_page(app, engines, Path("out"))
    with suppress(KeyboardInterrupt):           # uvicorn has finished what was running
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])


if __name__ == "__main__":
    main()
