"""
对话：与任意一个模型聊天，逐词元输出，记得前面的对话。
Chat with any model. It answers token by token and remembers the conversation.

    python scripts/chat.py --weights out/full_dist_64.pth
    echo "3 plus 4?" | python scripts/chat.py --weights out/full_dist_64.pth --temperature 0
    python scripts/chat.py --weights SmolLM2-135M-Instruct.Q4_1.gguf
    echo "Once upon a time" | python scripts/chat.py --weights stories260K.bin --complete

/new starts a new conversation, /quit or Ctrl-D leaves, Ctrl-C stops an answer.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # not only scripts/

import torch

from interop.checkpoint import load_model
from model.generate import column_major, generate_steps
from runtime.args import checking_input, make_parser, parse_args
from runtime.precision import pick_device

# The default of --weights: the newest file of the first of these patterns that has any.
USUAL = ("full_onpolicy_*.pth", "full_dist_*.pth", "full_sft_*.pth", "pretrain_*.pth")


def newest(folder: Path) -> Path | None:
    found = [[path for path in folder.glob(pattern) if not path.stem.endswith("_best")]
             for pattern in USUAL]
    return max(next(filter(None, found), []), key=lambda path: path.stat().st_mtime, default=None)


def chat_prompt(model, tokenizer, messages, max_new_tokens):
    """The ids of the conversation, without its oldest turns if it has become too long."""
    prompt = tokenizer.encode_chat(messages, add_generation_prompt=True)[0]
    while len(prompt) + max_new_tokens > model.config.max_seq_len and len(messages) > 2:
        n_kept = messages[0]["role"] == "system"                # the system message stays
        messages = messages[:n_kept] + messages[n_kept + 2:]
        prompt = tokenizer.encode_chat(messages, add_generation_prompt=True)[0]
    return prompt


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--weights", default=None,
        help="model, in any known format; default: the newest distilled one in out/, or the newest")
    add("--complete", action="store_true", help="continue a text, for pretrained models")
    add("--system", default=None, help="system message of the conversation")
    add("--max_new_tokens", type=int, default=256, help="maximum length of an answer, in tokens")
    add("--temperature", type=float, default=0.7,
        help="sampling temperature; 0: greedy decoding, 1: the model's own distribution")
    add("--top_p", type=float, default=0.9,
        help="sample from the smallest set of tokens with this probability; 1: from all")
    add("--top_k", type=int, default=0, help="sample from the k most likely tokens; 0: from all")
    add("--seed", type=int, default=0, help="random seed of the sampling")
    add("--device", default="auto", help="auto, cpu, cuda, ...")
    args = parse_args(parser, temperature="[0, inf)")
    weights = args.weights or newest(Path(__file__).resolve().parents[1] / "out")
    if weights is None:
        sys.exit("no weights in out/. Make some: python quickstart.py")

    device = pick_device(args.device)
    with checking_input():
        model, tokenizer = load_model(weights, device)
    column_major(model)
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k,
                "generator": torch.Generator(device).manual_seed(args.seed)}
    print(f"{weights}: {model.config}, {model.n_parameters() / 1e6:.2f} M parameters. "
          "/new starts anew, /quit leaves.")

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
            if args.complete:
                start = [] if tokenizer.bos is None else [tokenizer.bos]
                prompt, stop = start + tokenizer.encode(line), tokenizer.end_of_text
            else:
                prompt = chat_prompt(model, tokenizer, messages, args.max_new_tokens)
                stop = tokenizer.end_of_turn
            steps = generate_steps(model, [prompt], args.max_new_tokens, stop, **sampling)
            tokens, text = (i for step in steps for i in step.tokens if i != stop), ""
            try:
                for piece in tokenizer.stream(tokens):
                    text += piece
                    print(piece, end="", flush=True)
            except KeyboardInterrupt:
                pass
            except ValueError as error:
                print(error, end="")
            print()
            messages.append({"role": "assistant", "content": text})


if __name__ == "__main__":
    main()
