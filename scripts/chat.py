"""
对话：与任意一个检查点聊天，逐字输出，多轮。
Chat: talk with any checkpoint; it answers word by word and remembers the conversation.

    python scripts/chat.py --weights out/full_dist_64.pth
    echo "3 plus 4?" | python scripts/chat.py --weights out/full_dist_64.pth --temperature 0
    python scripts/chat.py --weights SmolLM2-135M-Instruct.Q4_1.gguf
    echo "Once upon a time" | python scripts/chat.py --weights stories260K.bin --complete

/new forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C cuts an answer short.
"""

import argparse
import sys
from pathlib import Path

# Run as `python scripts/chat.py`, Python looks for modules in scripts/ only; the shelves lie one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from interop.checkpoint import load_model
from model.generate import column_major, generate_steps
from runtime.args import parse_args
from runtime.precision import pick_device

# The newest of these is talked with when --weights does not say.
USUAL = ("full_onpolicy_*.pth", "full_dist_*.pth", "full_sft_*.pth", "pretrain_*.pth")


def newest(folder: Path) -> Path | None:
    for pattern in USUAL:
        found = [path for path in folder.glob(pattern) if not path.stem.endswith("_best")]
        if found:
            return max(found, key=lambda path: path.stat().st_mtime)
    return None


def answer(model, tokenizer, messages, max_new_tokens, **sampling):
    """The assistant's next turn, piece by piece. The oldest turns are left out when the conversation has grown too long."""
    prompt = tokenizer.encode_chat(messages, add_generation_prompt=True)[0]
    while len(prompt) + max_new_tokens > model.config.max_seq_len and len(messages) > 2:
        messages = messages[2:] if messages[0]["role"] != "system" else [messages[0], *messages[3:]]
        prompt = tokenizer.encode_chat(messages, add_generation_prompt=True)[0]
    return written(model, tokenizer, prompt, max_new_tokens, tokenizer.end_of_turn, **sampling)


def completion(model, tokenizer, text, max_new_tokens, **sampling):
    """How the text goes on, as a pretrained model has it, piece by piece."""
    prompt = ([] if tokenizer.bos is None else [tokenizer.bos]) + tokenizer.encode(text)
    return written(model, tokenizer, prompt, max_new_tokens, tokenizer.end_of_text, **sampling)


def written(model, tokenizer, prompt, max_new_tokens, stop, **sampling):
    steps = generate_steps(model, [prompt], max_new_tokens, stop, **sampling)
    return tokenizer.stream(token for step in steps for token in step.tokens if token != stop)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--weights", default=None, help="model, of any kind that model/checkpoint.py reads; default: the newest distilled "
                                        "one in out/, else the newest one")
    add("--complete", action="store_true", help="go on with what is typed, as a text: for pretrained models")
    add("--system", default=None, help="a system message before the conversation")
    add("--max_new_tokens", type=int, default=256, help="longest answer, in tokens")
    add("--temperature", type=float, default=0.7, help="0: always the likeliest word; 1: as the model has it")
    add("--top_p", type=float, default=0.9, help="sample from the smallest set that has this probability; 1: from all")
    add("--top_k", type=int, default=0, help="sample from the k likeliest words; 0: from all")
    add("--seed", type=int, default=0, help="of the sampling")
    add("--device", default="auto", help="auto, cpu, cuda, ...")
    args = parse_args(parser)
    if args.temperature < 0 or not 0 < args.top_p <= 1 or args.top_k < 0:
        parser.error(f"--temperature {args.temperature} must be 0 or more, --top_p {args.top_p} in (0, 1], "
                     f"--top_k {args.top_k} 0 or more")
    weights = args.weights or newest(Path(__file__).resolve().parents[1] / "out")
    if weights is None:
        sys.exit("no weights in out/. Make some: bash quickstart.sh")

    device = pick_device(args.device)
    try:
        model, tokenizer = load_model(weights, device)
        column_major(model)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k,
                "generator": torch.Generator(device).manual_seed(args.seed)}
    print(f"{weights}: {model.config}, {model.n_parameters() / 1e6:.2f} M parameters. /new forgets, /quit leaves.")

    opening = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(opening)
    while True:
        try:
            line = input("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line == "/quit":
            return
        if line == "/new":
            messages = list(opening)
        elif line:
            messages.append({"role": "user", "content": line})
            print(line if args.complete else "model> ", end="", flush=True)
            said, asked = "", line if args.complete else messages
            try:
                for piece in (completion if args.complete else answer)(model, tokenizer, asked, args.max_new_tokens, **sampling):
                    said += piece
                    print(piece, end="", flush=True)
            except KeyboardInterrupt:
                pass
            except ValueError as error:
                print(error, end="")
            print()
            messages.append({"role": "assistant", "content": said})


if __name__ == "__main__":
    main()
